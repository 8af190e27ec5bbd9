"""The inputs on which an exported file and its model are compared: the example, random values at other lengths, texts, a cache.

Flow: read the lengths of the dynamic axes from the example → choose other lengths, equal names get equal lengths → sample
values; integers are sampled from the values of the example, so that token ids stay valid and a mask of ones stays all ones.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memrewrite.errors import ExportError
from memrewrite.passes.onnx.file import Port

PLAIN = re.compile(r"[^\s+*/()-]+")  # one symbolic axis; others, such as "past_sequence + sequence", are computed from these
PAST, NEW = "past_sequence", "sequence"  # axes of a decoder that is exported with its cache
STEP = 16  # largest increase of an axis: attention over a text twice as long might not fit into memory
MOST_TEXT = 1_000  # characters of an axis: longer ones are damaged
MOST = 2**28  # elements of one input: axes are formulas in the file, which may be damaged
Feeds = Mapping[str, Tensor]  # a value for every input of a file


@dataclass(frozen=True)
class InputSet:
    """One set of inputs. `required`: the model must run on it; other sets may have lengths that the model does not support."""

    name: str
    lengths: Mapping[str, int]
    feeds: Feeds
    required: bool = False


def lengths_of(ports: Sequence[Port], feeds: Feeds, where: str) -> dict[str, int]:
    """The length of every dynamic axis. Raises `ExportError` if names or shapes of `feeds` do not fit the file."""
    if {port.name for port in ports} != set(feeds):
        wanted, found = (", ".join(names) or "nothing" for names in ((port.name for port in ports), feeds))
        hint = "give the inputs, by these names, that the file was exported with"
        raise ExportError(f"the inputs of the file are {wanted}, those of {where} are {found}", hint=hint)
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


def input_sets(ports: Sequence[Port], example: Feeds, elements: Feeds) -> list[InputSet]:
    """The example, and sets of random values: at its lengths, at other lengths, at 1, and with padding if there is a mask.

    Random values are sampled from `elements`: the example, or more values of the same inputs. If the file has an axis
    `past_sequence`, there is also a set with an empty cache, and one with one new token.
    """
    start = lengths_of(ports, example, "the example")
    chance = random.Random(0)  # noqa: S311 - lengths, no secrets
    ranks = {length: rank for rank, length in enumerate(sorted(set(start.values())))}  # axes of equal length stay equal
    shorter = {length: chance.randint(1, max(1, length - 1)) for length in ranks}
    plans = {"other values": start}
    if start:
        plans["all of length 1"] = dict.fromkeys(start, 1)
        plans["longer"] = {axis: size + min(size, STEP) + 1 + ranks[size] for axis, size in start.items()}
        plans["shorter"] = {axis: shorter[size] for axis, size in start.items()}
    if PAST in start:
        plans["first step"] = {**plans["longer"], PAST: 0}
        plans["one new token"] = {**start, "batch": 1, NEW: 1}
    generator = torch.Generator().manual_seed(0)
    sampled = [_sampled(name, ports, lengths, elements, generator) for name, lengths in plans.items()]
    return [InputSet("example", start, example, required=True), *sampled, *_padded(sampled[0], generator)]


def following(inputs: InputSet, outputs: Mapping[str, Tensor], ports: Sequence[Port], elements: Feeds) -> InputSet:
    """The generation step after `inputs`: one new token, and the cache among `outputs`."""
    lengths = {**inputs.lengths, PAST: inputs.lengths[PAST] + inputs.lengths[NEW], NEW: 1}
    sampled = _sampled("next step", ports, lengths, elements, torch.Generator().manual_seed(1))
    cache = {name.replace("present", "past_key_values", 1): value for name, value in outputs.items()}
    return InputSet(sampled.name, lengths, {name: cache.get(name, value) for name, value in sampled.feeds.items()})


def _sampled(
    name: str, ports: Sequence[Port], lengths: Mapping[str, int], elements: Feeds, generator: torch.Generator
) -> InputSet:
    """Random values for every input, whose dynamic axes have these lengths."""
    feeds = {}
    for port in ports:
        known = elements[port.name]
        # an axis whose length cannot be computed keeps its length in the example
        shape = [
            size if (length := evaluated(dim, lengths)) is None else length
            for dim, size in zip(port.shape, known.shape, strict=True)
        ]
        if math.prod(shape) > MOST:
            axes = ", ".join(str(dim)[:100] for dim in port.shape)
            raise ExportError(f"{port.name} is [{axes}] in the file, which is too large to compare", hint="export it again")
        if port.name.endswith("position_ids"):
            feeds[port.name] = (torch.arange(shape[-1]) + lengths.get(PAST, 0)).expand(shape).to(known.dtype).contiguous()
        elif PAST in port.shape:
            feeds[port.name] = _sample_slices(known, shape, generator)
        else:
            feeds[port.name] = _sample_elements(known, shape, generator)
    return InputSet(name, lengths, feeds)


def _sample_slices(known: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Slices of `known`, sampled along the batch axis and along every axis with another length.

    For a cache: rounding errors are much larger on random numbers than on the keys and values that a model computes.
    """
    for axis, size in enumerate(shape):
        if axis == 0 or size != known.shape[axis]:
            known = known.index_select(axis, torch.randint(known.shape[axis], (size,), generator=generator))
    return known


def _sample_elements(known: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Integers, booleans and infinities are sampled from the elements of `known`; finite floats are normal with its mean and
    standard deviation.
    """
    flat = known.flatten()
    if not len(flat):
        return known.new_zeros(shape)
    if not known.is_floating_point():
        return flat[torch.randint(len(flat), tuple(shape), generator=generator)]
    finite = flat[flat.isfinite()].float()
    std, mean = (finite.std(correction=0), finite.mean()) if len(finite) else (torch.tensor(1.0), torch.tensor(0.0))
    normal = (torch.randn(tuple(shape), generator=generator) * std + mean).to(known.dtype)
    if len(finite) == len(flat):
        return normal
    elements = flat[torch.randint(len(flat), tuple(shape), generator=generator)]  # e.g. the -inf of an additive mask
    return torch.where(elements.isfinite(), normal, elements)


def _padded(inputs: InputSet, generator: torch.Generator) -> list[InputSet]:
    """`inputs` with padding on the left and on the right, if its attention masks are all ones; otherwise nothing."""
    masks = {name: mask for name, mask in inputs.feeds.items() if name.endswith("attention_mask") and mask.dim() == 2}
    masks = {name: mask for name, mask in masks.items() if mask.shape[1] > 1 and not mask.is_floating_point() and mask.all()}
    if not masks:
        return []
    left, right = dict(inputs.feeds), dict(inputs.feeds)
    for name, mask in masks.items():
        width = mask.shape[1]
        padding = torch.randint(1, width, (len(mask), 1), generator=generator)
        left[name] = (torch.arange(width) >= padding).to(mask.dtype)
        right[name] = left[name].flip(-1).contiguous()
    return [InputSet("padded on the left", inputs.lengths, left), InputSet("padded on the right", inputs.lengths, right)]


def evaluated(dim: int | str, lengths: Mapping[str, int]) -> int | None:
    """The length of an axis, which is a number, a name, or a sum of products of these; None if it cannot be computed."""
    if isinstance(dim, int):
        return dim
    if dim in lengths:
        return lengths[dim]
    terms = [[factor.strip() for factor in term.split("*")] for term in dim.split("+")]
    if len(dim) > MOST_TEXT or not all(factor in lengths or factor.isdecimal() for term in terms for factor in term):
        return None
    numbers = [[lengths[factor] if factor in lengths else int(factor) for factor in term] for term in terms]
    return sum(math.prod(term) for term in numbers)
