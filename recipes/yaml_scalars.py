"""Plain YAML scalars as values: the core schema of YAML 1.2, without the spellings that YAML 1.1 readers read differently.

Flow: `RESOLVERS` gives a plain scalar its tag when it is read, and tells the writer which text needs quotes → `scalar`
gives the value. `010` is ten in YAML 1.2 and eight in YAML 1.1: such a spelling is an error, never a value.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
AMBIGUOUS = "tag:memrewrite,2026:ambiguous"
MAX_CHARACTERS = 100  # of a number

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_MERGE = re.compile(r"<<\Z")
_READ_DIFFERENTLY = re.compile(
    r"""(?:[-+]?0[0-9_]+                                    # a leading zero: octal in 1.1, decimal in 1.2
        |[-+]?0o[0-7_]+                                     # text in 1.1, octal in 1.2
        |[-+]?0b[01_]+                                      # binary in 1.1, text in 1.2
        |[-+]?0x[0-9a-fA-F_]+                               # with a sign or `_`: hexadecimal in 1.1, text in 1.2
        |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?   # base 60 in 1.1, text in 1.2
        |[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9_]+)?   # `_` between digits: a number in 1.1, text in 1.2
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9_]+)?)\Z""",
    re.VERBOSE,
)

# In this order: what one of the first patterns matches is read alike by both versions, or only YAML 1.2 has it as a number
# (`1e3`). `yes`, `no`, `on` and `off` are text, as in YAML 1.2; a field that needs a boolean refuses them.
_BY_TAG = (
    (TAG + "merge", _MERGE, "<"),
    (TAG + "null", _NULL, "~nN"),
    (TAG + "bool", _BOOL, "tTfF"),
    (TAG + "int", _INT, "-+0123456789"),
    (AMBIGUOUS, re.compile(r"(?:[-+]?0[0-9_]+|[-+]?0o[0-7_]+)\Z"), "-+0"),
    (TAG + "float", _FLOAT, "-+.0123456789"),
    (AMBIGUOUS, _READ_DIFFERENTLY, "-+.0123456789"),
)
RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {"": [(TAG + "null", _NULL)]}
for _tag, _pattern, _first in _BY_TAG:
    for _character in _first:
        RESOLVERS.setdefault(_character, []).append((_tag, _pattern))


class Writer(yaml.SafeDumper):
    """Writes text in quotes where YAML 1.1 or 1.2 would read something else: both read what it writes alike."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - declared by PyYAML
        first: RESOLVERS.get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        for first in RESOLVERS.keys() | yaml.SafeDumper.yaml_implicit_resolvers.keys()
    }


def scalar(tag: str, text: str) -> Any:
    """The value of a scalar with a tag of `RESOLVERS`. Raises ValueError if the text is not of that type."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a number has at most {MAX_CHARACTERS} characters")
    if tag == TAG + "null" and _NULL.match(text):
        return None
    if tag == TAG + "bool" and _BOOL.match(text):
        return text.lower() == "true"
    if tag in (TAG + "int", TAG + "float") and _INT.match(text):
        number = int(text, 16 if text.startswith("0x") else 10)
        return number if tag == TAG + "int" else float(number)
    if tag == TAG + "float" and _FLOAT.match(text):
        return float(text.replace(".i", "i").replace(".I", "I").replace(".n", "n").replace(".N", "N"))
    raise ValueError(f"this is not the plain form of a value of type {tag.removeprefix(TAG)}")
