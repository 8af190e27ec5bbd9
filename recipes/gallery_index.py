"""The recipes that come with the package: names, texts and descriptions.

Flow: the files of `gallery/` → text by name; the first comment line of a file is its description.
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
    """The purpose of a gallery recipe, in one line. Raises `RecipeError` for an unknown name."""
    texts = gallery()
    if name not in texts:
        raise RecipeError(f"no gallery recipe is named {name!r}", hint=did_you_mean(name, texts) or one_of(texts))
    return texts[name].splitlines()[0].lstrip("# ").rstrip()


@cache
def _texts() -> tuple[tuple[str, str], ...]:
    found = [file for file in files("memrewrite.recipes.gallery").iterdir() if file.name.endswith(".yaml")]
    return tuple(sorted((file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")) for file in found))
