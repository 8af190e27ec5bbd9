"""Arguments and options that several commands share, and the loading of the model and the recipe that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memrewrite.cli import recipes

if TYPE_CHECKING:
    from memrewrite.cli.session import Session
    from memrewrite.passes.storage.source import ModelSource
    from memrewrite.recipes.schema import Recipe

MODEL_HELP = (
    "model.py (defines `build()` or `model`, and `inputs`), file.py:name, package.module:name, a Hugging Face directory,"
    " a .gguf or .pt2 file, or a directory saved by memrewrite."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a gallery recipe.",
        autocompletion=recipes.complete,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and no tables.")]
Trust = Annotated[
    bool, typer.Option("--trust-code", help="Allow running Python code and unpickling objects stored with the model.")
]

Inexact = Annotated[
    bool,
    typer.Option("--allow-inexact", help="Accept an exported program that computes something else than the model."),
]


def read_recipe(current: Session, recipe: str) -> Recipe:
    """Read the recipe from a file or the gallery."""
    current.step("reading the recipe")
    from memrewrite.recipes import reader

    return reader.read_recipe(recipe)


def load_model(current: Session, model: str, trust_code: bool, *, with_tokenizer: bool = False) -> ModelSource:
    """Load the model that MODEL names, and its example inputs."""
    current.step("loading the model")
    from memrewrite.passes.storage.source import load_source

    return load_source(model, trust_code=trust_code, with_tokenizer=with_tokenizer)
