"""The commands of `memrewrite`: each makes one call of the passes from its arguments and prints the result.

Flow: arguments → cheap checks → load the model → one function of `pipeline` or `checkpoint` → tables or JSON. torch is
imported inside the commands, so `--help`, `--version` and shell completion are fast.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memrewrite.cli import onnx, recipes, usage
from memrewrite.cli.arguments import Inexact, Json, ModelArgument, RecipeArgument, Trust, load_model, read_recipe
from memrewrite.cli.session import EXIT_CODES, Session, Settings, session
from memrewrite.cli.streams import silence_stdout

if TYPE_CHECKING:
    from memrewrite.output_target import Target
    from memrewrite.passes.storage.source import ModelSource
    from memrewrite.recipes.schema import Recipe

app = typer.Typer(
    name="memrewrite",
    help="Find the MLPs of a transformer by dataflow and replace them with sparse memory layers.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes.app, name="recipes")


class Emit(str, enum.Enum):
    """Result of a rewrite: the live module, edited in place, or its rewritten graph."""

    module = "module"
    graph = "graph"


class Verify(str, enum.Enum):
    """Whether the result is checked."""

    full = "full"
    off = "off"


def _version(requested: bool) -> None:
    if requested:
        from memrewrite import __version__

        typer.echo(f"memrewrite {__version__}")
        raise typer.Exit


@app.callback()
def _settings(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every replacement, on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    context.obj = Settings(verbose=verbose, debug=debug)


@app.command(epilog=EXIT_CODES)
def apply(
    context: typer.Context,
    model: ModelArgument,
    recipe: RecipeArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Save the result here. Default: only report.")
    ] = None,
    emit: Annotated[Emit | None, typer.Option(help="module: edit the live model; graph: rewrite its exported program.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; change nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if `apply -o` wrote it.")] = False,
    overwrite_any: Annotated[
        Path | None,
        typer.Option("--overwrite-any", metavar="DIR", help="The DIR of -o again: replace it, whatever it contains."),
    ] = None,
    allow_large: Annotated[bool, typer.Option("--allow-large", help="Continue if a pool exceeds free memory.")] = False,
    allow_inexact: Inexact = False,
    verify: Annotated[
        Verify | None, typer.Option(help="full: check the result; off: no checks. Default: what the recipe says.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also print how long each phase of the command takes.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Rewrite MODEL with RECIPE, check the result, and save it with -o."""
    with session(context.obj, as_json) as current:
        target = None
        if output is not None:
            from memrewrite.cli.output_path import refuse
            from memrewrite.output_target import saved_directory

            target = saved_directory(output, overwrite=overwrite, overwrite_any=overwrite_any)
            refuse(target, read=[model, recipe])
        loaded = read_recipe(current, recipe)
        if verify is not None:
            loaded = loaded.model_copy(update={"verify": verify.value})
        source = load_model(current, model, trust_code, with_tokenizer=output is not None and not dry_run)
        if dry_run:
            _show_plan(current, source, loaded)
        else:
            allowed = {"allow_large": allow_large, "allow_inexact": allow_inexact}
            _apply(current, source, loaded, target, _emit_for(emit, source), allowed, profile=profile)


def _apply(
    current: Session,
    source: ModelSource,
    recipe: Recipe,
    output: Target | None,
    emit: Emit,
    allowed: dict[str, bool],
    *,
    profile: bool,
) -> None:
    from memrewrite.cli import text_output
    from memrewrite.passes import pipeline
    from memrewrite.passes.storage import checkpoint

    report = pipeline.apply(source.model, recipe, source.inputs, emit=emit.value, step=current.step, **allowed)
    saved = None
    if output is not None:
        for file in source.neighbours if emit is Emit.module else ():
            current.log.warning("%s imports %s, which is not saved with the result", source.code, file.name)
        base = source.base if emit is Emit.module else None
        saved = checkpoint.save(
            report.model,
            output.path,
            source=base,
            overwrite=output.overwrite,
            overwrite_any=output.overwrite_any,
            step=current.step,
        )
    document = {"report": report.model_dump(mode="json"), "ok": report.ok, "emit": emit.value}
    document["saved"] = None if saved is None else str(saved)
    current.step.close()
    phases = current.step.phases.ended
    if profile:
        document["phases"] = [phase.model_dump() for phase in phases]
    current.show(document, lambda out: text_output.show_report(out, report, saved, phases if profile else ()))


@app.command(epilog=EXIT_CODES)
def inspect(
    context: typer.Context,
    model: ModelArgument,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Explain one module, parameter or graph node: its role, or the rule that refused it."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page that shows the model, its MLPs and near misses.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="With --html: also show what this recipe would do.", autocompletion=recipes.complete
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """List every MLP of MODEL, and every near miss with the reason why it was refused."""
    with session(context.obj, as_json) as current:
        from memrewrite.cli import inspect_command

        inspect_command.refuse_options(why, html, recipe, overwrite=overwrite, read=[model])
        loaded = None if recipe is None else read_recipe(current, recipe)
        source = load_model(current, model, trust_code)
        if why is not None:
            inspect_command.why(current, source, why)
        elif html is not None:
            inspect_command.page(current, source, html, loaded, overwrite=overwrite)
        else:
            inspect_command.tables(current, source)


@app.command(epilog=EXIT_CODES)
def plan(
    context: typer.Context,
    model: ModelArgument,
    recipe: RecipeArgument,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Show what `apply` would do to MODEL and the cost before and after; change nothing."""
    with session(context.obj, as_json) as current:
        loaded = read_recipe(current, recipe)
        _show_plan(current, load_model(current, model, trust_code), loaded)


@app.command(epilog=EXIT_CODES)
def verify(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `apply -o` wrote.")],
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Check a saved result again: its files bit for bit, then the checks of the rewrite."""
    with session(context.obj, as_json) as current:
        current.step("loading torch")
        from memrewrite.cli import text_output
        from memrewrite.errors import VerificationError
        from memrewrite.passes.verify_saved import verify_saved

        report = verify_saved(directory, trust_code=trust_code, step=current.step)
        if not report.ok:  # printed with the report, as for `apply`
            failed = next(check for check in report.checks if check.outcome == "failed")
            what = f"the check {failed.name!r} failed: {failed.sentence}"
            raise VerificationError(what, where=str(directory), hint="apply the recipe again").with_report(report)
        document = {"report": report.model_dump(mode="json"), "ok": report.ok}
        current.show(document, lambda out: text_output.show_verification(out, report, directory))


for command in (onnx.export, onnx.check, onnx.build_op, usage.usage):
    app.command(epilog=EXIT_CODES)(command)


def _show_plan(current: Session, source: ModelSource, recipe: Recipe) -> None:
    from memrewrite.cli import text_output
    from memrewrite.passes.forecast import forecast

    result, scales = forecast(source.model, recipe, source.inputs, step=current.step)
    document: dict[str, Any] = {"plan": result.model_dump(mode="json"), "digest": result.digest()}
    document |= {"before": result.before().model_dump(), "after": result.after().model_dump()}
    document["sites"] = [
        {"path": s.site.path, "before": s.site.cost().model_dump(), "after": s.cost(result.pools).model_dump()}
        for s in result.substitutions
    ]
    document["scales"] = [scale.model_dump(mode="json") for scale in scales]
    current.show(document, lambda out: text_output.show_plan(out, result, scales))


def _emit_for(emit: Emit | None, source: ModelSource) -> Emit:
    """Graph for an exported program, which has no modules to edit; for a live model the requested form, default module."""
    from torch import nn

    from memrewrite.errors import UserError

    if isinstance(source.model, nn.Module):
        return emit or Emit.module
    if emit is Emit.module:
        raise UserError("an exported program has no modules to edit", where=source.name, hint="use --emit graph")
    return Emit.graph


def run() -> None:
    """Run the command line. Characters that the terminal cannot encode are replaced instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="memrewrite")
    finally:
        silence_stdout()
