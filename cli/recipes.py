"""`memrewrite recipes`: list the gallery, print one recipe as YAML, print the JSON schema for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from memrewrite.cli.session import session

app = typer.Typer(help="List the gallery's recipes, print one, or print the JSON schema.", rich_markup_mode=None)


def complete(incomplete: str) -> list[str]:
    """Names of gallery recipes that begin with `incomplete`, for shell completion."""
    from memrewrite.recipes.gallery_index import gallery

    return [name for name in gallery() if name.startswith(incomplete)]


@app.callback(invoke_without_command=True)
def _list(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the gallery's recipes, print one, or print the JSON schema."""
    if context.invoked_subcommand is not None:
        return
    with session(context.obj, as_json) as current:
        from memrewrite.cli import text_output
        from memrewrite.recipes.gallery_index import describe, gallery

        described = {name: describe(name) for name in gallery()}
        document = {"recipes": [{"name": name, "description": text} for name, text in described.items()]}
        current.show(document, lambda out: text_output.show_recipes(out, described))


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A gallery recipe.", autocompletion=complete)],
) -> None:
    """Print a gallery recipe as YAML, as a starting point for your own recipe."""
    with session(context.obj) as current:
        from memrewrite.recipes.gallery_index import describe, gallery

        describe(name)  # raises for an unknown name
        current.write(gallery()[name].rstrip())


@app.command()
def schema(context: typer.Context) -> None:
    """Print the JSON schema of recipes, for completion and checks in editors."""
    with session(context.obj) as current:
        from memrewrite.recipes.json_schema import json_schema

        current.write(json.dumps(json_schema(), indent=2))
