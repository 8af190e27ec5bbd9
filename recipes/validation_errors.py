"""What is wrong with a recipe, in plain words: pydantic's errors become `Problem`s with a location and a hint.

Flow: a `ValidationError` → one `Problem` per error in it: same location, reworded message, a hint from the schema.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

Loc = tuple[str | int, ...]

_LARGE = 192  # bits: 58 digits
_WORDS_FOR_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}  # in YAML 1.1

_REFUSED = "recipe"  # the error type of our own validators
_SHAPES = {  # first word of pydantic's error type → what was expected
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping (`key: value`)",
    "mapping": "a mapping (`key: value`)",
    "model": "a mapping (`key: value`)",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


@dataclass(frozen=True)
class Problem:
    """One error: its location in the data, what is wrong, what to try, and whether the key (not its value) is wrong."""

    loc: Loc
    what: str
    hint: str
    at_key: bool = False


def refused(what: str, hint: str, *, key: bool = False) -> PydanticCustomError:
    """The error that a validator raises, in our message format; `key`: the key is wrong, not its value."""
    return PydanticCustomError(_REFUSED, "{what}", {"what": what, "hint": hint, "key": key})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the most similar known word, or "" if none is similar."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def one_of(known: Iterable[str]) -> str:
    """A hint that lists the known words."""
    return "one of " + ", ".join(repr(word) for word in known)


def problems_of(error: ValidationError, model: type[BaseModel], data: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Every error in `error`, raised when validating `data` as `model`, in plain words."""
    lines = [line for line in error.errors(include_url=False) if not _miscounted(line)]
    found = [_problem(line, model, data) for line in lines]
    typos = [(p.loc[:-1], p.hint) for line, p in zip(lines, found, strict=True) if line["type"] == "extra_forbidden"]
    # `kyes: 8` is one mistake, not an unknown key and a missing one
    explained = {(*around, name) for around, hint in typos for name in re.findall(r"^did you mean '(.*)'", hint)}
    kept = tuple(p for line, p in zip(lines, found, strict=True) if line["type"] != "missing" or p.loc not in explained)
    # for a file of another format version, only the version is reported
    return tuple(p for p in kept if p.loc == ("memrewrite",) and "version" in p.what) or kept


def _miscounted(line: ErrorDetails) -> bool:
    """True for a wrong "too short": pydantic counts only the valid items of a list."""
    return line["type"] == "too_short" and len(line["input"]) >= line["ctx"]["min_length"]


def _problem(line: ErrorDetails, model: type[BaseModel], data: Mapping[str, Any]) -> Problem:
    loc, kind, context = tuple(line["loc"]), line["type"], line.get("ctx", {})
    if kind == _REFUSED:
        return Problem(loc, context["what"], context["hint"], at_key=context["key"])
    at_key = bool(loc) and loc[-1] == "[key]"
    loc = loc[:-1] if at_key else loc
    names = [step for step in loc if isinstance(step, str)]
    name = names[-1] if names else "the recipe"
    fields = fields_at(loc[:-1], model, data)
    if kind == "extra_forbidden":
        hint = did_you_mean(name, fields) or f"the keys known here are {', '.join(fields) or 'none'}"
        return Problem(loc, f"unknown key {name!r}", hint, at_key=True)
    about = fields.get(name, "")
    if kind == "missing":
        return Problem(loc, f"`{name}` is missing", f"add `{name}:` · {about}".removesuffix(" · "))
    if kind == "literal_error":
        words = [str(word) for word in _literals(context["expected"])]
        hint = did_you_mean(str(line["input"]), words) or one_of(words)
        return Problem(loc, f"`{name}` cannot be {shown(line['input'])}", hint)
    if kind == "bool_type" and (word := _WORDS_FOR_BOOLEANS.get(str(line["input"]).lower())):
        about = f"write `{word}`"
    return Problem(loc, f"`{name}` {_complaint(line)}", about or "see the recipe's schema", at_key=at_key)


def _complaint(line: ErrorDetails) -> str:
    """Pydantic's message about a value, in plain words."""
    kind, context = line["type"], line.get("ctx", {})
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]}, not {shown(line['input'])}"
    if kind == "invalid_key":
        return "has a key that is not text"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters, not {len(line['input'])}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} item(s)"
    if kind.partition("_")[0] in _SHAPES:
        return f"must be {_SHAPES[kind.partition('_')[0]]}, not {shown(line['input'])}"
    return f"is refused: {line['msg'].removeprefix('Value error, ')}"


def shown(value: Any) -> str:
    """A value as written in YAML, shortened."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and value.bit_length() > _LARGE:  # Python refuses to write more than 4300 digits
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fields_at(loc: Loc, model: type[BaseModel], data: Any) -> dict[str, str]:
    """Names and descriptions of the fields of the pydantic model at `loc` in `data`."""
    for index, step in enumerate(loc):
        value = _value_at(data, loc[:index])
        fields = {_name(name, field): field for name, field in model.model_fields.items()}
        if step == "options" and isinstance(value, Mapping):
            model = _options_model(value) or model
        elif isinstance(step, str) and step in fields:
            model = next(_models_in(fields[step].annotation), model)
    return {_name(name, field): field.description or "" for name, field in model.model_fields.items()}


def _options_model(rule: Mapping[str, Any]) -> type[BaseModel] | None:
    from memrewrite.layers.kinds import KINDS

    name = rule.get("with", rule.get("with_"))
    return next((kind.Options for kind in KINDS if kind.kind == name), None)


def _name(name: str, field: Any) -> str:
    return field.validation_alias if isinstance(field.validation_alias, str) else name


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _value_at(data: Any, loc: Loc) -> Any:
    for step in loc:
        inside = step in data if isinstance(data, Mapping) else isinstance(data, list | tuple) and isinstance(step, int)
        if not inside:
            return None
        data = data[step]
    return data


def _literals(expected: str) -> list[str]:
    """The allowed words, from pydantic's text `'a', 'b' or 'c'`."""
    return [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
