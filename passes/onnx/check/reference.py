"""PyTorch's side of a comparison: the model in the form that was exported, called with inputs as the file names them.

Flow: the model prepared as for export → its example inputs, each tensor under the name it has in the file → calls with other
values in their places. Rounding may have a top-k choose otherwise where two sums are nearly equal: a call can be told which
slots the file chose, reads these, and says whether every one was as good a choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from memrewrite.kernels import ops  # noqa: F401 - registers the operators
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs, run
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.onnx.check.slot_choices import Choices
from memrewrite.passes.onnx.names import dotted
from memrewrite.passes.onnx.prepare import Float, prepared


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
        self._kept = StateGuard(self.model)  # a model may count its calls
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
