"""`memrewrite recipes`: what the gallery holds, one recipe as YAML, and the JSON schema for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from memrewrite.cli.session import session

app = typer.Typer(help="List the gallery's recipes; show one; print the schema.", rich_markup_mode=None)


def complete(incomplete: str) -> list[str]:
    """Names of gallery recipes, for the shell."""
    from memrewrite.recipes.gallery_index import gallery

    return [name for name in gallery() if name.startswith(incomplete)]


@app.callback(invoke_without_command=True)
def _list(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the gallery's recipes; show one; print the schema."""
    if context.invoked_subcommand is not None:
        return
    with session(context.obj, as_json) as current:
        from memrewrite.cli import text_output
        from memrewrite.recipes.gallery_index import describe, gallery

        described = {name: describe(name) for name in gallery()}
        document = {"recipes": [{"name": name, "description": text} for name, text in described.items()]}
        current.show(document, lambda out: text_output.listed(out, described))


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A gallery recipe.", autocompletion=complete)],
) -> None:
    """Print a gallery recipe as YAML, a start for one of your own."""
    with session(context.obj) as current:
        from memrewrite.recipes.gallery_index import describe, gallery

        describe(name)  # refuses an unknown name
        current.write(gallery()[name].rstrip())


@app.command()
def schema(context: typer.Context) -> None:
    """Print the JSON schema of recipes, by which editors complete and check them."""
    with session(context.obj) as current:
        from memrewrite.recipes.json_schema import json_schema

        current.write(json.dumps(json_schema(), indent=2))
