"""Reads a recipe from a gallery name, a file, text, a mapping or a `Recipe`.

Flow: source → data with line numbers (`yaml_source`) → schema → a `Recipe`, or one `RecipeError` with every problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from memrewrite.errors import RecipeError
from memrewrite.recipes.gallery_index import gallery
from memrewrite.recipes.schema import Recipe
from memrewrite.recipes.validation_errors import Loc, Problem, did_you_mean, one_of, problems_of
from memrewrite.recipes.yaml_source import MAX_BYTES, MOST_QUOTED, Document, Source, decode, read_document

LISTED = 20  # problems after the first that an error lists

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe  # gallery name or path, path, mapping, recipe
Place = Callable[[Problem], tuple[str, str]]  # problem → its location, and an excerpt of the text there


def read_recipe(source: RecipeLike) -> Recipe:
    """Read a recipe.

    Args:
        source: Name of a gallery recipe, path of a YAML file, a mapping, or a `Recipe` (returned unchanged).

    Raises:
        RecipeError: The recipe cannot be read or is invalid; the message lists every problem with its location.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), _place_in_mapping)
    if not _is_path(source):
        hint = "give a gallery name, a path, a mapping or a Recipe"
        raise RecipeError(f"a recipe cannot be read from {type(source).__name__}", hint=hint)
    if isinstance(source, str) and source in (texts := gallery()):
        return parse_recipe(texts[source], name=f"gallery:{source}")
    return _recipe_in(decode(os.fspath(source), _bytes_of(source)))


def parse_recipe(text: str, *, name: str = "<text>") -> Recipe:
    """Read a recipe from YAML text.

    Args:
        text: The YAML text.
        name: File name to print in error messages.

    Raises:
        RecipeError: The recipe is invalid; the message lists every problem with its location.
    """
    return _recipe_in(Source(name, text))


def _recipe_in(source: Source) -> Recipe:
    document = read_document(source)

    def place(problem: Problem) -> tuple[str, str]:
        span = document.span(problem.loc, at_key=problem.at_key)
        return source.at(span), source.excerpt(span)

    return _validated(document.data, place, document)


def _is_path(source: object) -> bool:  # a caller without a type checker may pass any type
    return isinstance(source, str | os.PathLike)


def _bytes_of(source: str | os.PathLike[str]) -> bytes:
    """The first MAX_BYTES + 1 bytes of the file: enough to detect that it is too large."""
    try:
        with Path(source).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        _fail_unknown(os.fspath(source))
    except IsADirectoryError:
        raise RecipeError(f"{os.fspath(source)!r} is a directory", hint="name the recipe file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        _fail_unreadable(os.fspath(source), error)


def _fail_unknown(name: str) -> NoReturn:
    names = list(gallery())
    if "\n" in name:
        raise RecipeError("expected a path, not text of several lines", hint="read text with `parse_recipe`")
    hint = did_you_mean(Path(name).stem, names) or f"a path that exists, or a recipe of the gallery: {one_of(names)}"
    raise RecipeError(f"the path {name!r} does not exist, and no gallery recipe has this name", hint=hint) from None


def _fail_unreadable(name: str, error: Exception) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    shown = name if len(name) <= 100 else name[:97] + "..."
    raise RecipeError(f"{shown!r} cannot be read: {reason}", hint="check the path and its permissions") from None


def _validated(data: dict[str, Any], place: Place, document: Document | None = None) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = problems_of(error, Recipe, data)
    if document is not None:  # in a file, list problems from top to bottom
        problems = tuple(sorted(problems, key=lambda p: document.span(p.loc, at_key=p.at_key)))
    raise _error_of(problems, place)


def _error_of(problems: Sequence[Problem], place: Place) -> RecipeError:
    """All problems in one error: the first with its line and a caret, the others one line each."""
    first, *others = problems
    where, excerpt = place(first)
    what, hint = _short(first.what), first.hint
    if others:
        listed = [f"    {_short(place(problem)[0])} · {_short(problem.what)} · {problem.hint}" for problem in others[:LISTED]]
        listed += [f"    and {len(others) - LISTED} more"] if len(others) > LISTED else []
        hint += "\n" + "\n".join([f"  and {len(others)} more:", *listed])
    return RecipeError(what, where=f"{_short(where)}\n{excerpt}" if excerpt else _short(where), hint=hint)


def _short(text: str) -> str:
    """Text that may quote a recipe at length, cut."""
    return text if len(text) <= MOST_QUOTED else text[: MOST_QUOTED - 3] + "..."


def _place_in_mapping(problem: Problem) -> tuple[str, str]:
    return dotted(problem.loc), ""


def dotted(loc: Loc) -> str:
    """A location in data, written as in Python: `replace[0].with`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return text.lstrip(".") or "the recipe"
