"""The *gradient* check: the outputs depend on every layer, and every new parameter can be trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.errors import ModelError, in_one_line
from memrewrite.kernels.pending import Pending
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.value_table import Table
from memrewrite.passes.models.forward import run
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.verify.evidence import RewrittenModel, checked, skipped
from memrewrite.report import Check

ROWS = 4096  # of a table that are searched at once for a value that is not zero: a table may have a billion values


def gradient(after: RewrittenModel) -> Check:
    """Do the outputs depend on every layer, and does every new parameter get a finite gradient that is not all zeros?

    Zero-initialized matrices of layers are set to small random values for this check, and to zero after it. A layer whose
    output is constant by its kind need not be reached. Of a table the gradient of the rows that were read is computed, in place
    of one of its whole size: it is zero elsewhere.
    """
    if after.on_meta:
        return skipped("gradient", "the model is on meta: there are no values to differentiate")
    new = {p: name for module in after.new_modules() for name, p in module.named_parameters()}
    required = {p: p.requires_grad for p in new}
    try:
        for p in required:
            p.requires_grad_()
        with nonzero_layers(after), _gradients_of_rows(after) as queues:
            unreached, found, idle, read = _gradients(after, list(new))
            grads = [_entries(g, queues.get(p)) for p, g in zip(new, found, strict=True)]
    finally:
        for p, before in required.items():
            p.requires_grad_(before)
    exempt = _parameters_of(after, idle)
    pairs = [(p, g) for p, g in zip(new, grads, strict=True) if id(p) not in exempt]
    bad = [new[p] for p, g in pairs if g is None or not g.isfinite().all() or not g.any()]
    if unreached:
        sentence = f"no output depends on {len(unreached)} layers, and some did on their MLPs: {', '.join(unreached[:3])}"
        return checked("gradient", False, len(unreached), sentence)
    if bad:
        cause, hint = _cause(read)
        return checked("gradient", False, len(bad), f"{len(bad)} new parameters get none: {', '.join(bad[:3])}{cause}", hint)
    note = f"; {len(idle)} layers get no token from these inputs, or run where the model keeps no gradients" if idle else ""
    if not new:
        return checked("gradient", True, 0, "the new layers have no parameters to train")
    if not pairs:
        return skipped("gradient", f"no new parameter can be checked{note}")
    return checked("gradient", True, len(pairs), f"all {len(pairs)} new parameters get a finite gradient{note}")


def _parameters_of(after: RewrittenModel, sites: Collection[str]) -> set[int]:
    """Ids of the new parameters that only these sites use: those of their layers, and of pools that no other layer reads."""
    read = {s.pool for s in after.plan.substitutions if s.site.path not in sites}
    pools = pools_of(after.model)
    modules = [layer for path, layer in after.layers.items() if path in sites]
    modules += [pools[name] for name in after.plan.pools if name not in read]
    return {id(p) for module in modules for p in module.parameters()} if sites else set()


@contextmanager
def _gradients_of_rows(after: RewrittenModel) -> Iterator[dict[nn.Parameter, Pending]]:
    """Inside, no table gets a dense gradient: it is row-sparse, or its factors are in a queue.

    Tables of float16 are an exception: torch cannot add their row-sparse gradients on the CPU. Yields the queues of tables with
    fused updates, by their values; inside, they need no optimizer and update nothing.
    """
    tables = [m for module in after.new_modules() for m in module.modules() if isinstance(m, Table)]
    queues = {table.values: table.pending for table in tables if table.pending is not None}
    with ExitStack() as stack:
        for queue in queues.values():
            stack.enter_context(queue.tried())
        for table in tables:
            if table.gradient == "dense" and table.values.dtype != torch.float16:
                stack.callback(setattr, table, "gradient", "dense")
                table.gradient = "sparse"
        yield queues


def _entries(grad: Tensor | None, queue: Pending | None) -> Tensor | None:
    """What must be finite and not all zeros: a dense gradient, the rows of a sparse one, or the sizes of fused updates."""
    if queue is None:
        return grad.coalesce().values() if grad is not None and grad.is_sparse else grad
    shares = [(f.weights * f.grad.norm(dim=-1, keepdim=True)).flatten() for f in queue.take()]
    return torch.cat(shares) if shares else None


@contextmanager
def nonzero_layers(after: RewrittenModel) -> Iterator[None]:
    """Zero-initialized matrices of new layers get small random values inside, and are zeroed on exit."""
    new = [p for module in after.new_modules() for p in module.parameters()]
    zeros = [p for p in new if p.ndim >= 2 and not any(rows.any() for rows in torch.split(p.detach(), ROWS))]
    try:
        for p in zeros:
            nn.init.normal_(p, 0.0, 0.02, generator=torch.Generator(p.device).manual_seed(0))
        yield
    finally:
        for p in zeros:
            nn.init.zeros_(p)


def _gradients(
    after: RewrittenModel, parameters: list[nn.Parameter]
) -> tuple[list[str], tuple[Tensor | None, ...], frozenset[str], dict[str, list[Tensor]]]:
    """Runs the model once with gradients.

    Returns the sites that outputs depended on before and do not depend on now; the parameters' gradients of the layers'
    outputs in a random direction; the sites whose layers cannot have gradients, because no token is routed to them or
    because the model runs them without gradients; and what each layer read and returned, by site.
    """
    with _recording(after) as (inputs_of, outputs_of):
        outputs = run(after.model, after.inputs, gradients=True)
    flat = [(path, out) for path, outs in outputs_of.items() for out in outs]
    reach = _gradients_at(outputs, [out for _, out in flat])
    now = {path for (path, _), grad in zip(flat, reach, strict=True) if grad is not None}
    live = [out for _, out in flat if out.requires_grad]
    none = (None,) * len(parameters)
    grads = torch.autograd.grad(_random_sum(live), parameters, allow_unused=True) if live and parameters else none
    without = {path for path, outs in outputs_of.items() if outs and not any(out.requires_grad for out in outs)} - after.reached
    empty = {path for path, outs in outputs_of.items() if outs and not any(out.numel() for out in outs)}
    constant = {path for path, layer in after.layers.items() if isinstance(layer, MemoryLayer) and layer.constant}
    return sorted(after.reached - now - constant), grads, frozenset(without | empty), inputs_of


@contextmanager
def _recording(after: RewrittenModel) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Inside, what each layer reads and returns is recorded, by site."""
    read: dict[str, list[Tensor]] = {path: [] for path in after.layers}
    returned: dict[str, list[Tensor]] = {path: [] for path in after.layers}

    def record(path: str, args: tuple[Any, ...], out: Tensor) -> None:
        read[path] += [arg.detach() for arg in args[:1]]
        returned[path].append(out)

    hooks = [
        layer.register_forward_hook(lambda _, args, out, path=path: record(path, args, out), prepend=True)
        for path, layer in after.layers.items()
    ]
    try:
        yield read, returned
    finally:
        for hook in hooks:
            hook.remove()


def _cause(read: Mapping[str, list[Tensor]]) -> tuple[str, str]:
    """Why parameters have no gradient, by what their layers read; and what to try. Empty if the model is not the cause."""
    for path, inputs in read.items():
        bad = sum(int((~x.isfinite()).sum()) for x in inputs)
        if bad:
            cause = f"; the model itself computes {bad} values that are not finite as the input of the MLP {path!r}"
            return cause, "run the original model with these inputs: its weights, its dtype or the inputs give NaN or infinity"
    for path, inputs in read.items():
        if inputs and not any(x.any() for x in inputs):
            return f"; with these inputs the input of the MLP {path!r} is all zeros", "give other example inputs"
    return "", ""


def not_finite(after: RewrittenModel) -> tuple[str, str]:
    """Where a layer's input or output is not finite, and what to try; both empty if nothing is."""
    with _recording(after) as (read, returned):
        run(after.model, after.inputs)
    cause, hint = _cause({path: inputs for path, inputs in read.items() if not all(bool(x.isfinite().all()) for x in inputs)})
    path = next((path for path, outs in returned.items() if not all(bool(out.isfinite().all()) for out in outs)), None)
    if cause or path is None:
        return cause, hint
    return f"; the layer at {path!r} returns values that are not finite", "convert the model to bfloat16 or float32"


def _gradients_at(outputs: Any, inner: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of the outputs with respect to each inner value; None where they do not depend on it."""
    ends = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    live = [t for t in inner if t.requires_grad]
    grads: dict[int, Tensor | None] = {}
    if ends and live:
        try:
            found = torch.autograd.grad(_random_sum(ends), live, allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            what = f"the model's outputs cannot be differentiated: {in_one_line(error)}"
            raise ModelError(what, hint="does its forward mutate a tensor that its gradient needs?") from error
        grads = {id(t): grad for t, grad in zip(live, found, strict=True)}
    return tuple(grads.get(id(t)) for t in inner)


def _random_sum(tensors: list[Tensor]) -> Tensor:
    """A sum with random weights: after a softmax or a norm a plain sum is constant, and its gradient is zero."""
    generator = torch.Generator().manual_seed(0)
    terms = [(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors]
    return torch.stack(terms).sum()


def reached(outputs: Any, wrapped: Mapping[str, OriginalMLP]) -> frozenset[str]:
    """The sites that the original's outputs depend on differentiably: a quantizer, for example, stops gradients."""
    pairs = [(path, leaf) for path, original in wrapped.items() for leaf in original.outputs]
    grads = _gradients_at(outputs, [leaf for _, leaf in pairs])
    return frozenset(path for (path, _), grad in zip(pairs, grads, strict=True) if grad is not None)
