"""The *gradient* check: no layer is cut off from the outputs, and every new parameter can be trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.kernels.pending import Pending
from memrewrite.layers.pool import Pool
from memrewrite.passes.models.forward import run
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.verify.evidence import Evidence, checked, new_modules, skipped
from memrewrite.report import Check


def gradient(evidence: Evidence) -> Check:
    """Is every layer reached from the model's outputs, and does every new parameter get a finite gradient, not zero?

    Layers that start at zero are opened for this, and shut again.
    """
    if evidence.on_meta:
        return skipped("gradient", "the model is on meta: there are no values to differentiate")
    fresh = {p: name for module in new_modules(evidence) for name, p in module.named_parameters()}
    frozen = {p: p.requires_grad for p in evidence.model.parameters()}
    try:
        for p in frozen:
            p.requires_grad_(p in fresh)
        with opened(evidence), _trial(evidence) as queues:
            unreached, found, idle = _gradients(evidence, list(fresh))
            grads = [_entries(g, queues.get(p)) for p, g in zip(fresh, found, strict=True)]
    finally:
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)
    spared = _parameters_of(evidence, idle)
    pairs = [(p, g) for p, g in zip(fresh, grads, strict=True) if id(p) not in spared]
    bad = [fresh[p] for p, g in pairs if g is None or not g.isfinite().all() or not g.any()]
    if unreached:
        sentence = f"no output depends on {len(unreached)} layers, and some did on their MLPs: {', '.join(unreached[:3])}"
        return checked("gradient", False, len(unreached), sentence)
    if bad:
        return checked("gradient", False, len(bad), f"{len(bad)} new parameters get none: {', '.join(bad[:3])}")
    none = f"; {len(idle)} layers have no token in these inputs, or run where the model keeps no gradients" if idle else ""
    if not pairs:
        return skipped("gradient", f"there is none to look at{none}")
    return checked("gradient", True, len(pairs), f"all {len(pairs)} new parameters get a finite gradient{none}")


def _parameters_of(evidence: Evidence, sites: Collection[str]) -> set[int]:
    """The new parameters that serve these sites alone: those of the layers, and of pools that no other layer reads."""
    read = {s.pool for s in evidence.plan.substitutions if s.site.path not in sites}
    pools = pools_of(evidence.model)
    modules = [layer for path, layer in evidence.layers.items() if path in sites]
    modules += [pools[name] for name in evidence.plan.pools if name not in read]
    return {id(p) for module in modules for p in module.parameters()} if sites else set()


@contextmanager
def _trial(evidence: Evidence) -> Iterator[dict[nn.Parameter, Pending]]:
    """The queues of tables that learn by fused updates, by their values: nothing is updated, and no optimizer is needed."""
    pools = [m for module in new_modules(evidence) for m in module.modules() if isinstance(m, Pool)]
    queues = {pool.values: pool.pending for pool in pools if pool.pending is not None}
    with ExitStack() as stack:
        for queue in queues.values():
            stack.enter_context(queue.tried())
        yield queues


def _entries(grad: Tensor | None, queue: Pending | None) -> Tensor | None:
    """What is finite, and not all zeros, where a gradient is: itself, a sparse one's rows, or a fused one's sizes."""
    if queue is None:
        return grad._values() if grad is not None and grad.is_sparse else grad
    shares = [(f.weights * f.grad.norm(dim=-1, keepdim=True)).flatten() for f in queue.take()]
    return torch.cat(shares) if shares else None


@contextmanager
def opened(evidence: Evidence) -> Iterator[None]:
    """Layers that start at zero say something inside, and are shut again."""
    fresh = [p for module in new_modules(evidence) for p in module.parameters()]
    shut = [p for p in fresh if p.ndim >= 2 and not p.detach().any()]
    try:
        for p in shut:
            nn.init.normal_(p, 0.0, 0.02, generator=torch.Generator(p.device).manual_seed(0))
        yield
    finally:
        for p in shut:
            nn.init.zeros_(p)


def _gradients(
    evidence: Evidence, parameters: list[nn.Parameter]
) -> tuple[list[str], tuple[Tensor | None, ...], frozenset[str]]:
    """Sites whose layers no output depends on any more; the gradient of the layers' outputs, in a random direction.

    And sites whose layers can get none: no token came to them, or the model itself runs them without gradients.
    """
    made: dict[str, list[Tensor]] = {path: [] for path in evidence.layers}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, path=path: made[path].append(out), prepend=True)
        for path, layer in evidence.layers.items()
    ]
    try:
        outputs = run(evidence.model, evidence.before.inputs, gradients=True)
    finally:
        for hook in hooks:
            hook.remove()
    flat = [(path, out) for path, outs in made.items() for out in outs]
    reach = _reach(outputs, [out for _, out in flat])
    now = {path for (path, _), grad in zip(flat, reach, strict=True) if grad is not None}
    live = [out for _, out in flat if out.requires_grad]
    none = (None,) * len(parameters)
    grads = torch.autograd.grad(_in_a_direction(live), parameters, allow_unused=True) if live else none
    silent = {path for path, outs in made.items() if outs and not any(out.requires_grad for out in outs)} - evidence.reached
    empty = {path for path, outs in made.items() if outs and not any(out.numel() for out in outs)}
    return sorted(evidence.reached - now), grads, frozenset(silent | empty)


def _reach(outputs: Any, inner: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of the outputs for each inner value; None where they do not depend on it."""
    ends = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    live = [t for t in inner if t.requires_grad]
    grads: dict[int, Tensor | None] = {}
    if ends and live:
        found = torch.autograd.grad(_in_a_direction(ends), live, allow_unused=True, retain_graph=True)
        grads = {id(t): grad for t, grad in zip(live, found, strict=True)}
    return tuple(grads.get(id(t)) for t in inner)


def _in_a_direction(tensors: list[Tensor]) -> Tensor:
    """A random weighted sum: a plain one is constant behind a softmax or a norm, and its gradient would vanish."""
    generator = torch.Generator().manual_seed(0)
    terms = [(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors]
    return torch.stack(terms).sum()


def reached(outputs: Any, wrapped: Mapping[str, OriginalMLP]) -> frozenset[str]:
    """The sites that the original model's outputs depend on differentiably: a quantiser cuts off what is before it."""
    made = [(path, leaf) for path, original in wrapped.items() for leaf in original.outputs]
    grads = _reach(outputs, [leaf for _, leaf in made])
    return frozenset(path for (path, _), grad in zip(made, grads, strict=True) if grad is not None)
