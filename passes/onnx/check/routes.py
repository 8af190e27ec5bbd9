"""The file's side of a comparison: its metadata, and one session for every way to run it.

Flow: read the graph without its weights → write a copy that also returns the slots that its top-ks chose → open a session on
it for each route → keep the largest difference of every output.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from memrewrite.errors import ExportError, in_one_line
from memrewrite.frozen import Frozen
from memrewrite.kernels.native_library import built_library
from memrewrite.kernels.onnx_functions import DOMAIN
from memrewrite.passes.onnx.check.input_sets import InputSet
from memrewrite.passes.onnx.check.slot_choices import Ties
from memrewrite.passes.onnx.file import PREFIX, Port
from memrewrite.passes.onnx.graph import SELECTION
from memrewrite.passes.onnx.prepare import Float
from memrewrite.passes.onnx.reading import read_graph
from memrewrite.passes.onnx.session import Provider, first_of, onnx_session, unserved

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto
    from onnxruntime import InferenceSession

RouteName = Literal["standard", "native"]
Tensors = tuple[list[Tensor], list[Tensor]]  # outputs, and the slots of every top-k
HUGE = 1e4  # times the median magnitude: such a value is not computed like the others, but set, for example by a mask
ROUTES: tuple[RouteName, ...] = ("standard", "native")
NOTES = {"dtype": r"[\w, ]{1,100}", "with_past": "true|false", "selections": r"[0-9]{1,6}"}  # metadata that `check` needs


class Compared(Frozen):
    """The largest differences of one output over all input sets; `draw` is the name of the set (a key of the JSON output).

    `difference` is the largest absolute difference. `relative` is it divided by the largest magnitude in PyTorch's output (or
    itself, if that output is all zeros). Elements above 10⁴ times the median magnitude are excluded from that, and each
    is compared relative to its own magnitude. `misplaced` counts integers that differ, and elements that are NaN or infinite
    in only one of the outputs.
    """

    name: str
    difference: float = 0.0
    relative: float = 0.0
    misplaced: int = 0
    draw: str = ""
    ok: bool = True


class RouteChecked(Frozen):
    """The result of one way to run the file: its kernels, the differences of its outputs, and the slots that it chose.

    `skipped` is the reason why it was not run, or "".
    """

    name: RouteName
    kernels: dict[str, str] = Field(default={})  # memory operator → "native" or "standard"
    outputs: tuple[Compared, ...] = ()
    ties: Ties = Ties()
    failures: tuple[str, ...] = ()  # input sets on which the runtime failed or returned other shapes than PyTorch
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """True if every output is within the tolerance, every choice is valid, and nothing failed."""
        return all(output.ok for output in self.outputs) and not self.ties.wrong and not self.failures


@dataclass(frozen=True)
class OnnxFile:
    """A file and its metadata, without its weights."""

    path: Path
    model: ModelProto
    notes: dict[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]

    @property
    def dtype(self) -> Float | None:
        """The type of all its numbers; None if there are several types."""
        return next((name for name in get_args(Float) if name == self.notes["dtype"]), None)

    @property
    def with_past(self) -> bool:
        """Whether the cache is an input and an output."""
        return self.notes["with_past"] == "true"

    @property
    def memory(self) -> set[str]:
        """The memory operators that its graph calls."""
        return {node.op_type for node in self.model.graph.node if node.domain == DOMAIN}

    @property
    def functions(self) -> set[str]:
        """The memory operators for which it contains functions."""
        return {function.name for function in self.model.functions if function.domain == DOMAIN}


def read_file(path: Path) -> OnnxFile:
    """A file without its weights. Raises `ExportError` if it cannot be read or was not written by `export_onnx`."""
    model = read_graph(path)
    notes = {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}
    if missing := NOTES.keys() - notes.keys():
        what = (
            f"the file's metadata have no {min(missing)!r}: it was not exported by memrewrite, or a tool removed its metadata"
        )
        raise ExportError(what, where=str(path), hint="memrewrite export MODEL -o model.onnx")
    if wrong := [key for key, form in NOTES.items() if not re.fullmatch(form, notes[key])]:
        what = f"the file's metadata are damaged: {wrong[0]!r} is {notes[wrong[0]][:100]!r}"
        raise ExportError(what, where=str(path), hint="export it again")
    inputs = tuple(_port(value, path) for value in model.graph.input)
    return OnnxFile(path, model, notes, inputs, tuple(value.name for value in model.graph.output))


def _port(value: ValueInfoProto, path: Path) -> Port:
    """An input of a file. Raises `ExportError` if it is no tensor."""
    from onnx import TensorProto

    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or kind.elem_type not in TensorProto.DataType.values():
        raise ExportError(f"the input {value.name[:100]!r} of the file is no tensor", where=str(path), hint="export it again")
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim]
    return Port(name=value.name, dtype=TensorProto.DataType.Name(kind.elem_type).lower(), shape=tuple(shape))


@contextmanager
def exposed(path: Path, model: ModelProto, count: int) -> Iterator[Path]:
    """Context manager: a copy of the graph that also returns the slots of its `count` top-ks, after its own outputs.

    The copy is in the directory of `path`, so that external weights are found, and is deleted on exit. Raises `ExportError` if
    the graph has no such values or the directory is not writable.
    """
    from onnx import TensorProto, helper

    names = [SELECTION.format(number, "slots") for number in range(count)]
    missing = set(names) - {name for node in model.graph.node for name in node.output}
    if missing:
        what = f"the file has no value {min(missing)!r}, which holds the slots that a top-k chose"
        raise ExportError(what, where=str(path), hint="export it again, and do not rename its values")
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".onnx", dir=path.absolute().parent)
    except OSError as error:
        what = f"a copy of the graph cannot be written next to the file: {error.strerror}"
        raise ExportError(
            what, where=str(path), hint="copy the file to a directory that is writable, and check the copy"
        ) from error
    try:
        with os.fdopen(handle, "wb") as copy:
            copy.write(model.SerializeToString())
        yield Path(name)
    finally:
        Path(name).unlink()


class Route:
    """One way to run a file, and the differences found so far."""

    def __init__(self, name: RouteName, session: InferenceSession, outputs: Sequence[str]) -> None:
        self.name, self.session, self.ties = name, session, Ties()
        self.worst: dict[str, Compared] = {name: Compared(name=name) for name in outputs}
        self.failures: list[str] = []

    def run(self, inputs: InputSet) -> Tensors | None:
        """Outputs and chosen slots; None if the runtime fails, which is added to `failures`."""
        try:
            found = self.session.run(None, {name: value.cpu().numpy() for name, value in inputs.feeds.items()})
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class of exception for every kind of failure
            self.failures.append(f"{inputs.name}: {in_one_line(error)}")
            return None
        tensors = [torch.from_numpy(array) for array in found]
        return tensors[: len(self.worst)], tensors[len(self.worst) :]

    def fits(self, inputs: InputSet, found: Tensors, expected: Tensors) -> bool:
        """True if outputs and slots have the shapes of the model's; otherwise the difference is added to `failures`.

        Raises `ExportError` if the file has more or fewer outputs or top-ks than the model.
        """
        for what, of_file, of_model in zip(("outputs", "choices of slots"), found, expected, strict=True):
            if len(of_file) != len(of_model):
                message = f"the file has {len(of_file)} {what}, the model has {len(of_model)}"
                raise ExportError(message, hint="give the model that the file was exported from, or export it again")
            shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (of_file, of_model)]
            if shapes[0] != shapes[1]:
                self.failures.append(f"{inputs.name}: {what} have shapes {shapes[0]}, in PyTorch {shapes[1]}")
                return False
        return True

    def compare(self, inputs: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
        """Compare every output on the set named `inputs`, and keep the worst result of each."""
        for (name, worst), a, b in zip(self.worst.items(), found, expected, strict=True):
            new = compared(name, a, b, inputs, tolerance)
            is_worse = (not new.ok, new.misplaced, new.relative) > (not worst.ok, worst.misplaced, worst.relative)
            self.worst[name] = new if is_worse or not worst.draw else worst

    def result(self) -> RouteChecked:
        """The results of all comparisons."""
        outputs, failures = tuple(self.worst.values()), tuple(self.failures)
        kernels = dict(self.session.memory_kernels)
        return RouteChecked(name=self.name, kernels=kernels, outputs=outputs, ties=self.ties, failures=failures)


def opened(
    file: OnnxFile, wanted: Sequence[RouteName] | None, providers: Sequence[Provider], library: str | Path | None
) -> tuple[list[Route], list[RouteChecked]]:
    """A session for every available route, on a copy of the graph that also returns its slots; and the routes not available.

    Raises `ExportError` if no route is available, or a route in `wanted` is not.
    """
    provider = first_of(providers)
    reasons = {name: _why_not(file, name, library, provider) for name in wanted or ROUTES}
    absent = {name: why for name, why in reasons.items() if why}
    if len(absent) == len(reasons) or (wanted and absent):
        what = "; ".join(f"{name}: {why}" for name, why in absent.items())
        hint = "memrewrite build-op, or export with --op both"
        raise ExportError(f"the file cannot be run as requested: {what}", where=str(file.path), hint=hint)
    with exposed(file.path, file.model, int(file.notes["selections"])) as copy:
        sessions = {name: onnx_session(copy, providers, op=name, library=library) for name in reasons if name not in absent}
    routes = [Route(name, session, file.outputs) for name, session in sessions.items()]
    return routes, [RouteChecked(name=name, skipped=why) for name, why in absent.items()]


def _why_not(file: OnnxFile, route: RouteName, library: str | Path | None, provider: str) -> str:
    """Why this route cannot run the file, or ""."""
    if route == "standard":
        missing = sorted(file.memory - file.functions)
        return f"the file has no function for {', '.join(missing)}" if missing else ""
    if not file.memory:
        return "the file has no memory operators: they were exported as standard operators"
    return unserved(Path(library) if library else built_library(), provider)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _median(values: Tensor) -> float:
    return float(values.median()) if values.numel() else 0.0


def compared(name: str, found: Tensor, expected: Tensor, inputs: str, tolerance: float) -> Compared:
    """The differences of two tensors of one shape; an element that is NaN or infinite in one must be so in the other."""
    a, b = found.double(), expected.double()
    finite = a.isfinite() & b.isfinite()
    is_exact = not expected.is_floating_point()
    differing = (found != expected) if is_exact else ~finite & (a != b) & ~(a.isnan() & b.isnan())
    errors, sizes = (a - b)[finite].abs(), b[finite].abs()
    difference, misplaced = _largest(errors), int(differing.sum())
    ordinary = sizes <= HUGE * _median(sizes[sizes > 0])  # the -1e9 of a mask must not hide other differences
    relative = max(_largest(errors[ordinary]) / (_largest(sizes[ordinary]) or 1.0), _largest((errors / sizes)[~ordinary]))
    ok = not misplaced and relative <= tolerance
    return Compared(name=name, difference=difference, relative=relative, misplaced=misplaced, draw=inputs, ok=ok)
