"""A text as token ids, in pieces that fit a model's context; and one forward on such a piece."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import ModelError, UserError, in_one_line

LENGTH = 512  # tokens of a piece, if the model's context allows it
MOST_BYTES = 2**30  # of a text file


def read_text(file: Path) -> str:
    """The content of a UTF-8 file. Raises `UserError` if it cannot be read, is empty or longer than `MOST_BYTES`."""
    where, hint = str(file), "give a text file, UTF-8"
    try:
        if file.exists() and not file.is_file():  # a pipe or a device may have no end
            raise UserError(f"the text {where!r} cannot be read: it is no file", where=where, hint=hint)
        if file.stat().st_size > MOST_BYTES:
            what = f"the text {where!r} has {file.stat().st_size} bytes; at most {MOST_BYTES} are read"
            raise UserError(what, where=where, hint="give a part of it")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the text {where!r} cannot be read: {in_one_line(error, kind=False)}", where=where, hint=hint
        ) from error
    if not text.strip():
        raise UserError(f"the text {where!r} is empty", where=where, hint=hint)
    return text


def piece_length(model: nn.Module, wanted: int | None) -> int:
    """Tokens of a piece: `wanted`, or `LENGTH`, or the model's context if that is shorter.

    Raises `UserError` if `wanted` is more than the context.
    """
    context = _context(model)
    if wanted is not None and context is not None and wanted > context:
        hint = f"--length {context}, or less"
        raise UserError(f"pieces of {wanted} tokens do not fit the model's context of {context}", hint=hint)
    return wanted or min(LENGTH, context or LENGTH)


def _context(model: nn.Module) -> int | None:
    """The positions that the model's config states."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def pieces(tokenizer: Any, text: str, length: int) -> list[Tensor]:
    """Token ids [1, T] of consecutive parts of the text, each with the special tokens that the tokenizer adds; T <= length."""
    try:
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        first = tokenizer.encode(text)
    except Exception as error:  # of `tokenizers`, which raises plain `Exception`, and panics for too short a length
        hint = "use longer pieces, or another text"
        raise UserError(f"the text cannot be split into pieces of {length} tokens: {in_one_line(error)}", hint=hint) from error
    found = [torch.tensor([part.ids]) for part in (first, *first.overflowing) if part.ids]
    if not found:
        raise UserError("the tokenizer finds no token in the text", hint="use another text")
    return found


def run_piece(model: nn.Module, ids: Tensor) -> None:
    """One forward without gradients on token ids [1, T]; an encoder-decoder gets them on both sides.

    Raises `ModelError` if the model does not take token ids, or its code raises an error.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        hint = "count on example inputs: omit --text"
        raise ModelError(f"the model reads {main!r}, not a text", where=f"{type(model).__name__}.forward", hint=hint)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in accepted and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    fixed = {"use_cache": False, "logits_to_keep": 1}  # no output of the forward is used
    inputs |= {name: value for name, value in fixed.items() if name in accepted}
    try:
        with torch.no_grad():
            model(**inputs)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the model does not run on the text: {in_one_line(error)}",
            where=f"{type(model).__name__}.forward",
            hint="the tokenizer must belong to the model: its token ids must be below the model's vocabulary size",
        ) from error
