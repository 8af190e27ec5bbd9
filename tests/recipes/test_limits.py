"""Hostile recipes: large files, many problems, huge numbers and slow expressions are read or refused in a short time."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from memrewrite.errors import RecipeError
from memrewrite.recipes.field_types import MAX_SIZE
from memrewrite.recipes.reader import LISTED, parse_recipe, read_recipe
from memrewrite.recipes.regex_limits import too_slow
from memrewrite.recipes.schema import MAX_KEYS
from memrewrite.recipes.yaml_source import MAX_BYTES

SECONDS = 5.0  # each takes less than one; a loaded machine is slower
RULE = "  - {where: {all: true}, with: pkm, pool: shared}\n"
GOOD = """\
memrewrite: 1
pools:
  shared: {keys: 1024, init: paper}
replace:
  - where: {layers: [4]}
    with: pkm
    pool: shared
"""


def _listed(items: Any) -> str:
    return GOOD.replace("[4]", "[" + ", ".join(map(str, items)) + "]")


HOSTILE = {
    "one comment": GOOD + "#" * 240_000,
    "many comments": GOOD + "# abc\n" * 40_000,
    "long text": GOOD.replace("paper", "x" * 240_000),
    "long key": GOOD + "x" * 240_000 + ": 1\n",
    "long explicit key": GOOD.replace("    pool:", "    ? " + "pool" * 60_000 + "\n    : 1\n    pool:"),
    "long kind": GOOD.replace("pkm", "pkm" * 80_000),
    "long regex": GOOD.replace("layers: [4]", "regex: '" + "(a|bc)" * 40_000 + "'"),
    "escapes": GOOD.replace("paper", '"' + "\\x41" * 60_000 + '"'),
    "digits": GOOD.replace("1024", "9" * 240_000),
    "many rules": GOOD + RULE * 1100,
    "too many rules": GOOD + RULE * 4000,
    "many wrong rules": GOOD + RULE.replace("true", "tru").replace("with", "wth") * 1100,
    "unknown keys": GOOD + "".join(f"key_number_{i}: 1\n" for i in range(4900)),
    "unknown options": GOOD + "    options: {" + ",".join(f"heds{i}: 1" for i in range(4900)) + "}\n",
    "many pools": GOOD.replace("  shared:", "".join(f"  p{i}: {{kyes: a}}\n" for i in range(2400)) + "  shared:"),
    "many blocks": _listed(range(9900)),
    "one block often": _listed([1] * 9900),
    "negative blocks": _listed([-1] * 9900),
    "text as blocks": _listed("x" * 9900),
    "flow list": _listed(range(40_000)),
    "sequences": GOOD + "z: " + "[" * 120_000,
    "block sequences": GOOD + "z:\n  " + "- " * 100_000,
    "mappings": GOOD + "z: " + "{a: " * 50_000,
    "aliases": GOOD + "z: &a [1]\ny: [" + "*a," * 80_000 + "]\n",
    "anchors": GOOD + "z: [" + ",".join(f"&a{i} 1" for i in range(20_000)) + "]\n",
    "merges": GOOD.replace("  - where:", "  - &a\n    where:") + "  - {<<: *a}\n" * 900,
    "tags": GOOD + "z: " + "!a" * 100_000 + "\n",
    "a megabyte": GOOD + RULE * 20_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_large_recipe_is_read_or_refused_in_a_short_time(name: str) -> None:
    begun = time.process_time()
    try:
        parse_recipe(HOSTILE[name])
    except RecipeError as error:
        assert len(str(error)) < 20_000  # noqa: PT017
        assert len(str(error).splitlines()) < LISTED + 12  # noqa: PT017
    assert time.process_time() - begun < SECONDS


def test_problems_beyond_a_number_are_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_listed([-1] * 100))
    lines = str(caught.value).splitlines()
    assert "  and 99 more:" in str(caught.value)
    assert lines[-1] == f"    and {99 - LISTED} more"


def test_text_is_limited_as_a_file_is() -> None:
    parse_recipe(GOOD + "#" * (MAX_BYTES - len(GOOD)))
    with pytest.raises(RecipeError, match="too large"):
        parse_recipe(GOOD + "#" * (MAX_BYTES - len(GOOD) + 1))


def test_deep_nesting_is_refused_where_it_is_too_deep() -> None:
    with pytest.raises(RecipeError, match="nested too deeply") as caught:
        parse_recipe("a: " + "[" * 100)
    assert "<text>:1:23\n" in str(caught.value)


# --- numbers ------------------------------------------------------------------------------------------------------

FIELDS = {  # path in the recipe → its limits
    ("pools", "p", "keys"): (2, MAX_KEYS),
    ("pools", "p", "value_dim"): (1, MAX_SIZE),
    ("pools", "p", "seed"): (0, 2**63 - 1),
    ("replace", 0, "where", "d_model"): (1, MAX_SIZE),
    ("replace", 0, "where", "every"): (1, MAX_SIZE),
    ("replace", 0, "where", "layers", 0): (0, MAX_SIZE),
    ("replace", 0, "where", "centred", "count"): (1, MAX_SIZE),
    ("replace", 0, "where", "centred", "stride"): (1, MAX_SIZE),
    ("replace", 0, "options", "heads"): (1, 2**12),
    ("replace", 0, "options", "topk"): (2, 2**16),
    ("replace", 0, "options", "key_dim"): (2, 2**16),
    ("memrewrite",): (1, 1),
}
WRONG = [-1, -(2**63), 2**63, 2**64, 10**100, 10**5000, 1.0, 2.5, float("inf"), float("nan"), True, False, "8", "", "x", [], {}]


def with_value(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    where = {"layers": [3], "centred": {"count": 1, "stride": 1}, "every": 1}
    rule = {"where": where, "with": "pkm", "pool": "p", "options": {"heads": 1, "topk": 2, "qk_norm": False}}
    data: Any = {"memrewrite": 1, "pools": {"p": {"keys": MAX_KEYS}}, "replace": [rule]}
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_number_outside_of_its_limits_or_of_another_type_is_refused(path: tuple[str | int, ...]) -> None:
    least, most = FIELDS[path]
    begun = time.process_time()
    for value in (least, most):
        read_recipe(with_value(path, value))
    for value in [least - 1, most + 1, *WRONG]:
        with pytest.raises(RecipeError) as caught:
            read_recipe(with_value(path, value))
        assert caught.value.where
        assert len(str(caught.value)) < 1000
    assert time.process_time() - begun < SECONDS


# --- regular expressions ------------------------------------------------------------------------------------------

QUICK = [
    r"layers\.\d+\.(mlp|ffn)$",
    r".*\.mlp\..*",
    r"^encoder\.(\w+)\.mlp$",
    r"(a|b)*",
    r"(?:ab)*",
    r"a{1,4}",
    r"(?i)MLP",
    r"(?=a)b",
    r"(a)?(?(1)b|c)",
    "^(?:" + "|".join(f"layers\\.{i}\\.mlp" for i in range(300)) + ")$",
]
SLOW = [
    r"(a+)+$",
    r"(\w+\.?)*x",
    r"(x+x+)+y",
    r"(ab|a)*c",
    r"(ab|cd){30}",
    r".*.*.*.*",
    "a?" * 30,
    r"(?=(a+)+)b",
    r"(){1000000000}",
    r"((a{100}){100}){100}",
]


@pytest.mark.parametrize("expression", QUICK)
def test_a_quick_expression_is_accepted(expression: str) -> None:
    assert too_slow(expression) is None
    begun = time.process_time()
    re.search(expression, "a" * 120)
    assert time.process_time() - begun < SECONDS


@pytest.mark.parametrize("expression", SLOW)
def test_an_expression_that_may_take_too_long_is_refused(expression: str) -> None:
    with pytest.raises(RecipeError, match="may take too long") as caught:
        parse_recipe(GOOD.replace("layers: [4]", f"regex: '{expression}'"))
    assert "<text>:5:20" in str(caught.value)


def test_a_glob_is_quick() -> None:
    from fnmatch import fnmatchcase

    begun = time.process_time()
    assert not fnmatchcase("a" * 200, "*a" * 50 + "b")
    assert time.process_time() - begun < SECONDS
