"""ONNX files with one memory operator, and calls of them on tensors without copies, for the CPU and GPU benchmarks.

Flow: operator and types → a file with the node and its function → inputs and outputs bound to a session by address.
`Operators` does this on the device of `onnx_cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, RunOptions

Op = Literal["SparseLookup", "ProductKeyTopk"]
OPS: tuple[Op, ...] = get_args(Op)
Inputs = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
OPSET, IR = 20, 9
# ONNX's integers for element types.
ELEMENTS = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


def missing(*packages: str) -> str | None:
    """Which of onnx, onnxruntime and `packages` is not installed, and what to try; None if all are installed."""
    for name in ("onnx", "onnxruntime", *packages):
        if find_spec(name) is None:
            return f"{name} is not installed\n  try: pip install 'memrewrite[onnx-cpu]' (for CUDA: 'memrewrite[onnx-gpu]')"
    return None


def operator_file(folder: Path, op: Op, inputs: Inputs, held: tuple[str, ...] = (), **attributes: int) -> Path:
    """A file with one node of `op` and its function, for inputs with these names, types and numbers of axes.

    Inputs named in `held` are stored in the file as initializers, like the table of an exported model.
    """
    import onnx
    from onnx import helper

    from memrewrite.kernels.onnx_functions import DOMAIN, VERSION, functions

    results = outputs_of(op, inputs, attributes.get("k", 0))
    node = helper.make_node(op, list(inputs), list(results), domain=DOMAIN, **attributes)

    def ports(values: Inputs) -> list[Any]:
        return [helper.make_tensor_value_info(name, ELEMENTS[x.dtype], [None] * x.ndim) for name, x in values.items()]

    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    bodies = [function for function in functions(OPSET) if function.name == op]
    weights = [
        helper.make_tensor(name, ELEMENTS[x.dtype], x.shape, x.contiguous().view(torch.uint8).numpy().tobytes(), raw=True)
        for name, x in inputs.items()
        if name in held
    ]
    given = {name: x for name, x in inputs.items() if name not in held}
    graph = helper.make_graph([node], op, ports(given), ports(results), initializer=weights)
    model = helper.make_model(graph, functions=bodies, opset_imports=opsets, ir_version=IR)
    kinds = [str(x.dtype).removeprefix("torch.") for x in inputs.values()]
    path = folder / f"{'-'.join([op, *kinds, *(f'{name}{value}' for name, value in attributes.items())])}.onnx"
    onnx.save(model, path)
    return path


def outputs_of(op: Op, inputs: Inputs, k: int = 0) -> dict[str, Tensor]:
    """Output tensors by name, filled with NaN or -1, so that elements which a kernel does not write are detected."""
    first = next(iter(inputs.values()))
    if op == "SparseLookup":
        return {"y": first.new_full((inputs["indices"].shape[0], first.shape[1]), torch.nan)}
    shape = (*first.shape[:-1], k)
    indices = first.new_full(shape, -1, dtype=torch.int64)
    return {"scores": first.new_full(shape, torch.nan, dtype=torch.float32), "indices": indices}


def bound(session: InferenceSession, inputs: Inputs, outputs: Inputs, options: RunOptions | None = None) -> Call:
    """A call of `session` that reads `inputs` and writes `outputs` (contiguous, on the session's device) without a copy."""
    binding = session.io_binding()
    for values, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
        for name, x in values.items():
            bind(name, x.device.type, x.device.index or 0, ELEMENTS[x.dtype], list(x.shape), x.data_ptr())
    kept = dict(inputs)  # keeps the inputs alive: the session has only their addresses

    def call() -> Outputs:
        assert kept
        session.run_with_iobinding(binding, options)
        return tuple(outputs.values())

    return call


class Operators:
    """Sessions for files with one operator on the device under test; counts the calls of the native kernels."""

    def __init__(self, rehearse: bool, library: Path, folder: Path) -> None:
        from memrewrite.passes.onnx.session import CPU, CUDA

        self.library, self.folder, self.provider = library, folder, CPU if rehearse else CUDA
        self.options = {} if rehearse else {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
        self.sessions: dict[str, Any] = {}
        self.calls: dict[str, int] = dict.fromkeys(OPS, 0)

    def call(self, route: str, op: Op, inputs: Inputs, **attributes: int) -> Call:
        """A call by `route` ("native", "standard"), queued on torch's stream like torch's own operators."""
        import onnxruntime

        path = operator_file(self.folder, op, inputs, **attributes)
        key = f"{route} {path.name}"
        if key not in self.sessions:
            self.sessions[key] = self._session(path, route)
        settings = onnxruntime.RunOptions()
        settings.add_run_config_entry("disable_synchronize_execution_providers", "1")
        run = bound(self.sessions[key], inputs, outputs_of(op, inputs, attributes.get("k", 0)), settings)

        def counted() -> Outputs:
            self.calls[op] += 1
            return run()

        return counted if route == "native" else run

    def _session(self, path: Path, route: Any) -> Any:
        from memrewrite.passes.onnx.session import onnx_session

        session = onnx_session(path, [(self.provider, self.options)], op=route, library=self.library)
        assert session.get_providers()[0] == self.provider
        return session

    def counters(self) -> dict[str, int]:
        """The library's number of calls on the provider so far, by operator."""
        from memrewrite.passes.onnx.session import calls_of

        return {op: calls_of(self.library, op, self.provider) for op in OPS}
