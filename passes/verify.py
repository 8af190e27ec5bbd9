"""Proof that a rewrite did what the plan says and nothing else: named checks, each with an outcome, a number, a sentence.

Flow: before editing, fingerprints of every tensor and the *null* check (the plan with the original MLPs wrapped); after it,
*coverage*, *untouched*, *frame*, *sharing*, *gradient*, and *identity* where every layer stands beside its MLP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.errors import CaptureError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.passes import frame as frames
from memrewrite.passes.capture import Capture, recapture
from memrewrite.passes.extract import Original
from memrewrite.passes.locate import Locations
from memrewrite.passes.recording import on_meta, run
from memrewrite.passes.substitute import Edit, place, pools_of
from memrewrite.plans import Plan, Substitution
from memrewrite.report import Check


@dataclass
class Evidence:
    """What the checks look at. `before` and `fingerprints` are from before the edit."""

    model: nn.Module
    plan: Plan
    before: Capture
    locations: Locations
    fingerprints: Mapping[str, Fingerprint]
    reached: frozenset[str] = frozenset()  # sites that outputs depended on differentiably before
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # by site path, as built

    @property
    def on_meta(self) -> bool:
        """No values to compare: the model is on `meta`."""
        return on_meta(self.model)


class Fingerprint(NamedTuple):
    """A hash of one tensor, and its first name: a tied tensor has several."""

    bits: str
    first: str


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """A hash of every parameter and buffer, bit by bit, and of its kind; of that alone on `meta`."""
    return _hashed(tensors_of(model))


def _hashed(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Fingerprint]:
    """A tensor with several names is read once."""
    known: dict[int, Fingerprint] = {}
    for name, tensor in (named := list(tensors)):
        if id(tensor) not in known:
            known[id(tensor)] = Fingerprint(_hash(tensor), name)
    return {name: known[id(tensor)] for name, tensor in named}


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, by each of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _hash(tensor: Tensor) -> str:
    kind = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.requires_grad}"
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    if not tensor.is_meta and tensor.numel():
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_with_originals(evidence: Evidence, *, gradients: bool = False) -> tuple[Any, dict[str, Original]]:
    """The live model's outputs with every selected MLP lifted out and put in the layer's way, and these wrapped MLPs.

    Leaves the model as it was.
    """
    edit = Edit()
    wrapped: dict[str, Original] = {}
    try:
        for substitution in evidence.plan.substitutions:
            path = substitution.site.path
            wrapped[path] = Original(evidence.model, evidence.locations.found[path])
            place(evidence.model, substitution.site, wrapped[path], "replace", edit)
        return run(evidence.model, evidence.before.inputs, gradients=gradients), wrapped
    finally:
        edit.revert()


def null(evidence: Evidence, outputs: Any) -> Check:
    """With the original MLPs wrapped in the layers' places: does every output keep every bit?"""
    different = differing(evidence.before.outputs, outputs)
    sentence = "with the original MLPs in the layers' places, outputs are bit-equal"
    if different:
        sentence = f"with the original MLPs in the layers' places, {different} output elements differ"
    return _check("null", different == 0, different, sentence)


def reached(outputs: Any, wrapped: Mapping[str, Original]) -> frozenset[str]:
    """The sites that the original model's outputs depend on differentiably: a quantiser cuts off what is before it."""
    made = [(path, leaf) for path, original in wrapped.items() for leaf in original.outputs]
    grads = _reach(outputs, [leaf for _, leaf in made])
    return frozenset(path for (path, _), grad in zip(made, grads, strict=True) if grad is not None)


def differing(one: Any, other: Any) -> int:
    """Elements in which two outputs differ, NaN equal to NaN; outputs of another structure differ in all."""
    a, b = ([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] for out in (one, other))
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return max(1, sum(t.numel() for t in b))
    return sum(int((~((x == y) | ((x != x) & (y != y)))).sum()) for x, y in zip(a, b, strict=True))


def coverage(evidence: Evidence) -> Check:
    """Is every layer called as often as its MLP was, with its width?"""
    if evidence.on_meta:
        return skipped("coverage", "the model is on meta: it cannot run")
    seen: dict[str, list[int]] = {s.site.path: [] for s in evidence.plan.substitutions}
    handles = [
        evidence.layers[path].register_forward_pre_hook(lambda _, args, widths=widths: widths.append(args[0].shape[-1]))
        for path, widths in seen.items()
    ]
    try:
        run(evidence.model, evidence.before.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for substitution in evidence.plan.substitutions:
        site = substitution.site
        if seen[site.path] != [site.d_in] * site.calls:
            sentence = f"the layer at {site.path!r} ran {len(seen[site.path])} times, its MLP {site.calls} times"
            return _check("coverage", False, len(seen[site.path]), sentence)
    return _check("coverage", True, len(seen), f"{len(seen)} of {len(seen)} layers run as often as their MLPs did")


def untouched(evidence: Evidence) -> Check:
    """Are all tensors that were there before, and should still be, there with the same bits, and the replaced ones gone?"""
    new = {id(t) for module in _new_modules(evidence) for _, t in tensors_of(module)}
    now = _hashed((name, tensor) for name, tensor in tensors_of(evidence.model) if id(tensor) not in new)
    before = evidence.fingerprints
    sites = [s.site for s in evidence.plan.substitutions if s.placement == "replace"]
    replaced = {name for site in sites for name in site.parameters}
    firsts = {before[n].first for n in replaced & set(before)}  # a module reached by several names goes with all of them
    gone = {n for n in set(before) - set(now) if before[n].first not in firsts}
    stray = set(now) - set(before)
    changed = {name for name in now if name in before and now[name].bits != before[name].bits}
    modules = tuple(f"{path}." for site in sites for path in site.modules)
    left = {name for name in replaced & set(now) if name.startswith(modules)}  # others are used outside the MLP too
    for what, names in (("vanished", gone), ("appeared", stray), ("changed", changed), ("should be gone", left)):
        if names:
            return _check("untouched", False, len(names), f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}")
    return _check("untouched", True, len(now), f"all {len(now)} other tensors are bit-identical")


def _new_modules(evidence: Evidence) -> list[nn.Module]:
    return [pools_of(evidence.model), *evidence.layers.values()]


def frame(evidence: Evidence) -> Check:
    """Is the graph outside the sites the same graph?"""
    by_layer = {id(evidence.layers[s.site.path]): s for s in evidence.plan.substitutions}
    modules = evidence.model.named_modules(remove_duplicate=False)
    layers: dict[str, Substitution] = {path: by_layer[id(m)] for path, m in modules if id(m) in by_layer}
    compared = 0
    try:
        for segment in evidence.before.segments:
            inside = {p: s for p, s in layers.items() if not segment.path or f"{p}.".startswith(f"{segment.path}.")}
            after = recapture(evidence.model, segment)
            compared += frames.compare(segment, after, evidence.locations.found, inside)
    except (frames.Differs, CaptureError) as difference:
        return _check("frame", False, compared, str(difference))
    return _check("frame", True, compared, f"{compared} values outside the sites are computed as before")


def sharing(evidence: Evidence) -> Check:
    """Has every pool one name and one storage, and do all its layers read it?"""
    pools, names = pools_of(evidence.model), tensors_of(evidence.model)
    for name in evidence.plan.pools:
        pool = pools[name]
        storage = pool.values.untyped_storage()._cdata
        held = [n for n, t in names if t.untyped_storage()._cdata == storage]
        if held != [f"{evidence.plan.root}.{name}.values"]:
            return _check("sharing", False, len(held), f"pool {name!r} has {len(held)} names: {', '.join(held[:3])}")
        for substitution in evidence.plan.substitutions:
            layer = evidence.layers[substitution.site.path]
            if substitution.pool == name and (not isinstance(layer, MemoryLayer) or layer.pool is not pool):
                return _check("sharing", False, 0, f"the layer at {substitution.site.path!r} reads another table than {name!r}")
    count = len(evidence.plan.pools)
    return _check("sharing", True, count, f"{count} pool(s), each with one name and one storage")


def gradient(evidence: Evidence) -> Check:
    """Is every layer reached from the model's outputs, and does every new parameter get a finite gradient, not zero?

    Layers that start at zero are opened for this, and shut again.
    """
    if evidence.on_meta:
        return skipped("gradient", "the model is on meta: there are no values to differentiate")
    fresh = {p: name for module in _new_modules(evidence) for name, p in module.named_parameters()}
    frozen = {p: p.requires_grad for p in evidence.model.parameters()}
    shut = [p for p in fresh if p.ndim >= 2 and not p.detach().any()]
    try:
        for p in frozen:
            p.requires_grad_(p in fresh)
        for p in shut:
            nn.init.normal_(p, 0.0, 0.02, generator=torch.Generator(p.device).manual_seed(0))
        unreached, grads = _gradients(evidence, list(fresh))
    finally:
        for p in shut:
            nn.init.zeros_(p)
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)
    bad = [fresh[p] for p, g in zip(fresh, grads, strict=True) if g is None or not g.isfinite().all() or not g.any()]
    if unreached:
        sentence = f"no output depends on {len(unreached)} layers, and some did on their MLPs: {', '.join(unreached[:3])}"
        return _check("gradient", False, len(unreached), sentence)
    if bad:
        return _check("gradient", False, len(bad), f"{len(bad)} new parameters get none: {', '.join(bad[:3])}")
    return _check("gradient", True, len(fresh), f"all {len(fresh)} new parameters get a finite gradient")


def _gradients(evidence: Evidence, parameters: list[nn.Parameter]) -> tuple[list[str], tuple[Tensor | None, ...]]:
    """Sites whose layers no output depends on any more; and the gradient of the layers' outputs, in a random direction."""
    made: dict[str, list[Tensor]] = {path: [] for path in evidence.layers}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, path=path: made[path].append(out))
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
    return sorted(evidence.reached - now), grads


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


def identity(evidence: Evidence) -> Check:
    """With every layer beside its MLP and its output at zero: does the model compute what it did, bit for bit?"""
    if any(s.placement != "parallel" for s in evidence.plan.substitutions):
        return skipped("identity", "some MLPs were replaced: the model computes something else now, as asked")
    if evidence.on_meta:
        return skipped("identity", "the model is on meta: there are no values to compare")
    different = differing(evidence.before.outputs, run(evidence.model, evidence.before.inputs))
    sentence = "the rewritten model's outputs are bit-equal to the original's"
    if different:
        sentence = f"{different} output elements of the rewritten model differ from the original's"
    return _check("identity", different == 0, different, sentence)


CHECKS: tuple[Callable[[Evidence], Check], ...] = (coverage, untouched, frame, sharing, gradient, identity)


def verify(evidence: Evidence) -> tuple[Check, ...]:
    """Every check after the edit, in order."""
    return tuple(check(evidence) for check in CHECKS)


def _check(name: str, good: bool, number: float, sentence: str) -> Check:
    return Check(name=name, outcome="passed" if good else "failed", number=number, sentence=sentence)


def skipped(name: str, why: str) -> Check:
    """A check that could not be made, and why."""
    return Check(name=name, outcome="skipped", number=0, sentence=why)
