"""The file's side of a comparison: what it says of itself, and one session for every way in which it can be run.

Flow: the graph without its weights → a copy that also returns the slots its top-ks chose → a session on it by each route →
the worst that each output showed.
"""

from __future__ import annotations

import os
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
from memrewrite.kernels.onnx_functions import DOMAIN
from memrewrite.passes.onnx.check.draws import Draw
from memrewrite.passes.onnx.check.slot_choices import Ties
from memrewrite.passes.onnx.file import PREFIX, Port, read_graph
from memrewrite.passes.onnx.graph import SELECTION
from memrewrite.passes.onnx.native_library import built_library
from memrewrite.passes.onnx.prepare import Float
from memrewrite.passes.onnx.session import Provider, first_of, onnx_session, unserved

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto
    from onnxruntime import InferenceSession

RouteName = Literal["standard", "native"]
Tensors = tuple[list[Tensor], list[Tensor]]  # outputs, and the slots of every top-k
HUGE = 1e4  # times the median magnitude: no result of sums beside the others, but a mark, such as a mask's
ROUTES: tuple[RouteName, ...] = ("standard", "native")


class Compared(Frozen):
    """One output, at its worst over all draws: `draw` names that.

    `difference` is the largest, `relative` to the largest magnitude in PyTorch's output (absolute, where that is all
    zeros), for which elements some ten thousand times the median do not count: each of these is held against itself;
    `misplaced` counts elements that are NaN or infinite in one alone, or whole numbers that differ.
    """

    name: str
    difference: float = 0.0
    relative: float = 0.0
    misplaced: int = 0
    draw: str = ""
    ok: bool = True


class RouteChecked(Frozen):
    """One way of running the file: by which kernels, how far its outputs are off, and what it chose. `skipped` says why."""

    name: RouteName
    kernels: dict[str, str] = Field(default={})  # of every memory operator: "native" or "standard"
    outputs: tuple[Compared, ...] = ()
    ties: Ties = Ties()
    failures: tuple[str, ...] = ()  # draws on which PyTorch ran, and the runtime did not or gave other shapes
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with what ran."""
        return all(output.ok for output in self.outputs) and not self.ties.wrong and not self.failures


@dataclass(frozen=True)
class OnnxFile:
    """A file as it describes itself; its weights are not read."""

    path: Path
    model: ModelProto
    notes: dict[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]

    @property
    def dtype(self) -> Float | None:
        """The type of all its numbers; None where they are of several."""
        return next((name for name in get_args(Float) if name == self.notes["dtype"]), None)

    @property
    def with_past(self) -> bool:
        """Whether it takes and gives a cache."""
        return self.notes["with_past"] == "true"

    @property
    def memory(self) -> set[str]:
        """The memory operators that it calls."""
        return {node.op_type for node in self.model.graph.node if node.domain == DOMAIN}

    @property
    def functions(self) -> set[str]:
        """Those that it defines."""
        return {function.name for function in self.model.functions if function.domain == DOMAIN}


def read_file(path: Path) -> OnnxFile:
    """A file of ours without its weights. Raises `ExportError` for what is none."""
    model = read_graph(path)
    notes = {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}
    if missing := {"dtype", "with_past", "selections"} - notes.keys():
        what = f"the file does not say its {min(missing)}: it was not exported by memrewrite, or a tool dropped its metadata"
        raise ExportError(what, where=str(path), hint="memrewrite export MODEL -o model.onnx")
    return OnnxFile(path, model, notes, tuple(map(_port, model.graph.input)), tuple(value.name for value in model.graph.output))


def _port(value: ValueInfoProto) -> Port:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim)
    return Port(name=value.name, dtype=TensorProto.DataType.Name(tensor.elem_type).lower(), shape=dims)


@contextmanager
def exposed(path: Path, model: ModelProto, count: int) -> Iterator[Path]:
    """A copy of the graph at `path` that also returns the slots of its `count` top-ks, after its own outputs.

    It lies beside the file, where weights in a file of their own are found, and is gone afterwards. Raises `ExportError`.
    """
    from onnx import TensorProto, helper

    names = [SELECTION.format(place, "slots") for place in range(count)]
    missing = set(names) - {name for node in model.graph.node for name in node.output}
    if missing:
        what = f"the file has no value {min(missing)!r}, by which its choices are known"
        raise ExportError(what, where=str(path), hint="export it again; no tool may rename its values")
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".onnx", dir=path.absolute().parent)
    except OSError as error:
        what = f"a copy of the graph cannot be written beside the file: {error.strerror}"
        raise ExportError(what, where=str(path), hint="check a copy that lies where you may write") from error
    try:
        with os.fdopen(handle, "wb") as copy:
            copy.write(model.SerializeToString())
        yield Path(name)
    finally:
        Path(name).unlink()


class Route:
    """One way of running a file, and what was found of it so far."""

    def __init__(self, name: RouteName, session: InferenceSession, outputs: Sequence[str]) -> None:
        self.name, self.session, self.ties = name, session, Ties()
        self.worst: dict[str, Compared] = {name: Compared(name=name) for name in outputs}
        self.failures: list[str] = []

    def run(self, draw: Draw) -> Tensors | None:
        """Outputs and chosen slots; None where the runtime fails, which is noted."""
        try:
            found = self.session.run(None, {name: value.cpu().numpy() for name, value in draw.feeds.items()})
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class of exception for every kind of failure
            self.failures.append(f"{draw.name}: {in_one_line(error)}")
            return None
        tensors = [torch.from_numpy(array) for array in found]
        return tensors[: len(self.worst)], tensors[len(self.worst) :]

    def fits(self, draw: Draw, found: Tensors, expected: Tensors) -> bool:
        """Whether the file gives as many outputs and choices as the model, and in its shapes; other shapes are noted.

        Raises `ExportError` where it gives more or fewer.
        """
        for what, theirs, ours in zip(("outputs", "choices of slots"), found, expected, strict=True):
            if len(theirs) != len(ours):
                said = f"the file gives {len(theirs)} {what}, the model {len(ours)}"
                raise ExportError(said, hint="give the model that the file was exported from, or export it again")
            shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (theirs, ours)]
            if shapes[0] != shapes[1]:
                self.failures.append(f"{draw.name}: {what} of shapes {shapes[0]}, where PyTorch gives {shapes[1]}")
                return False
        return True

    def note(self, draw: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
        """Keep the worst of every output."""
        for (name, worst), a, b in zip(self.worst.items(), found, expected, strict=True):
            made = compared(name, a, b, draw, tolerance)
            rank = (not made.ok, made.misplaced, made.relative) > (not worst.ok, worst.misplaced, worst.relative)
            self.worst[name] = made if rank or not worst.draw else worst

    def result(self) -> RouteChecked:
        """All of it, frozen."""
        outputs, failures = tuple(self.worst.values()), tuple(self.failures)
        kernels = dict(self.session.memory_kernels)
        return RouteChecked(name=self.name, kernels=kernels, outputs=outputs, ties=self.ties, failures=failures)


def opened(
    file: OnnxFile, wanted: Sequence[RouteName] | None, providers: Sequence[Provider], library: str | Path | None
) -> tuple[list[Route], list[RouteChecked]]:
    """A session for every route that there is, on a copy that also tells its choices; and the routes that there are not."""
    provider = first_of(providers)
    reasons = {name: _why_not(file, name, library, provider) for name in wanted or ROUTES}
    absent = {name: why for name, why in reasons.items() if why}
    if len(absent) == len(reasons) or (wanted and absent):
        what = "; ".join(f"{name}: {why}" for name, why in absent.items())
        hint = "memrewrite build-op, or export with --op both"
        raise ExportError(f"the file cannot be run as asked: {what}", where=str(file.path), hint=hint)
    with exposed(file.path, file.model, int(file.notes["selections"])) as copy:
        sessions = {name: onnx_session(copy, providers, op=name, library=library) for name in reasons if name not in absent}
    opened = [Route(name, session, file.outputs) for name, session in sessions.items()]
    return opened, [RouteChecked(name=name, skipped=why) for name, why in absent.items()]


def _why_not(file: OnnxFile, route: RouteName, library: str | Path | None, provider: str) -> str:
    """Why the file cannot be run by this route, or ""."""
    if route == "standard":
        missing = sorted(file.memory - file.functions)
        return f"the file holds no function for {', '.join(missing)}" if missing else ""
    if not file.memory:
        return "the file holds no memory operators: they are written out"
    return unserved(Path(library) if library else built_library(), provider)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _median(values: Tensor) -> float:
    return float(values.median()) if values.numel() else 0.0


def compared(name: str, found: Tensor, expected: Tensor, draw: str, tolerance: float) -> Compared:
    """How far `found` is from `expected`, of one shape; numbers that are none, or infinite, must be so in both."""
    a, b = found.double(), expected.double()
    finite = a.isfinite() & b.isfinite()
    exact = not expected.is_floating_point()
    apart = (found != expected) if exact else ~finite & (a != b) & ~(a.isnan() & b.isnan())
    errors, sizes = (a - b)[finite].abs(), b[finite].abs()
    difference, misplaced = _largest(errors), int(apart.sum())
    ordinary = sizes <= HUGE * _median(sizes[sizes > 0])  # a mask's -1e9 must not hide what is wrong beside it
    relative = max(_largest(errors[ordinary]) / (_largest(sizes[ordinary]) or 1.0), _largest((errors / sizes)[~ordinary]))
    ok = not misplaced and relative <= tolerance
    return Compared(name=name, difference=difference, relative=relative, misplaced=misplaced, draw=draw, ok=ok)
