"""What an exported file and its model are run on: the example, other values at other lengths, texts, a cache handed on.

Flow: the lengths of the file's dynamic axes in the example → other lengths, every axis by its name → values in the manner of
the example: whole numbers are taken from it, so that ids stay ids and a mask of ones stays one.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memrewrite.errors import ExportError
from memrewrite.passes.onnx.file import Port

PLAIN = re.compile(r"[^\s+*/()-]+")  # an axis of its own; others, as "past_sequence + sequence", follow from these
PAST, NEW = "past_sequence", "sequence"  # axes of a decoder with its cache
STEP = 16  # by how much an axis grows at most: attention over twice a long text may not fit
SENTENCES = (
    "A memory layer reads a few rows.",
    "Short.",
    "Where is the river, and why?",
    "x = [1, 2, 3]; print(sum(x))",
)
Feeds = Mapping[str, Tensor]  # a value for every input of a file


@dataclass(frozen=True)
class Draw:
    """One set of inputs. `given`: it must run; others may be of lengths that the model does not take."""

    name: str
    lengths: Mapping[str, int]
    feeds: Feeds
    given: bool = False


def lengths_of(ports: Sequence[Port], feeds: Feeds, where: str) -> dict[str, int]:
    """How long every dynamic axis is. Raises `ExportError` where `feeds` are not what the file takes."""
    if {port.name for port in ports} != set(feeds):
        wanted, found = (", ".join(names) or "nothing" for names in ((port.name for port in ports), feeds))
        hint = "give the inputs, by these names, that the file was exported with"
        raise ExportError(f"the file takes {wanted}, and {where} gives {found}", hint=hint)
    lengths: dict[str, int] = {}
    for port in ports:
        shape = tuple(feeds[port.name].shape)
        same = len(shape) == len(port.shape)
        for dim, size in zip(port.shape, shape, strict=False):
            known = lengths.setdefault(dim, size) if isinstance(dim, str) and PLAIN.fullmatch(dim) else dim
            same &= isinstance(known, str) or known == size
        if not same:
            axes = ", ".join(map(str, port.shape))
            raise ExportError(f"{port.name} is [{axes}] in the file, and {list(shape)} in {where}", hint="give inputs that fit")
    return lengths


def draws(ports: Sequence[Port], example: Feeds, elements: Feeds) -> list[Draw]:
    """The example and draws of other values: at its lengths, at others, at 1, and with padding where there is a mask.

    `elements` are what values are taken from: the example, or more of the same kind. A file with an axis `past_sequence`
    is also tried at its first step, and with one new token.
    """
    start = lengths_of(ports, example, "the example")
    chance = random.Random(0)  # noqa: S311 - lengths, no secrets
    ranks = {length: rank for rank, length in enumerate(sorted(set(start.values())))}  # what was equally long stays so
    shorter = {length: chance.randint(1, max(1, length - 1)) for length in ranks}
    plans = {"other values": start}
    if start:
        plans["all of length 1"] = dict.fromkeys(start, 1)
        plans["longer"] = {axis: size + min(size, STEP) + 1 + ranks[size] for axis, size in start.items()}
        plans["shorter"] = {axis: shorter[size] for axis, size in start.items()}
    if PAST in start:
        plans["first step"] = {**plans["longer"], PAST: 0}
        plans["one new token"] = {**start, "batch": 1, NEW: 1}
    made = [Draw("example", start, example, given=True)]
    generator = torch.Generator().manual_seed(0)
    made += [_drawn(name, ports, lengths, elements, generator) for name, lengths in plans.items()]
    return made + _padded(made[1], generator)


def following(draw: Draw, outputs: Mapping[str, Tensor], ports: Sequence[Port], elements: Feeds) -> Draw:
    """The step after `draw`: one new token, and for the cache what that step gave."""
    lengths = {**draw.lengths, PAST: draw.lengths[PAST] + draw.lengths[NEW], NEW: 1}
    made = _drawn("next step", ports, lengths, elements, torch.Generator().manual_seed(1))
    cache = {name.replace("present", "past_key_values", 1): value for name, value in outputs.items()}
    return Draw(made.name, lengths, {name: cache.get(name, value) for name, value in made.feeds.items()})


def _drawn(name: str, ports: Sequence[Port], lengths: Mapping[str, int], elements: Feeds, generator: torch.Generator) -> Draw:
    feeds = {}
    for port in ports:
        known = elements[port.name]
        # an axis whose length follows from nothing we know keeps the example's
        shape = [
            size if (length := evaluated(dim, lengths)) is None else length
            for dim, size in zip(port.shape, known.shape, strict=True)
        ]
        if port.name.endswith("position_ids"):
            feeds[port.name] = (torch.arange(shape[-1]) + lengths.get(PAST, 0)).expand(shape).to(known.dtype).contiguous()
        elif PAST in port.shape:
            feeds[port.name] = _chosen(known, shape, generator)
        else:
            feeds[port.name] = _like(known, shape, generator)
    return Draw(name, lengths, feeds)


def _chosen(known: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Slices of `known`, drawn on every axis of another length or of texts: a cache of numbers that no model would make has
    rounding grow beyond what any text shows.
    """
    for axis, size in enumerate(shape):
        if axis == 0 or size != known.shape[axis]:
            known = known.index_select(axis, torch.randint(known.shape[axis], (size,), generator=generator))
    return known


def _like(known: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Whole numbers, truths and what is infinite from the elements of `known`; other numbers of its mean and spread."""
    flat = known.flatten()
    if not len(flat):
        return known.new_zeros(shape)
    if not known.is_floating_point():
        return flat[torch.randint(len(flat), tuple(shape), generator=generator)]
    finite = flat[flat.isfinite()].float()
    spread, mean = (finite.std(correction=0), finite.mean()) if len(finite) else (torch.tensor(1.0), torch.tensor(0.0))
    drawn = (torch.randn(tuple(shape), generator=generator) * spread + mean).to(known.dtype)
    if len(finite) == len(flat):
        return drawn
    marks = flat[torch.randint(len(flat), tuple(shape), generator=generator)]  # as an additive mask has
    return torch.where(marks.isfinite(), drawn, marks)


def _padded(draw: Draw, generator: torch.Generator) -> list[Draw]:
    """`draw` with its texts shortened, from the left and from the right, where it has masks of ones."""
    masks = {name: mask for name, mask in draw.feeds.items() if name.endswith("attention_mask") and mask.dim() == 2}
    masks = {name: mask for name, mask in masks.items() if mask.shape[1] > 1 and not mask.is_floating_point() and mask.all()}
    if not masks:
        return []
    left, right = dict(draw.feeds), dict(draw.feeds)
    for name, mask in masks.items():
        width = mask.shape[1]
        padding = torch.randint(1, width, (len(mask), 1), generator=generator)
        left[name] = (torch.arange(width) >= padding).to(mask.dtype)
        right[name] = left[name].flip(-1).contiguous()
    return [Draw("padded on the left", draw.lengths, left), Draw("padded on the right", draw.lengths, right)]


def evaluated(dim: int | str, lengths: Mapping[str, int]) -> int | None:
    """The length of an axis: a number, a name, or a sum of products of these; None where it does not follow."""
    if isinstance(dim, int):
        return dim
    if dim in lengths:
        return lengths[dim]
    terms = [[factor.strip() for factor in term.split("*")] for term in dim.split("+")]
    if not all(factor in lengths or factor.isdecimal() for term in terms for factor in term):
        return None
    return sum(math.prod(lengths.get(factor) or int(factor.isdecimal() and factor) for factor in term) for term in terms)


def given_feeds(real: Sequence[str | Path | Mapping[str, Any]], ports: Sequence[Port], example: Feeds) -> list[Draw]:
    """Inputs of the user's own, arrays by input name or `.npz` files of these. Raises `ExportError` where they do not fit."""
    found = []
    for place, given in enumerate(real):
        where = f"real input {place}" if isinstance(given, Mapping) else str(given)
        arrays = given if isinstance(given, Mapping) else _from_file(Path(given))
        feeds = {name: torch.as_tensor(array) for name, array in arrays.items()}
        lengths = lengths_of(ports, feeds, where)
        for name, known in example.items():
            if feeds[name].is_floating_point() != known.is_floating_point():
                raise ExportError(f"{name} is {known.dtype} in the file, and {feeds[name].dtype} in {where}")
        found.append(Draw(where, lengths, {name: feeds[name].to(example[name].dtype) for name in example}, given=True))
    return found


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays) if isinstance(arrays, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError) as error:
        hint = "numpy.savez(path, input_ids=..., ...)"
        raise ExportError(f"the inputs cannot be read: {error}", where=str(path), hint=hint) from error


def text_inputs(directory: str | Path, ports: Sequence[Port], *, trust_code: bool = False) -> list[dict[str, Tensor]]:
    """Built-in sentences as the tokenizer of `directory` spells them, for a file that takes nothing but texts (and a cache).

    A batch padded to the longest, or one sentence at a time without a token to pad with; `[]` where no text is taken or
    no tokenizer lies there.
    """
    names = {port.name for port in ports if not port.name.startswith("past_key_values.")}
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    if "input_ids" not in names or not names <= known or not (Path(directory) / "tokenizer_config.json").is_file():
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    can_pad = tokenizer.pad_token is not None and "attention_mask" in names
    batches = [list(SENTENCES)] if can_pad else [[sentence] for sentence in SENTENCES]
    return [_as_text(tokenizer(batch, padding=can_pad, return_tensors="pt"), ports) for batch in batches]


def _as_text(encoded: Mapping[str, Tensor], ports: Sequence[Port]) -> dict[str, Tensor]:
    """What a file takes of a tokenized batch: positions that count what is no padding, an empty cache."""
    ids = encoded["input_ids"]
    mask = encoded.get("attention_mask", torch.ones_like(ids))
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "token_type_ids": encoded.get("token_type_ids", torch.zeros_like(ids)),
    }
    lengths = {"batch": len(ids), NEW: ids.shape[1], PAST: 0}
    empty = {port.name: torch.zeros([evaluated(dim, lengths) or 0 for dim in port.shape]) for port in ports}
    return {port.name: made.get(port.name, empty[port.name]) for port in ports}
