"""The *tokenwise* check: every new layer keeps tokens apart, with whatever hangs on it. Tried on values, as *locality* is.

*frame* takes a layer and its hooks as one box, and does not look inside: this does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.passes.locate.token_trial import Tokens
from memrewrite.passes.models.forward import SEED
from memrewrite.passes.rewrite.hooks import UseStoredInput
from memrewrite.passes.verify.evidence import Evidence, checked, skipped
from memrewrite.passes.verify.gradient_flow import opened
from memrewrite.passes.verify.mlp_locality import outcome_of
from memrewrite.plans import Substitution
from memrewrite.report import Check

ROWS, LENGTH = 2, 4  # the tokens tried


def tokenwise(evidence: Evidence) -> Check:
    """Does a token's output of every layer depend on that token, and on no other?"""
    if evidence.on_meta:
        return skipped("tokenwise", "the model is on meta: there are no values to change")
    with opened(evidence):
        for substitution in evidence.plan.substitutions:
            path = substitution.site.path
            wrong = _wrong(evidence.layers[path], substitution)
            if wrong:
                return checked("tokenwise", False, 0, f"in the layer at {path!r} {wrong}")
    count = len(evidence.layers)
    return checked("tokenwise", True, count, f"one token changed, every other keeps every bit in all {count} layers")


def _wrong(layer: nn.Module, substitution: Substitution) -> str:
    site = substitution.site
    like = next(layer.parameters())
    generator = torch.Generator().manual_seed(SEED)
    shape = (ROWS, LENGTH, site.d_in)
    x, other = (torch.randn(shape, generator=generator).to(like.device, getattr(torch, site.dtype)) for _ in range(2))
    tokens = ROWS * LENGTH
    into, out = (Tokens.consecutive(tokens * width, tokens, ROWS) for width in (site.d_in, site.d_model))
    found = outcome_of(lambda given: _called(layer, given, site.axis), x, other, into, out, 0.0)
    return found.wrong or ("every input gives the same output" if found.constant else "")


def _called(layer: nn.Module, given: Tensor, axis: int) -> Tensor:
    """What a layer gives with its hooks; one that is handed its input is handed this one, and of a tuple it gives an item.

    Features are last here; the layer is given them, and gives them, on `axis`.
    """
    x = given.reshape(*given.shape[:-1], *[1] * max(0, axis - 2), given.shape[-1]).movedim(-1, axis)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, UseStoredInput):
            hook.hand.x = x
    out: Tensor = next(leaf for leaf in tree_leaves(layer(x)) if isinstance(leaf, Tensor))
    return out.movedim(axis, -1).reshape(*given.shape[:-1], -1)
