"""The checks after an edit: the rewrite did what the plan states and nothing else.

Flow: before the edit, fingerprints of every tensor, the *null* check (the plan with the original MLPs in the layers' places),
the same in train mode, and *locality*; after it, *coverage*, *untouched*, *frame*, *sharing*, *tokenwise*, *gradient*, and
*identity* where every layer is in parallel with its MLP. Each check has an outcome, a number and a sentence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from memrewrite.errors import CaptureError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.value_table import Table
from memrewrite.passes.capture.capture import recapture
from memrewrite.passes.models.fingerprints import differing, hashed
from memrewrite.passes.models.forward import run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.verify.evidence import AfterEdit, RewrittenModel, checked, skipped
from memrewrite.passes.verify.gradient_flow import gradient, not_finite
from memrewrite.passes.verify.graph_equivalence import Differs, compare
from memrewrite.passes.verify.layer_locality import tokenwise
from memrewrite.plans import Substitution
from memrewrite.report import Check

DECIDES = (
    "this model's forward cannot be captured as one graph: if it decides by values it computes which modules it calls, select "
    "MLPs that always run, or add the layer to the MLP (`placement: parallel`)"
)


def coverage(after: RewrittenModel) -> Check:
    """Is every layer called as often as its MLP was, with inputs of the MLP's width?"""
    if after.on_meta:
        return skipped("coverage", "the model is on meta: it cannot run")
    seen: dict[str, list[int]] = {s.site.path: [] for s in after.plan.substitutions}
    handles = [
        after.layers[path].register_forward_pre_hook(lambda _, args, widths=widths: widths.append(args[0].shape[-1]))
        for path, widths in seen.items()
    ]
    try:
        run(after.model, after.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for substitution in after.plan.substitutions:
        site = substitution.site
        calls = site.calls + site.unused_calls
        if seen[site.path] != [site.d_in] * calls:
            sentence = f"the layer at {site.path!r} ran {len(seen[site.path])} times, its MLP {calls} times"
            by_block = isinstance(after, AfterEdit) and not after.capture.is_whole
            return checked("coverage", False, len(seen[site.path]), sentence, DECIDES if by_block else "")
    return checked("coverage", True, len(seen), f"{len(seen)} of {len(seen)} layers run as often as their MLPs did")


def untouched(after: AfterEdit) -> Check:
    """Have all tensors outside of replaced MLPs the same names and bits as before, and are the replaced ones removed?"""
    new = {id(t) for module in after.new_modules() for _, t in tensors_of(module)}
    now = hashed((name, tensor) for name, tensor in tensors_of(after.model) if id(tensor) not in new)
    before = after.fingerprints
    sites = [s.site for s in after.plan.substitutions if s.placement == "replace"]
    replaced = {name for site in sites for name in site.parameters}
    firsts = {before[n].first for n in replaced & set(before)}  # a module with several names is removed under all of them
    gone = {n for n in set(before) - set(now) if before[n].first not in firsts}
    stray = set(now) - set(before)
    changed = {name for name in now if name in before and now[name].bits != before[name].bits}
    modules = tuple(f"{path}." for site in sites for path in site.modules)
    left = {name for name in replaced & set(now) if name.startswith(modules)}  # others are used outside the MLP too
    for what, names in (("vanished", gone), ("appeared", stray), ("changed", changed), ("should be gone", left)):
        if names:
            return checked("untouched", False, len(names), f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}")
    return checked("untouched", True, len(now), f"all {len(now)} other tensors are bit-identical")


def frame(after: AfterEdit) -> Check:
    """Is the graph outside the sites the same graph?"""
    by_layer = {id(after.layers[s.site.path]): s for s in after.plan.substitutions}
    modules = after.model.named_modules(remove_duplicate=False)
    layers: dict[str, Substitution] = {path: by_layer[id(m)] for path, m in modules if id(m) in by_layer}
    compared = 0
    try:
        for segment in after.capture.segments:
            inside = {p: s for p, s in layers.items() if not segment.path or f"{p}.".startswith(f"{segment.path}.")}
            compared += compare(segment, recapture(after.model, segment), after.locations.found, inside)
    except (Differs, CaptureError) as difference:
        return checked("frame", False, compared, str(difference))
    return checked("frame", True, compared, f"{compared} values outside the sites are computed as before")


def sharing(after: RewrittenModel) -> Check:
    """Has every pool one name and one storage, and do all its layers read it?"""
    pools, tensors = pools_of(after.model), tensors_of(after.model)
    for name in after.plan.pools:
        pool = pools[name]
        for path, table in pool.named_modules(prefix=f"{after.plan.pools_path}.{name}"):
            if not isinstance(table, Table):
                continue
            storage = table.values.untyped_storage()._cdata
            names = [n for n, t in tensors if t.layout == torch.strided and t.untyped_storage()._cdata == storage]
            if names != [f"{path}.values"]:
                return checked("sharing", False, len(names), f"pool {name!r} has {len(names)} names: {', '.join(names[:3])}")
        for substitution in after.plan.substitutions:
            layer = after.layers[substitution.site.path]
            if substitution.pool == name and (not isinstance(layer, MemoryLayer) or layer.pool is not pool):
                sentence = f"the layer at {substitution.site.path!r} reads another table than {name!r}"
                return checked("sharing", False, 0, sentence)
    count = len(after.plan.pools)
    return checked("sharing", True, count, f"{count} pool(s), each with one name and one storage")


def identity(after: AfterEdit) -> Check:
    """Are the outputs bit-equal to the original's, where every layer is in parallel with its MLP and starts at zero?"""
    if any(s.placement != "parallel" for s in after.plan.substitutions):
        return skipped("identity", "some MLPs were replaced: the model computes something else now, as the recipe requests")
    if not all(s.init.zero for s in after.plan.substitutions):
        return skipped("identity", "some layers do not start at zero: the model computes something else now, as requested")
    if after.on_meta:
        return skipped("identity", "the model is on meta: there are no values to compare")
    different = differing(after.capture.outputs, run(after.model, after.inputs))
    far = after.capture.distance
    original = "original's" if far is None or far.exact else "exported program's"
    sentence = f"the rewritten model's outputs are bit-equal to the {original}"
    if different:
        sentence = f"{different} output elements of the rewritten model differ from the {original}"
        cause, hint = not_finite(after)
        return checked("identity", False, different, sentence + cause, hint)
    return checked("identity", True, 0, sentence)


CHECKS: tuple[Callable[[AfterEdit], Check], ...] = (coverage, untouched, frame, sharing, tokenwise, gradient, identity)
