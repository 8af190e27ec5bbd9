"""Structures of arguments and outputs (`TreeSpec`) as JSON of tuples, lists and dicts; no class is imported to read one.

`"*"` is a leaf. A structure is an object with one key: `tuple`, `list` or `size` with a list of structures, `dict` or
`ordered_dict` with a list of pairs of a key and a structure, or the name of a class of outputs (`ModelOutput`) with such pairs.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import StrictInt, StrictStr, TypeAdapter, ValidationError
from torch.utils import _pytree
from torch.utils._pytree import TreeSpec, tree_structure

from memrewrite.errors import ModelError
from memrewrite.passes.storage.graph_data.fields import Malformed, shown

LEAF = "*"
SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
MAPPINGS: dict[str, type[Any]] = {"dict": dict, "ordered_dict": OrderedDict}
KEYS: TypeAdapter[list[StrictStr | StrictInt] | None] = TypeAdapter(list[StrictStr | StrictInt] | None)  # of a context
FORMAT_1 = {  # torch's names
    "builtins.tuple": "tuple",
    "builtins.list": "list",
    "torch.Size": "size",
    "builtins.dict": "dict",
    "collections.OrderedDict": "ordered_dict",
}


def spec_to_data(spec: TreeSpec) -> Any:
    """A structure as JSON. Raises `ModelError` for a class that cannot be written."""
    if spec.is_leaf():
        return LEAF
    children = [spec_to_data(child) for child in spec.children()]
    name = next((n for n, kind in {**SEQUENCES, **MAPPINGS, **_outputs()}.items() if kind is spec.type), None)
    if name in SEQUENCES:
        return {name: children}
    if name is None or not all(type(key) in (str, int) for key in spec.context):
        kind = spec.context if isinstance(spec.context, type) else spec.type  # the context of a named tuple is its class
        what = f"an argument or output of the class {getattr(kind, '__qualname__', kind)} cannot be saved in a graph"
        raise ModelError(what, hint="use tuples, lists, and dicts whose keys are text")
    return {name: [list(pair) for pair in zip(spec.context, children, strict=True)]}


def spec_from_data(data: Any) -> TreeSpec:
    """A structure of `spec_to_data`. Raises `Malformed`."""
    if data == LEAF:
        return tree_structure(0)
    if not isinstance(data, dict) or len(data) != 1:
        raise Malformed(f"{shown(data)} is no structure of arguments")
    ((name, items),) = data.items()
    if not isinstance(items, list):
        raise Malformed(f"the structure {shown(name)} must have a list")
    if name in SEQUENCES:
        return TreeSpec(SEQUENCES[name], None, [spec_from_data(item) for item in items])
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in items):
        raise Malformed(f"the structure {shown(name)} must have pairs of a key and a structure")
    return _mapping(name, [key for key, _ in items], [spec_from_data(item) for _, item in items])


def spec_from_format_1(data: Any) -> TreeSpec:
    """A structure in `torch.utils._pytree.treespec_dumps`'s JSON, which format 1 has. Raises `Malformed`."""
    if not isinstance(data, list) or len(data) != 2 or type(data[0]) is not int or data[0] != 1:
        raise Malformed(f"{shown(data)} is no structure of arguments")
    return _from_format_1(data[1])


def _from_format_1(data: Any) -> TreeSpec:
    if not isinstance(data, dict) or set(data) != {"type", "context", "children_spec"}:
        raise Malformed(f"{shown(data)} is no structure of arguments")
    name, context, children = data["type"], data["context"], data["children_spec"]
    if not isinstance(children, list):
        raise Malformed(f"the structure {shown(name)} must have a list")
    if name is None:
        if context is not None or children:
            raise Malformed("a leaf has no parts")
        return tree_structure(0)
    if not isinstance(name, str) or not isinstance(context, str):
        raise Malformed(f"the structure {shown(name)} must have a name and a context")
    name, below = FORMAT_1.get(name, name), [_from_format_1(child) for child in children]
    try:
        keys = KEYS.validate_json(context)
    except ValidationError:
        raise Malformed(f"the context of the structure {shown(name)} must be a list of texts or integers, or null") from None
    if name in SEQUENCES:
        if keys is not None:
            raise Malformed(f"the structure {shown(name)} has no context")
        return TreeSpec(SEQUENCES[name], None, below)
    if keys is None or len(keys) != len(below):
        raise Malformed(f"the structure {shown(name)} must have one key for each part")
    return _mapping(name, keys, below)


def _mapping(name: str, keys: Sequence[Any], children: list[TreeSpec]) -> TreeSpec:
    kind = MAPPINGS.get(name) or _outputs().get(name)
    if kind is None:
        raise Malformed(f"the structure {shown(name)} is none that can be read here; build the base model first")
    if not all(type(key) in (str, int) for key in keys) or len(set(keys)) < len(keys):
        raise Malformed(f"the keys of the structure {shown(name)} must be different texts or integers")
    if name not in MAPPINGS:
        unknown = set(keys) - {field.name for field in dataclasses.fields(kind)}
        if unknown:
            raise Malformed(f"{shown(name)} has no field {shown(unknown.pop())}")
    return TreeSpec(kind, list(keys), children)


def _outputs() -> dict[str, type[Any]]:
    """The dataclasses that are dicts (Hugging Face's `ModelOutput`) and that are registered with torch now, by name."""
    registered = _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items()
    return {
        n: kind
        for n, kind in registered
        if isinstance(kind, type) and issubclass(kind, dict) and dataclasses.is_dataclass(kind)
    }
