"""Proof that a rewrite did what the plan says and nothing else: named checks, each with an outcome, a number, a sentence.

Flow: before editing, fingerprints of every tensor, the *null* check (the plan with the original MLPs wrapped), the same in
train mode, and *locality*; after it, *coverage*, *untouched*, *frame*, *sharing*, *tokenwise*, *gradient*, and *identity* where
every layer stands beside its MLP.
"""

from __future__ import annotations

from collections.abc import Callable

from memrewrite.errors import CaptureError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.passes.capture.capture import recapture
from memrewrite.passes.models.fingerprints import differing, hashed
from memrewrite.passes.models.forward import run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.verify import graph_equivalence as frames
from memrewrite.passes.verify.evidence import Evidence, checked, new_modules, skipped
from memrewrite.passes.verify.gradient_flow import gradient
from memrewrite.passes.verify.layer_locality import tokenwise
from memrewrite.plans import Substitution
from memrewrite.report import Check


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
            return checked("coverage", False, len(seen[site.path]), sentence)
    return checked("coverage", True, len(seen), f"{len(seen)} of {len(seen)} layers run as often as their MLPs did")


def untouched(evidence: Evidence) -> Check:
    """Are all tensors that were there before, and should still be, there with the same bits, and the replaced ones gone?"""
    new = {id(t) for module in new_modules(evidence) for _, t in tensors_of(module)}
    now = hashed((name, tensor) for name, tensor in tensors_of(evidence.model) if id(tensor) not in new)
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
            return checked("untouched", False, len(names), f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}")
    return checked("untouched", True, len(now), f"all {len(now)} other tensors are bit-identical")


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
        return checked("frame", False, compared, str(difference))
    return checked("frame", True, compared, f"{compared} values outside the sites are computed as before")


def sharing(evidence: Evidence) -> Check:
    """Has every pool one name and one storage, and do all its layers read it?"""
    pools, names = pools_of(evidence.model), tensors_of(evidence.model)
    for name in evidence.plan.pools:
        pool = pools[name]
        storage = pool.values.untyped_storage()._cdata
        held = [n for n, t in names if t.untyped_storage()._cdata == storage]
        if held != [f"{evidence.plan.root}.{name}.values"]:
            return checked("sharing", False, len(held), f"pool {name!r} has {len(held)} names: {', '.join(held[:3])}")
        for substitution in evidence.plan.substitutions:
            layer = evidence.layers[substitution.site.path]
            if substitution.pool == name and (not isinstance(layer, MemoryLayer) or layer.pool is not pool):
                return checked(
                    "sharing", False, 0, f"the layer at {substitution.site.path!r} reads another table than {name!r}"
                )
    count = len(evidence.plan.pools)
    return checked("sharing", True, count, f"{count} pool(s), each with one name and one storage")


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
    return checked("identity", different == 0, different, sentence)


CHECKS: tuple[Callable[[Evidence], Check], ...] = (coverage, untouched, frame, sharing, tokenwise, gradient, identity)
