"""`check_onnx`: compares an exported file with the PyTorch model that it was exported from, for each way to run the file.

Flow: read the file's metadata → prepare the model as for the export → choose sets of inputs, at other lengths too → run
PyTorch and every route of the file on each set → compare the outputs, after PyTorch has read the slots that the file chose → a
frozen `Checked`.
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
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.onnx.check.given_inputs import real_inputs, text_inputs
from memrewrite.passes.onnx.check.input_sets import PAST, InputSet, following, input_sets
from memrewrite.passes.onnx.check.reference import Reference
from memrewrite.passes.onnx.check.routes import ROUTES, OnnxFile, Route, RouteChecked, RouteName, opened, read_file
from memrewrite.passes.onnx.check.slot_choices import Ties, same_sets
from memrewrite.passes.onnx.file import of_rewrite
from memrewrite.passes.onnx.session import CPU, Provider, first_of
from memrewrite.passes.storage.source import load_source

TOLERANCES = {"float32": 1e-4, "float16": 1e-2}  # relative to the largest magnitude of an output: some hundred roundings


class InputSetChecked(Frozen):
    """One set of inputs: the lengths of its dynamic axes, and why PyTorch does not run on it, or ""."""

    name: str
    lengths: dict[str, int]
    skipped: str = ""


class Checked(Frozen):
    """The comparison of a file with its model. `draws` are the input sets; the name is a key of the JSON output."""

    path: str
    dtype: str
    plan: str  # digest of the rewrite's plan, "" if there was no rewrite
    provider: str
    tolerance: float
    routes: tuple[RouteChecked, ...]
    draws: tuple[InputSetChecked, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """True if every route that ran computes what PyTorch computes."""
        return all(route.ok for route in self.routes)


@exclusive
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
    """Run an exported file and its model on the same inputs, and compare every output.

    The inputs are the example, the `real` ones, sentences if the model's directory has a tokenizer, and random values at other
    lengths of the dynamic axes. A length that the model does not support is skipped. Rounding may make a top-k of the file
    choose another slot than PyTorch. Each such choice is judged, and PyTorch is run again on the slots that the file chose.

    Args:
        path: A file that `export_onnx` wrote.
        model: The model, or a path or text that `load_source` accepts. If None, the source named in the file's metadata, if it
            is a directory inside that of the file or the working directory, or `trust_code` is set.
        inputs: The example inputs of the export: a tensor, a tuple, a dict, or `(args, kwargs)`; if None, those of the model's
            source, or generated ones.
        real: More inputs: dicts of arrays by input name, or `.npz` files of such arrays.
        routes: "standard" runs the functions in the file, "native" the kernels of `library`; if None, those available.
        providers: Execution providers as for `onnx_session`.
        tolerance: Largest difference of an output relative to its largest magnitude, and largest distance of a chosen slot's
            sum below the k-th best sum relative to the range of the sums. If None, 1e-4 for float32: summation in another order
            causes about 1e-6, which grows with each layer. With float16, whose rounding is 5e-4, it is 1e-2.
        library: The native library; if None, the one that `memrewrite build-op` built.
        trust_code: Allow running Python code to load the model, also a file that the metadata name. A Python file or module
            that `model` names always runs.
        step: Receives a short message before each stage.

    Returns:
        The comparison. Differences above the tolerance are in it, and are no error.

    Raises:
        ExportError: The file cannot be read or run as requested, or it was not exported from this model.
        ModelError: The model cannot be loaded, or does not run on the example or real inputs.
    """
    begin, report, file = time.perf_counter(), step or (lambda _: None), read_file(Path(path))
    if not isinstance(model, (nn.Module, ExportedProgram)):
        report("loading the model")
        source = recorded_source(file, trust_code) if model is None else model
        model, inputs = _loaded(str(source), inputs, trust_code)
        real = [*real, *text_inputs(source, file.inputs)]
    _require_same_plan(file, model)
    bound = TOLERANCES.get(file.dtype or "", max(TOLERANCES.values())) if tolerance is None else tolerance
    with evaluating(model):
        reference = Reference(model, inputs, file.dtype, {port.name for port in file.inputs}, with_past=file.with_past)
        required = real_inputs(real, file.inputs, reference.example)
        report("loading the file")
        available, skipped = opened(file, routes, providers, library)
        tried = _tried(file, reference, required, available, bound, report)
    results = {result.name: result for result in (*(route.result() for route in available), *skipped)}
    return Checked(
        path=str(path),
        dtype=file.notes["dtype"],
        plan=file.notes.get("plan", ""),
        provider=first_of(providers),
        tolerance=bound,
        routes=tuple(results[name] for name in ROUTES if name in results),
        draws=tuple(tried),
        seconds=time.perf_counter() - begin,
    )


def recorded_source(file: OnnxFile, trust_code: bool) -> Path:
    """The source in the file's metadata, which is the text of a file that may be hostile.

    Without `trust_code` it is a relative path of a directory, inside the directory of the file or the working directory:
    loading a directory runs nothing. Raises `ExportError` for any other, or if there is none.
    """
    hint = "name the model: memrewrite check FILE MODEL"
    text, where = file.notes.get("source"), str(file.path)
    if text is None:
        raise ExportError("the file's metadata name no source", where=where, hint=hint)
    folder = file.path.resolve().parent
    try:
        source = (folder / text).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # also a name that the system refuses; a circle of links
        raise ExportError(f"the file's source {text[:200]!r} does not exist", where=where, hint=hint) from error
    if trust_code:
        return source
    if not source.is_dir():
        what = f"the file was exported from {text[:200]!r}, which may be code and was not run"
        raise ExportError(what, where=where, hint=f"{hint}; if you trust the file, add --trust-code")
    if Path(text).is_absolute() or not any(source.is_relative_to(place) for place in (folder, Path.cwd())):
        what = f"the file names {text[:200]!r} as its source, which is neither next to it nor in the working directory"
        raise ExportError(what, where=where, hint=hint)
    return source


def _loaded(spec: str, inputs: Any, trust_code: bool) -> tuple[nn.Module | ExportedProgram, Any]:
    """The model that `spec` names, and its inputs; None for generated inputs, which are generated again as for the export."""
    source = load_source(spec, trust_code=trust_code)
    return source.model, source.inputs if inputs is None and not source.inputs_made else inputs


def _require_same_plan(file: OnnxFile, model: nn.Module | ExportedProgram) -> None:
    """Raise `ExportError` if file and model are from two rewrites."""
    of_model, of_file = of_rewrite(model).get("plan"), file.notes.get("plan")
    if of_model and of_file and of_model != of_file:
        what = f"the file was exported from another rewrite: its plan is {of_file[:12]}, the model's {of_model[:12]}"
        raise ExportError(
            what, where=str(file.path), hint="export this model again, or give the one that the file was exported from"
        )


def _tried(
    file: OnnxFile,
    reference: Reference,
    required: Sequence[InputSet],
    routes: Sequence[Route],
    tolerance: float,
    report: Callable[[str], None],
) -> list[InputSetChecked]:
    """Run and compare every input set. A first step is followed by the next step, on the cache that PyTorch returned."""
    example, *others = input_sets(file.inputs, reference.example, reference.elements)
    queue, tried = [example, *required, *others], []
    for inputs in queue:  # the loop appends the next step
        report(f"comparing: {inputs.name}")
        outputs, why = _compared(inputs, reference, routes, tolerance)
        tried.append(InputSetChecked(name=inputs.name, lengths=dict(inputs.lengths), skipped=why))
        if outputs and inputs.lengths.get(PAST) == 0 and not inputs.required:
            named = dict(zip(file.outputs, outputs, strict=True))
            queue.append(following(inputs, named, file.inputs, reference.elements))
    return tried


def _compared(inputs: InputSet, reference: Reference, routes: Sequence[Route], tolerance: float) -> tuple[list[Tensor], str]:
    """Run PyTorch and every route on `inputs`; returns PyTorch's outputs, or none and the reason."""
    try:
        outputs, choices = reference(inputs.feeds)
    except Exception as error:
        if inputs.required:
            what = f"the model does not run on {inputs.name}: {in_one_line(error)}"
            raise ModelError(what, where=type(reference.model).__name__, hint="give inputs that fit") from error
        return [], in_one_line(error)
    for route in routes:
        found = route.run(inputs)
        if found is None or not route.fits(inputs, found, (outputs, choices.slots)):
            continue
        expected, ties = outputs, Ties(rows=sum(slots[..., 0].numel() for slots in choices.slots))
        if not all(same_sets(*pair).all() for pair in zip(choices.slots, found[1], strict=True)):
            expected, forced = reference(inputs.feeds, found[1], tolerance)
            ties = forced.ties
        route.ties += ties
        route.compare(inputs.name, found[0], expected, tolerance)
    return outputs, ""
