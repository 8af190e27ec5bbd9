"""`export`, `check` and `build-op`: a model leaves as ONNX, the file is held against it, its operators get native kernels."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from memrewrite.cli.arguments import Json, ModelArgument, Trust, load_model
from memrewrite.cli.session import session


class Operators(str, enum.Enum):
    """How memory operators are written."""

    standard = "standard"
    native = "native"
    both = "both"


class Float(str, enum.Enum):
    """Types of numbers that runtimes compute with."""

    float32 = "float32"
    float16 = "float16"


def export(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The ONNX file to write.", show_default=False)],
    op: Annotated[
        Operators,
        typer.Option(help="Memory operators as nodes with a function of standard operators (both), or as one of the two."),
    ] = Operators.both,
    dtype: Annotated[
        Float | None, typer.Option(help="Convert all numbers; left out, what no runtime computes with becomes float32.")
    ] = None,
    with_past: Annotated[
        bool, typer.Option("--with-past", help="A decoder with its KV cache as inputs and outputs, for generation.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Write MODEL as one ONNX file: any runtime runs it, and one that knows our library runs it fast."""
    with session(context.obj, as_json) as current:
        from memrewrite.cli import text_output
        from memrewrite.cli.output_path import refuse_file

        refuse_file(output, overwrite=overwrite, read=[model])
        source = load_model(current, model, trust_code)
        current.step("preparing")
        from memrewrite.passes.onnx.export import export_onnx

        exported = export_onnx(
            source.model,
            output,
            None if source.inputs_made else source.inputs,
            op=op.value,
            dtype=None if dtype is None else dtype.value,
            with_past=with_past,
            overwrite=overwrite,
            notes={"source": _from_there(Path(model), output)} if Path(model).exists() else {},
            step=current.step,
        )
        current.show({"exported": exported.model_dump(mode="json")}, lambda out: text_output.exported(out, exported))


def _from_there(model: Path, output: Path) -> str:
    """Where the model lies as seen from the file, links resolved."""
    return os.path.relpath(model.resolve(), output.resolve().parent)


def build_op(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The library; left out: where `onnx_session` looks.")
    ] = None,
    cuda: Annotated[
        bool | None, typer.Option("--cuda/--no-cuda", help="Left out: with CUDA kernels where nvcc is found.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Build the native kernels of the memory operators, for every onnxruntime from 1.17 on."""
    with session(context.obj, as_json) as current:
        from memrewrite.cli import text_output
        from memrewrite.cli.output_path import refuse_file
        from memrewrite.passes.onnx.native_library import build_op as build

        if output is not None:
            refuse_file(output, overwrite=overwrite, read=[])
        library = build(output, cuda=cuda, step=current.step)
        current.show({"library": str(library)}, lambda out: text_output.line(out, f"built {library}"))


class RouteName(str, enum.Enum):
    """How a file's memory operators can be run."""

    standard = "standard"
    native = "native"


def check(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `export` wrote.", show_default=False)],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="What it was exported from; left out: what the file says.")
    ] = None,
    route: Annotated[
        list[RouteName] | None, typer.Option(help="Only this route, which must be there; left out: those that are.")
    ] = None,
    real: Annotated[
        list[Path] | None,
        typer.Option("--inputs", metavar="NPZ", help="More inputs: arrays by the names of the file's inputs."),
    ] = None,
    provider: Annotated[str, typer.Option(help="The execution provider of onnxruntime.")] = "CPUExecutionProvider",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference; left out: 1e-4, with float16 1e-2.", show_default=False)
    ] = None,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Run FILE against the PyTorch model that it was exported from, by its standard operators and by the native kernels."""
    with session(context.obj, as_json) as current:
        current.step("reading the file")
        from memrewrite.cli import text_output
        from memrewrite.errors import VerificationError
        from memrewrite.passes.onnx.check.check import check_onnx

        checked = check_onnx(
            file,
            model,
            real=real or (),
            routes=[name.value for name in route] if route else None,
            providers=[provider],
            tolerance=tolerance,
            trust_code=trust_code,
            step=current.step,
        )
        current.show(
            {"checked": checked.model_dump(mode="json"), "ok": checked.ok}, lambda out: text_output.checked(out, checked)
        )
        if not checked.ok:
            current.log.error("%s does not compute what the model does", file)
            raise typer.Exit(VerificationError.exit_code)
