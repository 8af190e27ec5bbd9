"""Counts which slots a saved model reads on a text, or on its example inputs.

Flow: text and tokenizer are read → the model is loaded → it is watched while it runs on every piece of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from memrewrite.errors import ModelError
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import run
from memrewrite.passes.storage.manifest import read_manifest
from memrewrite.passes.storage.source import load_source
from memrewrite.passes.texts.pieces import piece_length, pieces, read_text, run_piece
from memrewrite.passes.texts.tokenizer import tokenizer_of
from memrewrite.usage.watch import Usage, watch

STEPS = 10  # reports of progress through a text


@dataclass(frozen=True)
class TextUsage:
    """What was read, and on what: pieces of a text, or 0 pieces for the example inputs."""

    usage: Usage
    pieces: int
    length: int


@exclusive
def text_usage(
    directory: str | Path,
    text: str | Path | None = None,
    *,
    length: int | None = None,
    trust_code: bool = False,
    step: Callable[[str], None] | None = None,
) -> TextUsage:
    """Run a saved model in eval mode on a text, or on its example inputs, and count the slots that its layers read.

    Args:
        directory: What `memrewrite.save` wrote.
        text: A UTF-8 file, for a model with a tokenizer.json. Default: one forward on the example inputs.
        length: Tokens of a piece of the text. Default: 512, or the model's context if that is shorter.
        trust_code: As for `memrewrite.load`.
        step: Receives the name of each stage as it begins.

    Raises:
        CheckpointError: The directory was not saved by memrewrite, or is damaged.
        ModelError: The model has no tokenizer, no layers that can be watched, or does not run on its inputs.
        UserError: The text cannot be read, or `length` is more than the model's context.
    """
    report_step, folder = step or (lambda _: None), Path(directory)
    read_manifest(folder)
    content = None if text is None else read_text(Path(text))
    tokenizer = None if content is None else tokenizer_of(folder)
    report_step("loading the model")
    source = load_source(str(folder), trust_code=trust_code)
    model = source.model
    if not isinstance(model, nn.Module):
        what = "an exported graph contains operators in place of layers: what they read is not counted"
        raise ModelError(what, where=str(folder), hint="save the model rewritten with `--emit module`")
    tokens = 0 if content is None else piece_length(model, length)
    with watch(model) as usage:
        if content is None:
            report_step("running the example inputs")
            run(model, source.inputs)
            return TextUsage(usage, 0, 0)
        report_step("splitting the text into tokens")
        parts = pieces(tokenizer, content, tokens)
        for number, ids in enumerate(parts):
            if number % -(-len(parts) // STEPS) == 0:
                report_step(f"reading the text: {number * 100 // len(parts)} % of {len(parts):,} pieces")
            run_piece(model, ids)
    return TextUsage(usage, len(parts), tokens)
