"""The recipes that come with the package: their names, their text, and what each says of itself.

The files of `gallery/` → text by name; the first comment line of a file is its description.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from memrewrite.errors import RecipeError
from memrewrite.recipes.validation_errors import did_you_mean, one_of


def gallery() -> dict[str, str]:
    """The YAML text of every gallery recipe by name, sorted by name."""
    return dict(_texts())


def describe(name: str) -> str:
    """What a gallery recipe is for, in one line."""
    shelf = gallery()
    if name not in shelf:
        raise RecipeError(f"no gallery recipe is named {name!r}", hint=did_you_mean(name, shelf) or one_of(shelf))
    return shelf[name].splitlines()[0].lstrip("# ").rstrip()


@cache
def _texts() -> tuple[tuple[str, str], ...]:
    found = [file for file in files("memrewrite.recipes.gallery").iterdir() if file.name.endswith(".yaml")]
    return tuple(sorted((file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")) for file in found))
