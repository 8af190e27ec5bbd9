"""PyTorch's side of a comparison: the model in the form that was exported, called with inputs as the file names them.

Flow: the model prepared as for export → its example inputs, each tensor under the name it has in the file → calls with other
values in their places. Rounding may have a top-k choose otherwise where two sums are nearly equal: a call can be told which
slots the file chose, reads these, and says whether every one was as good a choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from memrewrite.errors import in_a_line
from memrewrite.kernels import ops  # noqa: F401 - registers the operators
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs, run
from memrewrite.passes.models.state_guard import Kept
from memrewrite.passes.onnx.names import dotted
from memrewrite.passes.onnx.prepare import Float, prepared
from memrewrite.site import Frozen

TOPK = torch.ops.memrewrite.product_key_topk.default
ARGUMENTS = tuple(argument.name for argument in TOPK._schema.arguments)
ULPS = 16  # of the sums: keys that are all the same are told apart by rounding alone


class Reference:
    """The model that a file was exported from.

    `example` holds its example inputs by their names in the file; of inputs that were not given but made, only those
    `taken` by the file. `elements` is what other values are taken from.
    """

    def __init__(
        self, model: nn.Module | ExportedProgram, inputs: Any, dtype: Float | None, taken: Collection[str], *, with_past: bool
    ) -> None:
        ready = prepared(model, inputs, dtype, with_past=with_past)
        args, kwargs = ready.inputs
        if inputs is None:
            kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor) or name in taken}
        leaves, self._spec = tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in leaves]
        self._names = _names([path for path, _ in leaves], _argument_names(ready.model, args))
        self.model = ready.model.module(check_guards=False) if isinstance(ready.model, ExportedProgram) else ready.model
        self._kept = Kept(self.model)  # a model may count its calls
        tensors = zip(self._names, self._leaves, strict=True)
        self.example: Mapping[str, Tensor] = {name: leaf for name, leaf in tensors if isinstance(leaf, Tensor)}
        made = example_inputs(model)[1] if with_past else {}  # ids from the whole vocabulary, not the few of the example
        self.elements = {name: made.get(name, value) for name, value in self.example.items()}

    def __call__(
        self, feeds: Mapping[str, Tensor], other: Sequence[Tensor] | None = None, tolerance: float = 0.0
    ) -> tuple[list[Tensor], Choices]:
        """Every output that is a tensor, in order, and what was chosen; with the slots of `other`, these are read."""
        leaves = [
            feeds[name].to(leaf.device) if isinstance(leaf, Tensor) else leaf
            for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        inputs: Inputs = tree_unflatten(leaves, self._spec)
        with Choices(other, tolerance) as choices, self._kept.forwards():
            outputs = run(self.model, inputs)
        return [leaf.detach().cpu() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)], choices


def _names(paths: Sequence[Any], roots: Sequence[str]) -> list[str]:
    """What a file calls the leaves of `(args, kwargs)`: a path begins with 0, positional, or 1, by keyword."""
    return [dotted([roots[first.idx] if kind.idx == 0 else first.key, *rest]) for kind, first, *rest in paths]


def _argument_names(model: nn.Module | ExportedProgram, args: Sequence[Any]) -> list[str]:
    """What the forward calls its positional arguments, as `torch.export` does: those of `*args` by their places."""
    if isinstance(model, ExportedProgram):
        return list(model.module_call_graph[0].signature.forward_arg_names or ())
    signature, names = inspect.signature(model.forward), list[str]()
    for name, value in signature.bind_partial(*args).arguments.items():
        many = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}_{place}" for place in range(len(value))] if many else [name]
    return names


class Ties(Frozen):
    """Rows of slots (one a token and head) which file and torch chose.

    `differing` of `rows` are not the same sets. `gap` is the most that a slot's sum lies below torch's k-th best, in parts
    of what counts as equal: up to 1 it does. `wrong` rows are no choice of k slots as good as torch's.
    """

    rows: int = 0
    differing: int = 0
    gap: float = 0.0
    wrong: int = 0

    def __add__(self, other: Ties) -> Ties:
        return Ties(
            rows=self.rows + other.rows,
            differing=self.differing + other.differing,
            gap=max(self.gap, other.gap),
            wrong=self.wrong + other.wrong,
        )


class Choices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes the slots that torch's top-ks choose, in order; given the slots of `other`, has them read.

    Rows in which both chose one set of slots stay torch's to the last bit. `tolerance` is relative to the spread of a
    row's sums.
    """

    def __init__(self, other: Sequence[Tensor] | None = None, tolerance: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.other, self.tolerance = other, tolerance
        self.slots: list[Tensor] = []
        self.ties = Ties()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not TOPK:
            return out
        scores, slots = out
        self.slots.append(slots.cpu())
        if self.other is None:
            return out
        given = dict(zip(ARGUMENTS, args, strict=False)) | dict(kwargs or {})
        theirs = self.other[len(self.slots) - 1].to(slots.device)
        sums, differs, ties = _judged(given["scores1"], given["scores2"], slots, theirs, self.tolerance)
        self.ties += ties
        forced = sums.softmax(-1) if given.get("softmax", False) else sums
        return torch.where(differs, forced, scores), torch.where(differs, theirs, slots)


def same_sets(one: Tensor, other: Tensor) -> Tensor:
    """Rows of slots, `[..., k]` twice: in which the same were chosen, in whatever order, `[..., 1]`."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1, keepdim=True)


def _judged(scores1: Tensor, scores2: Tensor, own: Tensor, theirs: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Ties]:
    """The sums at the slots `theirs` `[..., k]`, the rows `[..., 1]` that chose others than `own`, and how good these are.

    A row whose scores are not all numbers has no best ones: it differs in nothing.
    """
    n2, wide = scores2.shape[-1], torch.promote_types(scores1.dtype, torch.float32)
    inside = theirs.clamp(0, scores1.shape[-1] * n2 - 1)

    def sums_at(slots: Tensor) -> Tensor:
        return scores1.gather(-1, slots // n2).to(wide) + scores2.gather(-1, slots % n2).to(wide)  # [..., k]

    sums, last = sums_at(inside), sums_at(own).amin(-1, keepdim=True)
    top = (scores1.amax(-1, keepdim=True) + scores2.amax(-1, keepdim=True)).to(wide)
    bottom = (scores1.amin(-1, keepdim=True) + scores2.amin(-1, keepdim=True)).to(wide)
    rounding = ULPS * torch.finfo(scores1.dtype).eps * torch.maximum(top.abs(), bottom.abs())
    allowed = (tolerance * (top - bottom) + rounding).clamp_min(torch.finfo(wide).tiny)
    differs = ~same_sets(own, theirs) & ~(top + bottom).isnan()
    gap = ((last - sums.amin(-1, keepdim=True)) / allowed).clamp_min(0)
    ordered = theirs.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1, keepdim=True)
    wrong = differs & (~(gap <= 1) | twice | (theirs != inside).any(-1, keepdim=True))
    largest = float(gap[differs].max()) if differs.any() else 0.0
    return sums, differs, Ties(rows=differs.numel(), differing=int(differs.sum()), gap=largest, wrong=int(wrong.sum()))


def reason(error: Exception) -> str:
    """An error of torch or a runtime, its kind first."""
    return f"{type(error).__name__}: {in_a_line(error)}"
