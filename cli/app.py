"""The commands of `memrewrite`: each turns its arguments into one call of the passes and shows what comes back.

Flow: arguments → what is cheap to refuse is refused → the model is loaded → one verb of `pipeline` or `checkpoint` → tables
or JSON. torch is imported inside the commands, so that `--help`, `--version` and shell completion are quick.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memrewrite.cli import onnx, recipes
from memrewrite.cli.arguments import Json, ModelArgument, RecipeArgument, Trust, load_model, read_recipe
from memrewrite.cli.session import EXIT_CODES, Session, Settings, session

if TYPE_CHECKING:
    from memrewrite.passes.storage.source import Source
    from memrewrite.recipes.schema import Recipe

app = typer.Typer(
    name="memrewrite",
    help="Find the MLPs of a transformer by dataflow and put sparse memory layers in their places.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes.app, name="recipes")


class Emit(str, enum.Enum):
    """What a rewrite gives: the live module, edited in place, or its captured graph."""

    module = "module"
    graph = "graph"


def _version(wanted: bool) -> None:
    if wanted:
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
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Save the result here; left out: only report.")
    ] = None,
    emit: Annotated[Emit | None, typer.Option(help="module: edit the live model; graph: rewrite its exported program.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; change nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR when it is in use.")] = False,
    allow_large: Annotated[bool, typer.Option("--allow-large", help="Go on when a pool exceeds free memory.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Rewrite MODEL as RECIPE says, check the result, and save it with -o."""
    with session(context.obj, as_json) as current:
        if output is not None:
            from memrewrite.cli.output_path import refuse_output

            refuse_output(output, overwrite=overwrite, read=[model, recipe])
        wanted = read_recipe(current, recipe)
        source = load_model(current, model, trust_code, with_tokenizer=output is not None and not dry_run)
        if dry_run:
            _show_plan(current, source, wanted)
        else:
            _apply(current, source, wanted, output, _emitted(emit, source), overwrite=overwrite, allow_large=allow_large)


def _apply(
    current: Session,
    source: Source,
    recipe: Recipe,
    output: Path | None,
    emit: Emit,
    *,
    overwrite: bool,
    allow_large: bool,
) -> None:
    from memrewrite.cli import text_output
    from memrewrite.passes import pipeline
    from memrewrite.passes.storage import checkpoint

    report = pipeline.apply(source.model, recipe, source.inputs, emit=emit.value, allow_large=allow_large, step=current.step)
    saved = None
    if output is not None:
        for file in source.neighbours if emit is Emit.module else ():
            current.log.warning("%s imports %s, which is not saved with it", source.code, file.name)
        base = source.base if emit is Emit.module else None
        saved = checkpoint.save(report.model, output, source=base, overwrite=overwrite, step=current.step)
    document = {"report": report.model_dump(mode="json"), "ok": report.ok, "emit": emit.value}
    document["saved"] = None if saved is None else str(saved)
    current.show(document, lambda out: text_output.applied(out, report, saved))


@app.command(epilog=EXIT_CODES)
def inspect(
    context: typer.Context,
    model: ModelArgument,
    why: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Explain one module, parameter or graph node: what it is, or which rule refused it."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the model and what was found as an HTML page.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="With --html: what it would do.", autocompletion=recipes.complete)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Show every MLP of MODEL, and what only looked like one, with the reason."""
    with session(context.obj, as_json) as current:
        from memrewrite.cli import inspect_command

        inspect_command.refuse(why, html, recipe, overwrite=overwrite, read=[model])
        wanted = None if recipe is None else read_recipe(current, recipe)
        source = load_model(current, model, trust_code)
        if why is not None:
            inspect_command.why(current, source, why)
        elif html is not None:
            inspect_command.page(current, source, html, wanted)
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
    """Show what `apply` would do to MODEL, and what it would cost; change nothing."""
    with session(context.obj, as_json) as current:
        wanted = read_recipe(current, recipe)
        _show_plan(current, load_model(current, model, trust_code), wanted)


@app.command(epilog=EXIT_CODES)
def verify(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `apply -o` wrote.")],
    as_json: Json = False,
    trust_code: Trust = False,
) -> None:
    """Check a saved result: its files, bit for bit, and what was proved of it."""
    with session(context.obj, as_json) as current:
        current.step("loading torch")
        from memrewrite.cli import text_output
        from memrewrite.errors import VerificationError
        from memrewrite.passes.verify_saved import verify_saved

        report = verify_saved(directory, trust_code=trust_code, step=current.step)
        if not report.ok:  # shown like every failed check, with the report
            failed = next(check for check in report.checks if check.outcome == "failed")
            what = f"the check {failed.name!r} failed: {failed.sentence}"
            raise VerificationError(what, where=str(directory), hint="apply the recipe again").with_report(report)
        document = {"report": report.model_dump(mode="json"), "ok": report.ok}
        current.show(document, lambda out: text_output.verified(out, report, directory))


for command in (onnx.export, onnx.check, onnx.build_op):
    app.command(epilog=EXIT_CODES)(command)


def _show_plan(current: Session, source: Source, recipe: Recipe) -> None:
    from memrewrite.cli import text_output
    from memrewrite.passes import pipeline

    made = pipeline.plan(source.model, recipe, source.inputs, step=current.step)
    document: dict[str, Any] = {"plan": made.model_dump(mode="json"), "digest": made.digest()}
    document |= {"before": made.before().model_dump(), "after": made.after().model_dump()}
    document["sites"] = [
        {"path": s.site.path, "before": s.site.cost().model_dump(), "after": s.cost(made.pools).model_dump()}
        for s in made.substitutions
    ]
    current.show(document, lambda out: text_output.planned(out, made))


def _emitted(emit: Emit | None, source: Source) -> Emit:
    """A program has no modules to edit; a live model is edited unless the graph is asked for."""
    from torch import nn

    from memrewrite.errors import UserError

    if isinstance(source.model, nn.Module):
        return emit or Emit.module
    if emit is Emit.module:
        raise UserError("an exported program has no modules to edit", where=source.name, hint="use --emit graph")
    return Emit.graph


def run() -> None:
    """Run the command line. Characters that a terminal cannot show are replaced, and no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="memrewrite")
