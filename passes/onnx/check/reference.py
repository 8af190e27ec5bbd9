"""PyTorch's side of a comparison: the model in the form in which it was exported, called with inputs named as in the file.

Flow: prepare the model as for export → name its example inputs as in the file → call it with other values for them. Due to
rounding, a top-k may choose another slot if two sums are nearly equal. A call can therefore force the slots that the file
chose; it then reads these slots, and reports whether each of them was as good a choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from memrewrite.kernels import ops  # noqa: F401 - registers the operators
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs, run
from memrewrite.passes.onnx.check.slot_choices import Choices
from memrewrite.passes.onnx.names import argument_names, input_name
from memrewrite.passes.onnx.prepare import Float, prepared


class Reference:
    """The model that a file was exported from.

    `example` maps the names of the file's inputs to the example inputs. If `inputs` is None these are generated, and those that
    are not among `input_names` are dropped. `elements` has the values from which other inputs are sampled.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        inputs: Any,
        dtype: Float | None,
        input_names: Collection[str],
        *,
        with_past: bool,
    ) -> None:
        ready = prepared(model, inputs, dtype, with_past=with_past)
        args, kwargs = ready.inputs
        if inputs is None:
            kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor) or name in input_names}
        leaves, self._spec = tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in leaves]
        positional = argument_names(ready.model, args)
        self._names = [input_name(path, positional) for path, _ in leaves]
        self.model = ready.model.module(check_guards=False) if isinstance(ready.model, ExportedProgram) else ready.model
        tensors = zip(self._names, self._leaves, strict=True)
        self.example: Mapping[str, Tensor] = {name: leaf for name, leaf in tensors if isinstance(leaf, Tensor)}
        generated = example_inputs(model)[1] if with_past else {}  # more token ids than the 3 of the example
        self.elements = {name: generated.get(name, value) for name, value in self.example.items()}

    def __call__(
        self, feeds: Mapping[str, Tensor], forced: Sequence[Tensor] | None = None, tolerance: float = 0.0
    ) -> tuple[list[Tensor], Choices]:
        """Every tensor output, in order, and the chosen slots. If `forced` has slots of every top-k, those are read instead."""
        leaves = [
            feeds[name].to(leaf.device) if isinstance(leaf, Tensor) else leaf
            for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        inputs: Inputs = tree_unflatten(leaves, self._spec)
        with Choices(forced, tolerance) as choices:
            outputs = run(self.model, inputs)
        return [leaf.detach().cpu() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)], choices
