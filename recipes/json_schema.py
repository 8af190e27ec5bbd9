"""The JSON schema of recipes, for completion and checks in editors.

Flow: schema of `Recipe` → options of the layer kinds added as definitions → one if-then per kind, selected by `with`.
"""

from __future__ import annotations

from inspect import getdoc
from typing import Any

from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import KINDS
from memrewrite.recipes.schema import Recipe

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REF = "#/$defs/{model}"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the options of every layer kind, as a dict."""
    schema = Recipe.model_json_schema(by_alias=True, ref_template=_REF)
    definitions: dict[str, Any] = schema["$defs"]
    rule = definitions["Rule"]
    kinds = [{"const": kind.kind, "description": _sentence(kind)} for kind in KINDS]
    rule["properties"]["with"] = {"description": "The layer kind.", "oneOf": kinds}
    rule["allOf"] = [_options_of(kind, definitions) for kind in KINDS]
    definitions["Where"]["minProperties"] = 1
    return {"$schema": _DIALECT, **schema, "title": "memrewrite recipe"}


def _options_of(kind: type[MemoryLayer], definitions: dict[str, Any]) -> dict[str, Any]:
    """The if-then of one kind: its options, whether it needs a pool, and whether it can be added to an MLP.

    Nested definitions move to the top level.
    """
    name = f"{kind.kind}_options"
    options = kind.Options.model_json_schema(by_alias=True, ref_template=f"#/$defs/{name}_{{model}}")
    for inner, definition in options.pop("$defs", {}).items():
        definitions[f"{name}_{inner}"] = definition
    definitions[name] = options
    then: dict[str, Any] = {"properties": {"options": {"$ref": f"#/$defs/{name}"}}}
    if kind.uses_pool:
        then["required"] = ["pool"]
    else:
        then["properties"]["pool"] = {"type": "null"}
    if kind.replaces_only:
        then["properties"]["placement"] = {"const": "replace"}
    return {"if": {"properties": {"with": {"const": kind.kind}}, "required": ["with"]}, "then": then}


def _sentence(kind: type[MemoryLayer]) -> str:
    return (getdoc(kind) or kind.kind).split("\n\n")[0].replace("\n", " ")
