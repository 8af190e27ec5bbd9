"""Plain scalars of recipes are read as YAML 1.2 reads them, and what YAML 1.1 reads differently is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from memrewrite.errors import RecipeError
from memrewrite.recipes.yaml_scalars import Writer
from memrewrite.recipes.yaml_source import Source, read_document

READ = {
    "0": 0,
    "-0": 0,
    "+1": 1,
    "-17": -17,
    "0x1F": 31,
    "1e3": 1000.0,
    "1E-3": 0.001,
    "1.5e+3": 1500.0,
    ".5": 0.5,
    "-.5": -0.5,
    "5.": 5.0,
    "01.5": 1.5,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "~": None,
    "": None,
    "Null": None,
    "TRUE": True,
    "False": False,
    "yes": "yes",
    "off": "off",
    "y": "y",
    "=": "=",
    "1.2.3": "1.2.3",
    "_1": "_1",
    "0x": "0x",
    "2024-01-01": "2024-01-01",
    "'010'": "010",
    "!!str 010": "010",
    "!!int '10'": 10,
    "!!float 1": 1.0,
}
AMBIGUOUS = [
    *("010", "-07", "+01", "00", "08", "0o10", "0b1", "-0b1", "-0x10", "0x1_0"),
    *("1_000", "1__", "1:30", "-1:30", "1:30:15", "190:20:30.15", "1:30.5", "1_0.5", "0.1_5", ".1_5", "1_0e3"),
]
# Transcribed from YAML 1.2.2, chapter 10.3.2 (core schema).
CORE = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
}


def read(text: str) -> Any:
    return read_document(Source("r.yaml", f"a: {text}\n")).data["a"]


@pytest.mark.parametrize("text", READ)
def test_what_has_one_meaning_is_read(text: str) -> None:
    assert read(text) == READ[text]
    assert type(read(text)) is type(READ[text])


def test_not_a_number_is_read() -> None:
    assert math.isnan(read(".nan"))


@pytest.mark.parametrize("text", AMBIGUOUS)
@pytest.mark.parametrize("place", ["a: {}\n", "a: [1, {}]\n", "{}: 1\n"])
def test_what_has_two_meanings_is_refused_with_its_place(text: str, place: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_document(Source("r.yaml", place.format(text)))
    message = str(caught.value)
    assert f"`{text}` has more than one meaning" in message
    assert f"r.yaml:1:{place.index('{}') + 1}\n" in message
    assert "decimal digits" in message


@pytest.mark.parametrize(
    "text", ["!!int 010", "!!int 1:30", "!!bool yes", "!!null x", "!!float 1_0", "9" * 101, "0x" + "f" * 200]
)
def test_what_is_not_of_its_type_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read as"):
        read(text)


@given(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none())
@settings(deadline=None)
def test_a_plain_value_is_read_as_itself(value: Any) -> None:
    words = {"True": "true", "False": "false", "None": "null", "inf": ".inf", "-inf": "-.inf"}
    text = words.get(repr(value), repr(value))
    assert read(text) == value
    assert type(read(text)) is type(value)


@given(st.text(alphabet="0123456789abefoxEinNuUltTr_.:+-~", max_size=12))
@settings(max_examples=300, deadline=None)
def test_a_scalar_is_what_the_specification_says_or_is_refused(text: str) -> None:
    kind = next((name for name, pattern in CORE.items() if re.fullmatch(pattern, text)), "str")
    try:
        value = read(text)
    except RecipeError as error:
        assert re.search("more than one meaning|not YAML|`:` is missing|cannot be|mapping", str(error))  # noqa: PT017
        return
    if isinstance(value, str | int | float | bool) or value is None:
        names = {str: "str", int: "int", float: "float", bool: "bool", type(None): "null"}
        assert names[type(value)] == kind
        by_1_1 = yaml.safe_load(f"a: {text}\n")["a"]
        if isinstance(value, int | float) and isinstance(by_1_1, int | float):  # where both see a number, it is one number
            assert value == by_1_1 or value != value


@given(
    st.text(max_size=12) | st.from_regex(r"[-+]?[0-9_.:eEox]{1,8}", fullmatch=True) | st.integers() | st.floats(allow_nan=False)
)
@settings(max_examples=300, deadline=None)
def test_what_is_written_is_read_alike_by_both_versions(value: Any) -> None:
    text = yaml.dump({"a": value}, Dumper=Writer)
    assert read_document(Source("r.yaml", text)).data == yaml.safe_load(text) == {"a": value}


def test_merges_keep_their_order() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: [*a, {x: 9, z: 4}], y: 5}\n"
    document = read_document(Source("r.yaml", text))
    assert document.data["b"] == {"x": 3, "y": 2}
    assert document.data["c"] == {"x": 1, "y": 5, "z": 4}
    assert document.values[("b", "x")].line == 2
    assert document.values[("b", "y")].line == 1
    with pytest.raises(RecipeError, match="appears twice"):
        read_document(Source("r.yaml", "a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}\n"))
