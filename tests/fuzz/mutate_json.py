"""One random change of a JSON or YAML file: of its tree, where it has one, else of its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

from .hostile import Hostile
from .mutate_bytes import change_bytes

Slot = tuple[Any, Any]  # a container and a key or index in it
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308)
# text that no value has: a value is replaced by its key here, and the key in the written text by the text itself
JSON_TEXT = {
    "zqraw0": "NaN",
    "zqraw1": "-Infinity",
    "zqraw2": "1e400",
    "zqraw3": "9" * 5_000,
    "zqraw4": "[" * 1_000 + "]" * 1_000,
    "zqraw5": "[" * 100_000 + "]" * 100_000,
    "zqraw6": '{"a":' * 50_000 + "0" + "}" * 50_000,
    "zqraw7": "[" * 30,
    "zqraw8": "01",
    "zqraw9": "True",
}
YAML_TEXT = {
    **JSON_TEXT,
    "zqraw8": "010",
    "zqraw9": "1:30:59",
    "zqrawa": "!!python/name:os.system ''",
    "zqrawb": "!!binary aGk=",
    "zqrawc": "&a [*a]",
    "zqrawd": "*nothing",
    "zqrawe": "2001-01-01",
    "zqrawf": "&b [&c [1, 1], *c, *c, *c, *c]",
    "zqrawg": "!!set {a, b}",
    "zqrawh": "{<<: {keys: 4}, keys: 8}",
    "zqrawi": "0x10",
    "zqrawj": "1_000",
    "zqrawk": "&d [&e [&f [&g [1,1,1,1,1,1,1,1,1], *g,*g,*g,*g,*g,*g,*g], *f,*f,*f,*f,*f,*f], *e,*e,*e,*e,*e]",
}


def change_json(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """One change of a JSON document; `other` is another file, whose subtrees and bytes are mixed in."""
    try:
        tree, donor = json.loads(data), json.loads(other)
    except (ValueError, RecursionError):
        return change_bytes(rng, data, other, words)
    if rng.random() < 0.1:
        return change_bytes(rng, data, other, words)
    if rng.random() < 0.06:
        return _duplicate_key(rng, data)
    tree = change_tree(rng, tree, donor, words, JSON_TEXT)
    return _written(json.dumps(tree, indent=1), JSON_TEXT)


def change_yaml(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """One change of a YAML document; of one with aliases, as bytes: written as JSON they may expand to any size."""
    if b"&" in data or b"&" in other:
        return change_bytes(rng, data, other, words)
    try:
        tree, donor = yaml.safe_load(data), yaml.safe_load(other)
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError, TypeError):
        return change_bytes(rng, data, other, words)
    if rng.random() < 0.15:
        return change_bytes(rng, data, other, words)
    tree = change_tree(rng, tree, donor, words, YAML_TEXT)
    try:
        text = (
            yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if rng.random() < 0.5 else json.dumps(tree, default=str)
        )
    except (yaml.YAMLError, TypeError, RecursionError, ValueError):
        return change_bytes(rng, data, other, words)
    return _written(text, YAML_TEXT)


def _written(text: str, raw: dict[str, str]) -> bytes:
    for key, value in raw.items():
        text = text.replace(f'"{key}"', value).replace(key, value)
    return text.encode("utf-8", "surrogatepass")


def _duplicate_key(rng: Random, data: bytes) -> bytes:
    """A key that is written twice, with different values."""
    places = [i for i in range(len(data)) if data[i : i + 3] == b'": ']
    if not places:
        return data
    end = rng.choice(places)
    start = data.rfind(b'"', 0, end)
    return data[:start] + data[start : end + 1] + rng.choice([b": null, ", b": 1, ", b': "zqy", ']) + data[start:]


def change_tree(rng: Random, tree: Any, donor: Any, words: Hostile, raw: dict[str, str]) -> Any:
    """A tree with one change; `donor` is another tree."""
    root = [tree]
    slots, gifts = slots_of(root), slots_of([donor])
    changes: tuple[Callable[[Random, list[Slot], list[Slot], Hostile, dict[str, str]], None], ...] = (
        _other_type,
        _number,
        _word,
        _word,
        _part_word,
        _delete,
        _rename,
        _swap,
        _copy,
        _copy,
        _insert,
        _insert,
        _raw,
        _repeat,
    )
    rng.choice(changes)(rng, slots, gifts, words, raw)
    return root[0]


def slots_of(tree: Any) -> list[Slot]:
    """Every place in a tree that holds a value."""
    found: list[Slot] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                todo.append(node[key])
    return found


def _get(slot: Slot) -> Any:
    return slot[0][slot[1]]


def _set(slot: Slot, value: Any) -> None:
    slot[0][slot[1]] = value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _of(rng: Random, slots: list[Slot], kind: type | tuple[type, ...]) -> Slot:
    """A place with a value of this type; any place where there is none."""
    return rng.choice([slot for slot in slots if isinstance(_get(slot), kind)] or slots)


def _other_type(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    _set(rng.choice(slots), rng.choice([None, True, False, 0, 1.5, "zqy", "", [], {}, [[]], {"": {}}]))


def _number(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    slot = _of(rng, slots, (int, float))
    value = _get(slot)
    near = (value - 1, value + 1, -value, value * 2) if isinstance(value, (int, float)) else ()
    _set(slot, rng.choice((*NUMBERS, *near, *near)))


def _word(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    _set(_of(rng, slots, str), rng.choice(words.words))


def _part_word(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    slot, word = _of(rng, slots, str), rng.choice(words.words)
    text = str(_get(slot))
    cut = rng.randint(0, len(text))
    _set(slot, text[:cut] + word + text[cut:])


def _delete(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    node, key = rng.choice(slots)
    del node[key]
    if isinstance(node, list) and not node:
        node.append(None)  # the list that holds the root is never empty


def _rename(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    node, key = _of_dict(rng, slots)
    others = [str(k) for n, k in slots if isinstance(n, dict)]
    if isinstance(node, dict):
        node[rng.choice([rng.choice(words.words), rng.choice(others)])] = node.pop(key)


def _of_dict(rng: Random, slots: list[Slot]) -> Slot:
    return rng.choice([slot for slot in slots if isinstance(slot[0], dict)] or slots)


def _swap(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    one, other = rng.choice(slots), rng.choice(slots)
    a, b = _plain(_get(one)), _plain(_get(other))
    _set(one, b)
    _set(other, a)


def _copy(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    target, source = rng.choice(slots), rng.choice(slots if rng.random() < 0.5 else gifts)
    value = _plain(_get(source))
    if isinstance(target[0], list) and rng.random() < 0.5:
        target[0].insert(target[1], value)
    else:
        _set(target, value)


def _insert(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    fitting = [(value, slot) for value in words.values for slot in slots if _is_like(slot[0], value)]
    if fitting and rng.random() < 0.8:  # where an object or list of this form belongs
        value, (node, key) = rng.choice(fitting)
    else:
        value, (node, key) = rng.choice(words.values), rng.choice(slots)
    value = _plain(value)
    if isinstance(node, list) and rng.random() < 0.7:
        node.insert(key, value)
    elif isinstance(node, dict) and isinstance(value, dict) and rng.random() < 0.8:
        node.update(value)
    else:
        node[key] = value


def _is_like(node: Any, value: Any) -> bool:
    """Whether `node` is an object with some of the keys of `value`, or a list of such objects or of lists of its length."""
    if isinstance(node, dict) and isinstance(value, dict):
        return len(node.keys() & value.keys()) * 2 > len(value)
    if not isinstance(node, list) or not node:
        return False
    first = node[0]
    if isinstance(value, list):
        return isinstance(first, list) and len(first) == len(value)
    return isinstance(first, dict) and bool(first.keys() & value.keys())


def _raw(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    _set(rng.choice(slots), rng.choice(list(raw)))


def _repeat(rng: Random, slots: list[Slot], gifts: list[Slot], words: Hostile, raw: dict[str, str]) -> None:
    node, key = rng.choice(slots)
    if isinstance(node, list):
        node.extend(_plain(node[key]) for _ in range(rng.choice([1, 2, 100])))
    else:
        node.update({f"{key}{number}": _plain(node[key]) for number in range(rng.choice([1, 2, 100]))})
