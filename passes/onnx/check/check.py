"""`check_onnx`: an exported file held against the PyTorch model that it was made from, by each way a runtime may take.

Flow: what the file says of itself → the model brought to its form → draws of inputs, at other lengths too → PyTorch and every
route of the file on each → outputs compared, once PyTorch has read the slots that the file chose → a frozen `Checked`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from memrewrite.errors import ExportError, ModelError, in_one_line
from memrewrite.frozen import Frozen
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.onnx.check.draws import PAST, Draw, draws, following, given_feeds, text_inputs
from memrewrite.passes.onnx.check.reference import Reference
from memrewrite.passes.onnx.check.routes import ROUTES, OnnxFile, Route, RouteChecked, RouteName, opened, read_file
from memrewrite.passes.onnx.check.slot_choices import Ties, same_sets
from memrewrite.passes.onnx.file import of_rewrite
from memrewrite.passes.onnx.session import CPU, Provider, first_of
from memrewrite.passes.storage.source import load_source

TOLERANCES = {"float32": 1e-4, "float16": 1e-2}  # some hundred roundings of the largest number


class DrawChecked(Frozen):
    """One set of inputs: how long its dynamic axes were, and why PyTorch would not have it."""

    name: str
    lengths: dict[str, int]
    skipped: str = ""


class Checked(Frozen):
    """A file held against its model."""

    path: str
    dtype: str
    plan: str  # the rewrite's digest, "" where there was none
    provider: str
    tolerance: float
    routes: tuple[RouteChecked, ...]
    draws: tuple[DrawChecked, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every route that ran gives what PyTorch gives."""
        return all(route.ok for route in self.routes)


def check_onnx(
    path: str | Path,
    model: nn.Module | ExportedProgram | str | Path | None = None,
    inputs: Any = None,
    *,
    real: Sequence[str | Path | Mapping[str, Any]] = (),
    routes: Sequence[RouteName] | None = None,
    providers: Sequence[Provider] = (CPU,),
    tolerance: float | None = None,
    library: str | Path | None = None,
    trust_code: bool = False,
    step: Callable[[str], None] | None = None,
) -> Checked:
    """Run the file at `path` and `model` on the same inputs, and compare every output.

    `model` is live, or what `load_source` takes; left out, what the file says that it was exported from. Inputs are the
    example (`inputs`, or made as for the export), `real` ones (arrays by input name, or `.npz` files of these),
    sentences where the model's directory holds a tokenizer, and draws at other lengths. `routes`: "standard" runs the
    functions in the file, "native" the kernels of `library`; left out, both as far as they are there.

    `tolerance` bounds an output's largest difference relative to its largest magnitude, and how far below the k-th best
    sum a slot's may lie, relative to the spread of the sums. Left out it is 1e-4, for a float32 model's sums in another
    order differ by 1e-6 or so and every layer adds to it; 1e-2 with float16, which rounds by 5e-4. What is out of
    tolerance is in the result, not an error. Raises `ExportError` where file and model do not belong together or a route
    cannot be taken, `ModelError` where the model does not run on given inputs.
    """
    begun, say, file = time.perf_counter(), step or (lambda _: None), read_file(Path(path))
    if not isinstance(model, (nn.Module, ExportedProgram)):
        say("loading the model")
        model = _source(file, trust_code) if model is None else model
        real = [*real, *text_inputs(model, file.inputs, trust_code=trust_code)]
        model, inputs = _loaded(str(model), inputs, trust_code)
    _of_one_plan(file, model)
    bound = TOLERANCES.get(file.dtype or "", max(TOLERANCES.values())) if tolerance is None else tolerance
    with evaluating(model):
        reference = Reference(model, inputs, file.dtype, {port.name for port in file.inputs}, with_past=file.with_past)
        given = given_feeds(real, file.inputs, reference.example)
        say("loading the file")
        taken, skipped = opened(file, routes, providers, library)
        tried = _tried(file, reference, given, taken, bound, say)
    results = {result.name: result for result in (*(route.result() for route in taken), *skipped)}
    return Checked(
        path=str(path),
        dtype=file.notes["dtype"],
        plan=file.notes.get("plan", ""),
        provider=first_of(providers),
        tolerance=bound,
        routes=tuple(results[name] for name in ROUTES if name in results),
        draws=tuple(tried),
        seconds=time.perf_counter() - begun,
    )


def _loaded(spec: str, inputs: Any, trust_code: bool) -> tuple[nn.Module | ExportedProgram, Any]:
    """The model that `spec` names. Example inputs that nobody wrote down are made anew, as for the export."""
    source = load_source(spec, trust_code=trust_code)
    return source.model, source.inputs if inputs is None and not source.inputs_made else inputs


def _source(file: OnnxFile, trust_code: bool) -> Path:
    """What the file says that it was exported from. Raises `ExportError` where it does not, that is gone, or it is code."""
    source = file.path.resolve().parent / file.notes["source"] if "source" in file.notes else None
    if source is None or not source.exists():
        what = "the file does not say what it was exported from" if source is None else f"{str(source)!r} is gone"
        raise ExportError(what, where=str(file.path), hint="give the model")
    if source.is_file() and not trust_code:
        what = f"the file says that it was exported from {file.notes['source']!r}, which may be code and was not run"
        raise ExportError(what, where=str(file.path), hint="give the model yourself, or --trust-code")
    return source


def _of_one_plan(file: OnnxFile, model: nn.Module | ExportedProgram) -> None:
    """Raise `ExportError` when file and model are of two rewrites."""
    ours, theirs = of_rewrite(model).get("plan"), file.notes.get("plan")
    if ours and theirs and ours != theirs:
        what = f"the file was exported from another rewrite: its plan is {theirs[:12]}, the model's {ours[:12]}"
        raise ExportError(what, where=str(file.path), hint="export this model again, or give the one that the file was made of")


def _tried(
    file: OnnxFile,
    reference: Reference,
    given: Sequence[Draw],
    routes: Sequence[Route],
    tolerance: float,
    say: Callable[[str], None],
) -> list[DrawChecked]:
    """Every draw, run and compared. After a first step comes the next, on the cache that PyTorch got from it."""
    example, *others = draws(file.inputs, reference.example, reference.elements)
    queue, tried = [example, *given, *others], []
    for draw in queue:  # which grows by the next step
        say(f"comparing: {draw.name}")
        outputs, why = _compared(draw, reference, routes, tolerance)
        tried.append(DrawChecked(name=draw.name, lengths=dict(draw.lengths), skipped=why))
        if outputs and draw.lengths.get(PAST) == 0 and not draw.given:
            named = dict(zip(file.outputs, outputs, strict=True))
            queue.append(following(draw, named, file.inputs, reference.elements))
    return tried


def _compared(draw: Draw, reference: Reference, routes: Sequence[Route], tolerance: float) -> tuple[list[Tensor], str]:
    """Run `draw` by PyTorch and by every route; PyTorch's outputs, or why there are none."""
    try:
        outputs, choices = reference(draw.feeds)
    except Exception as error:
        if draw.given:
            what = f"the model does not run on {draw.name}: {in_one_line(error)}"
            raise ModelError(what, where=type(reference.model).__name__, hint="give inputs that fit") from error
        return [], in_one_line(error)
    for route in routes:
        found = route.run(draw)
        if found is None or not route.fits(draw, found, (outputs, choices.slots)):
            continue
        expected, ties = outputs, Ties(rows=sum(slots[..., 0].numel() for slots in choices.slots))
        if not all(same_sets(*pair).all() for pair in zip(choices.slots, found[1], strict=True)):
            expected, forced = reference(draw.feeds, found[1], tolerance)
            ties = forced.ties
        route.ties += ties
        route.note(draw.name, found[0], expected, tolerance)
    return outputs, ""
