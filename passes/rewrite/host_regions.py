"""Compares the MLPs found in the graph of a module that becomes one with those found in the model: by what they compute.

Flow: the region of the host's graph and the region of the model's graph, each as a function of one tensor → both run on the
same random tokens → a region that only has the same weights, such as one that adds the residual stream too, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from memrewrite.passes.graphs.provenance import source_line
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.models.distance import distance
from memrewrite.passes.models.process_state import seeded
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.rewrite.original_mlp import extract


def what_differs(model: nn.Module, in_host: Sequence[SiteCall], in_model: Sequence[SiteCall]) -> str:
    """How the region found in a host's graph differs from the one found in the model's; "" if both compute the same.

    Random ops of train mode are off in the comparison. Regions that are random all the same are not compared, nor are those
    of models on meta.
    """
    for number, host in enumerate(in_host):
        original = _counterpart(host, in_model, number)
        if original.bound.x.meta["val"].device.type == "meta":
            return ""
        ends = f"it is from {_at(host.bound.x)} to {_at(host.bound.y)}; in the model's graph, from {_at(original.bound.x)}"
        ends += f" to {_at(original.bound.y)}"
        if _form(host)[1:] != _form(original)[1:]:
            return f"its input has the width and the dtype {_form(host)[1:]}, and not {_form(original)[1:]}: {ends}"
        with StateGuard(model), torch.no_grad():
            found, again, wanted = (_output(model, call, seed) for call, seed in ((host, 0), (host, 1), (original, 0)))
        tokens = min(len(found), len(wanted))  # of the examples: the module may be called with others first
        far = distance(found[:tokens], wanted[:tokens])
        if not far.rounding and distance(found, again).exact:
            return f"on the same input, its output is {far}: {ends}"
    return ""


def _counterpart(host: SiteCall, in_model: Sequence[SiteCall], number: int) -> SiteCall:
    """The call in the model's graph to compare with the `number`-th one in a host's graph: of the same shape if possible."""
    ordered = [*in_model[number:], *in_model[:number]]
    return next((call for call in ordered if _form(call) == _form(host)), ordered[0])


def _form(call: SiteCall) -> tuple[tuple[int, ...], int, torch.dtype]:
    """Shape, width and dtype of a region's input."""
    shape = shape_of(call.bound.x)
    return shape, shape[-1], call.bound.x.meta["val"].dtype


def _output(model: nn.Module, call: SiteCall, seed: int) -> Tensor:
    """What a region computes of random tokens, `[tokens, d]`, the first ones the same for every shape of its input.

    `seed` is that of the noise that remains without the noise of train mode.
    """
    shape, width, dtype = _form(call)
    tokens = torch.rand(math.prod(shape[:-1]), width, generator=torch.Generator().manual_seed(0)) * 4 - 2
    region = extract(model, call, training=False)
    with seeded():
        torch.manual_seed(seed)
        out: Tensor = region(tokens.reshape(shape).to(dtype=dtype, device=call.bound.x.meta["val"].device))
    return out.reshape(-1, out.shape[-1])


def _at(node: fx.Node) -> str:
    line = source_line(node)
    return f"{node.name!r} ({line})" if line else repr(node.name)
