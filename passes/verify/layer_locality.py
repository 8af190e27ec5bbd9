"""The *tokenwise* check: no layer, with its hooks, mixes tokens. Tested on values, as in *locality*.

*frame* treats a layer and its hooks as one value and does not look at what they compute; this check does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.layers.kinds import kind_named
from memrewrite.passes.locate.token_perturbation import Tokens
from memrewrite.passes.models.forward import layer_in_eval_mode
from memrewrite.passes.models.process_state import SEED
from memrewrite.passes.rewrite.hooks import UseStoredInput
from memrewrite.passes.verify.evidence import RewrittenModel, checked, skipped
from memrewrite.passes.verify.gradient_flow import nonzero_layers
from memrewrite.passes.verify.mlp_locality import ROUTED, outcome_of
from memrewrite.plans import Substitution
from memrewrite.report import Check
from memrewrite.site import dtype_named

ROWS, LENGTH = 2, 4  # the shape of the tokens that the layers are called on


def tokenwise(after: RewrittenModel) -> Check:
    """Does a token's output of every layer depend on that token (unless the kind is constant), and on no other?"""
    if after.on_meta:
        return skipped("tokenwise", "the model is on meta: there are no values to change")
    with nonzero_layers(after):
        for substitution in after.plan.substitutions:
            path = substitution.site.path
            wrong = _wrong(after.layers[path], substitution)
            if wrong:
                return checked("tokenwise", False, 0, f"in the layer at {path!r} {wrong}")
    count = len(after.layers)
    return checked("tokenwise", True, count, f"one token changed, every other keeps every bit in all {count} layers")


def _wrong(layer: nn.Module, substitution: Substitution) -> str:
    site, kind = substitution.site, kind_named(substitution.kind)
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))  # without parameters it runs on any
    generator, dtype = torch.Generator().manual_seed(SEED), dtype_named(site.dtype)
    shape = (ROWS, LENGTH, site.d_in)
    x, other = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    tokens = ROWS * LENGTH
    into, out = (Tokens.consecutive(tokens * width, tokens, ROWS) for width in (site.d_in, site.d_model))
    allowed = ROUTED * torch.finfo(dtype).eps if kind.regroups else 0.0
    with layer_in_eval_mode(layer):  # in training an expert may choose among all tokens
        found = outcome_of(lambda given: _output(layer, given, site.axis), x, other, into, out, allowed)
    return found.wrong or ("every input gives the same output" if found.constant and not kind.constant else "")


def _output(layer: nn.Module, given: Tensor, axis: int) -> Tensor:
    """The layer with its hooks on `given` [rows, length, d_in]: [rows, length, d_model].

    The layer is called with its features on `axis`. A hook that reads a stored input reads this one; of a tuple the only
    tensor is returned.
    """
    x = given.reshape(*given.shape[:-1], *[1] * max(0, axis - 2), given.shape[-1]).movedim(-1, axis)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, UseStoredInput):
            hook.slot.x = x
    out: Tensor = next(leaf for leaf in tree_leaves(layer(x)) if isinstance(leaf, Tensor))
    return out.movedim(axis, -1).reshape(*given.shape[:-1], -1)
