"""`export`, `check` and `build-op`: write a model as ONNX, compare the file with the model, build native kernels."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from memrewrite.cli.arguments import Inexact, Json, ModelArgument, Trust, load_model
from memrewrite.cli.session import session


class Operators(str, enum.Enum):
    """The form of memory operators in the file."""

    standard = "standard"
    native = "native"
    both = "both"


class Dynamic(str, enum.Enum):
    """Which axes of the inputs have lengths that the file does not fix."""

    all = "all"
    batch = "batch"
    none = "none"


class Float(str, enum.Enum):
    """Floating-point types for the exported model."""

    float32 = "float32"
    float16 = "float16"


def export(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The ONNX file to write.", show_default=False)],
    op: Annotated[
        Operators,
        typer.Option(
            help="Memory operators: native nodes (native), standard ONNX operators (standard), or native nodes with a function"
            " body of standard operators (both)."
        ),
    ] = Operators.both,
    dtype: Annotated[
        Float | None,
        typer.Option(help="Convert all floating-point values. Default: only types that no runtime computes with, to float32."),
    ] = None,
    with_past: Annotated[
        bool, typer.Option("--with-past", help="Export a decoder with its KV cache as inputs and outputs, for generation.")
    ] = False,
    dynamic: Annotated[
        Dynamic, typer.Option(help="Dynamic axes: batch and sequence where torch can (all), the batch alone (batch), or none.")
    ] = Dynamic.all,
    static: Annotated[bool, typer.Option("--static", help="The same as --dynamic none.")] = False,
    allow_inexact: Inexact = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Write MODEL as one ONNX file. Every runtime can run it; with the native kernels of `build-op` it runs faster."""
    with session(context.obj, as_json) as current:
        from memrewrite.cli import text_output
        from memrewrite.cli.output_path import refuse
        from memrewrite.errors import ExportError, UserError
        from memrewrite.output_target import Target

        if static and dynamic is not Dynamic.all:
            raise UserError(f"--static and --dynamic {dynamic.value} cannot be combined", hint="--static is --dynamic none")
        refuse(Target(output, overwrite=overwrite, error=ExportError), read=[model])
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
            dynamic="none" if static else dynamic.value,
            allow_inexact=allow_inexact,
            overwrite=overwrite,
            notes={"source": _relative_path(Path(model), output)} if Path(model).exists() else {},
            step=current.step,
        )
        current.show({"exported": exported.model_dump(mode="json")}, lambda out: text_output.show_export(out, exported))


def _relative_path(model: Path, output: Path) -> str:
    """The path of the model relative to the directory of the output file, links resolved."""
    return os.path.relpath(model.resolve(), output.resolve().parent)


def build_op(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The library. Default: where torch and `onnx_session` search."),
    ] = None,
    cuda: Annotated[
        bool | None, typer.Option("--cuda/--no-cuda", help="Build CUDA kernels. Default: if nvcc is found.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Build the native kernels of the memory operators, for torch on the CPU and for onnxruntime 1.17 and later."""
    with session(context.obj, as_json) as current:
        from memrewrite.cli import text_output
        from memrewrite.cli.output_path import refuse
        from memrewrite.output_target import Target
        from memrewrite.passes.onnx.native_library import build_op as build

        if output is not None:
            refuse(Target(output, overwrite=overwrite), read=[])
        library = build(output, cuda=cuda, step=current.step)
        current.show({"library": str(library)}, lambda out: text_output.line(out, f"built {library}"))


class RouteName(str, enum.Enum):
    """How the memory operators of a file are run."""

    standard = "standard"
    native = "native"


def check(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `export` wrote.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model it was exported from. Default: the recorded directory; a recorded file only with --trust-code.",
        ),
    ] = None,
    route: Annotated[
        list[RouteName] | None, typer.Option(help="Check only this route; it must be available. Default: all available.")
    ] = None,
    real: Annotated[
        list[Path] | None,
        typer.Option("--inputs", metavar="NPZ", help="Additional inputs: arrays named like the inputs of the file."),
    ] = None,
    provider: Annotated[str, typer.Option(help="The execution provider of onnxruntime.")] = "CPUExecutionProvider",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference. Default: 1e-4, with float16 1e-2.", show_default=False)
    ] = None,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Compare FILE with the PyTorch model it was exported from, with its standard operators and with the native kernels."""
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
            {"checked": checked.model_dump(mode="json"), "ok": checked.ok},
            lambda out: text_output.show_onnx_check(out, checked),
        )
        if not checked.ok:
            current.log.error("%s does not compute the same as the model", file)
            current.exit_code = VerificationError.exit_code
