"""Recipes: what is valid, what is refused and with which message, and that writing and reading are inverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from memrewrite.errors import RecipeError
from memrewrite.layers.kinds import KINDS
from memrewrite.recipes.field_types import MAX_SIZE
from memrewrite.recipes.gallery_index import describe, gallery
from memrewrite.recipes.json_schema import json_schema
from memrewrite.recipes.reader import parse_recipe, read_recipe
from memrewrite.recipes.schema import MAX_KEYS, PoolEntry, Recipe, Rule
from memrewrite.recipes.where import Centred, Where
from memrewrite.recipes.yaml_source import MAX_BYTES

GOOD = """\
memrewrite: 1
pools:
  shared: {keys: 1024, init: paper, seed: 0}
replace:
  - where: {layers: [4, 12, 20]}
    with: memory_plus
    pool: shared
    placement: replace
    options: {heads: 4, topk: 32}
verify: full
"""
POOLS = {"paper-1.3b-4m": 2048, "paper-1.3b-16m": 4096, "paper-1.3b-64m": 8192, "paper-8b": 4096}  # keys per half
PAPER = {"paper-134m", "paper-373m", "paper-720m", "paper-1.3b", *POOLS}
EXPERTS = {"paper-134m-moe": 16, "paper-373m-moe": 8, "paper-720m-moe": 6, "paper-1.3b-moe": 4}
ONE_LAYER = {"paper-1.3b-memory": ("pkm", 1024), "paper-1.3b-peer": ("peer", 768)}


def refusal(text: str) -> str:
    """The error message for an invalid text."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml")
    return str(caught.value)


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# --- valid recipes ---------------------------------------------------------------------------------------------------


def test_the_example_is_valid() -> None:
    recipe = parse_recipe(GOOD)
    (rule,) = recipe.replace
    assert recipe.pools == {"shared": PoolEntry(keys=1024)}
    assert rule.where == Where(layers=(4, 12, 20))
    assert (rule.with_, rule.pool, rule.placement, recipe.verify) == ("memory_plus", "shared", "replace", "full")
    assert rule.kind.kind == "memory_plus"
    assert rule.layer_options() == rule.kind.Options.model_validate({"heads": 4, "topk": 32})


def test_options_are_complete_and_defaults_may_be_omitted() -> None:
    short = parse_recipe(edited("    options: {heads: 4, topk: 32}\n", ""))
    (rule,) = short.replace
    assert set(rule.options) == set(rule.kind.Options.model_fields)
    complete = parse_recipe(edited("{heads: 4, topk: 32}", str(rule.options).replace("None", "null")))
    assert short == complete
    assert short.digest() == complete.digest() != parse_recipe(edited("seed: 0", "seed: 1")).digest()


def test_a_recipe_made_in_python_is_the_same() -> None:
    options = {"heads": 4, "topk": 32}
    rule = Rule(where=Where(layers=(4, 12, 20)), with_="memory_plus", pool="shared", options=options)
    recipe = Recipe(memrewrite=1, pools={"shared": PoolEntry(keys=1024)}, replace=(rule,))
    assert recipe == parse_recipe(GOOD) == read_recipe(yaml.safe_load(GOOD))
    assert read_recipe(recipe) is recipe


def test_a_file_is_read_by_path_object_and_by_path_string(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())  # as Windows editors write it
    assert read_recipe(file) == read_recipe(str(file)) == parse_recipe(GOOD)


def test_every_kind_is_accepted_and_a_kind_without_pool_refuses_one() -> None:
    for kind in KINDS:
        rule: dict[str, Any] = {"where": {"all": True}, "with": kind.kind}
        with_pool = {"memrewrite": 1, "pools": {"p": {"keys": 64}}, "replace": [{**rule, "pool": "p"}]}
        without = {"memrewrite": 1, "replace": [rule]}
        good, bad = (with_pool, without) if kind.uses_pool else (without, with_pool)
        assert read_recipe(good).replace[0].kind is kind
        with pytest.raises(RecipeError, match="reads a pool" if kind.uses_pool else "reads no pool"):
            read_recipe(bad)


@pytest.mark.parametrize("kind", ["identity", "none"])
def test_training_the_memory_alone_needs_a_layer_with_parameters(kind: str) -> None:
    rules = [{"where": {"layers": [0]}, "with": kind}, {"where": {"layers": [1]}, "with": "dense"}]
    assert Recipe.model_validate({"memrewrite": 1, "replace": rules, "train": "memory_only"}).train == "memory_only"
    with pytest.raises(RecipeError, match="would train nothing") as caught:
        read_recipe({"memrewrite": 1, "replace": rules[:1], "train": "memory_only"})
    assert caught.value.where == "train"


@pytest.mark.parametrize("bare", ["off", "'off'", "false"])
def test_verify_off_is_accepted_as_text_and_as_a_boolean(bare: str) -> None:
    assert parse_recipe(edited("verify: full", f"verify: {bare}")).verify == "off"


def test_anchors_and_merges_are_supported() -> None:
    rule = "  - &first\n    where: {layers: [4]}\n    with: memory_plus\n    pool: p\n"
    text = f"memrewrite: 1\npools: {{p: {{keys: 64}}}}\nreplace:\n{rule}  - {{<<: *first, where: {{layers: [5]}}}}\n"
    first, second = parse_recipe(text).replace
    assert (first.where.layers, second.where.layers, second.pool) == ((4,), (5,), "p")


# --- the gallery --------------------------------------------------------------------------------------------------


def test_the_gallery_is_complete() -> None:
    own = {"memory-plus", "memory-plus-fused", "memory-plus-parallel", "pkm", "peer", "moe", "dense", "without-mlps"}
    assert set(gallery()) == {*own, *PAPER, *EXPERTS, *ONE_LAYER}


@pytest.mark.parametrize("name", gallery())
def test_every_gallery_recipe_is_valid_and_has_a_description(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.memrewrite == 1
    assert 20 < len(describe(name)) < 120
    assert gallery()[name].startswith(f"# {describe(name)}\n")
    assert "arXiv 2412.09764" in gallery()[name]


def test_the_paper_s_numbers() -> None:
    for name in PAPER:
        recipe = read_recipe(name)
        assert recipe.pools["shared"].keys == POOLS.get(name, 1024)
        assert recipe.replace[0].where.centred == Centred(count=3, stride=4 if name == "paper-134m" else 8)
        assert recipe.replace[0].options | {"heads": 4, "topk": 32} == recipe.replace[0].options
    for name, experts in EXPERTS.items():
        (rule,) = read_recipe(name).replace
        assert (rule.where.all, rule.with_) == (True, "moe")
        wanted = {"experts": experts, "routing": "expert_choice", "topk": 1, "capacity_factor": 1.0}
        assert rule.options.items() >= wanted.items()
    for name, kind_and_keys in ONE_LAYER.items():
        recipe = read_recipe(name)
        assert recipe.replace[0].where.centred == Centred(count=1)
        assert (recipe.replace[0].with_, next(iter(recipe.pools.values())).keys) == kind_and_keys


def test_an_unknown_gallery_name_gets_the_most_similar_name_as_hint() -> None:
    with pytest.raises(RecipeError, match="did you mean 'memory-plus'"):
        describe("memory-pluss")


# --- the error's form ---------------------------------------------------------------------------------------------


def test_the_caret_is_under_the_key() -> None:
    assert refusal(edited("    placement:", "    placment:")) == "\n".join(
        [
            "unknown key 'placment'",
            "  at: r.yaml:8:5",
            "    8 |     placment: replace",
            "      |     ^^^^^^^^",
            "  try: did you mean 'placement'?",
        ]
    )


def test_a_mistyped_key_is_not_also_reported_as_missing() -> None:
    assert refusal(edited("{keys: 1024", "{kyes: 1024")).splitlines() == [
        "unknown key 'kyes'",
        "  at: r.yaml:3:12",
        "    3 |   shared: {kyes: 1024, init: paper, seed: 0}",
        "      |            ^^^^",
        "  try: did you mean 'keys'?",
    ]


def test_for_a_missing_key_the_caret_is_under_the_enclosing_key() -> None:
    assert refusal(edited("{keys: 1024, init", "{init")).splitlines() == [
        "`keys` is missing",
        "  at: r.yaml:3:3",
        "    3 |   shared: {init: paper, seed: 0}",
        "      |   ^^^^^^",
        "  try: add `keys:` · Keys per half, at least 2; the pool has keys × keys slots.",
    ]


def test_the_caret_is_under_the_value() -> None:
    message = refusal(edited("with: memory_plus", "with: memory_pluss   # three"))
    assert message.splitlines() == [
        "unknown layer kind 'memory_pluss'",
        "  at: r.yaml:6:11",
        "    6 |     with: memory_pluss   # three",
        "      |           ^^^^^^^^^^^^",
        "  try: did you mean 'memory_plus'?",
    ]


def test_the_caret_is_right_with_tabs_and_long_lines() -> None:
    where, line, caret = refusal(edited("{layers: [4, 12, 20]}", '{path: "a\tb", every: x}')).splitlines()[1:4]
    assert where == "  at: r.yaml:5:33"
    assert line[caret.index("^") :].startswith("x}")
    long = edited("layers: [4, 12, 20]", "layers: [" + ", ".join(map(str, range(500))) + ", x]")
    where, line, caret = refusal(long).splitlines()[1:4]
    assert (line[caret.index("^")], len(line) < 120) == ("x", True)


def test_all_problems_are_listed_from_top_to_bottom() -> None:
    text = edited("keys: 1024", "keys: many").replace("placement: replace", "placement: paralel").replace("topk", "topc")
    lines = refusal(text).splitlines()
    assert lines[0] == "`keys` must be an integer, not 'many'"
    assert lines[1] == "  at: r.yaml:3:18"
    assert lines[-3:] == [
        "  and 2 more:",
        "    r.yaml:8:16 · `placement` cannot be 'paralel' · did you mean 'parallel'?",
        "    r.yaml:9:25 · unknown key 'topc' · did you mean 'topk'?",
    ]


def test_for_python_data_the_location_is_a_dotted_path() -> None:
    data = yaml.safe_load(GOOD)
    data["replace"][0]["with"] = "memory_pluss"
    with pytest.raises(RecipeError) as caught:
        read_recipe(data)
    assert caught.value.where == "replace[0].with"
    assert caught.value.hint == "did you mean 'memory_plus'?"
    assert caught.value.exit_code == 2


def test_in_python_data_a_key_that_is_not_text_is_refused() -> None:
    data: Any = yaml.safe_load(GOOD) | {3: 4}
    with pytest.raises(RecipeError, match="has a key that is not text"):
        read_recipe(data)


# --- what is refused ----------------------------------------------------------------------------------------------

BAD = {  # case → (old text in the valid recipe, new text, two parts of the error message)
    "unknown top key": ("verify: full", "verfy: full", "unknown key 'verfy'", "did you mean 'verify'?"),
    "unknown far key": ("verify: full", "zzz: 1", "unknown key 'zzz'", "the keys known here are memrewrite, pools"),
    "unknown option": ("heads: 4", "haeds: 4", "unknown key 'haeds'", "did you mean 'heads'?"),
    "unknown selector": ("{layers: [4", "{layer: [4", "unknown key 'layer'", "did you mean 'layers'?"),
    "in centred": ("layers: [4, 12, 20]", "centred: {count: 3, strde: 8}", "unknown key 'strde'", "'stride'"),
    "wrong type": ("[4, 12, 20]", "4", "`layers` must be a list, not 4", "r.yaml:5:21"),
    "wrong item": ("[4, 12, 20]", "[4, x]", "`layers` must be an integer, not 'x'", "r.yaml:5:25"),
    "negative": ("[4, 12, 20]", "[-1]", "`layers` must be at least 0, not -1", "r.yaml:5:22"),
    "no layers": ("[4, 12, 20]", "[]", "`layers` needs at least 1 item(s)", "r.yaml:5:21"),
    "twice": ("[4, 12, 20]", "[4, 4]", "block 4 is listed twice", "r.yaml:5:21"),
    "boolean number": ("keys: 1024", "keys: true", "`keys` must be an integer, not true", "r.yaml:3:18"),
    "boolean option": ("heads: 4", "heads: true", "`heads` must be an integer, not true", "r.yaml:9:22"),
    "bad option": ("heads: 4", "heads: 0", "`heads` must be more than 0, not 0", "r.yaml:9:22"),
    "topk over keys": ("keys: 1024", "keys: 31", "`topk: 32` is more than the pool's 31 keys", "r.yaml:9:31"),
    "odd key_dim": ("topk: 32", "key_dim: 7", "`key_dim: 7` is odd", "r.yaml:9:34"),
    "no keys": ("keys: 1024", "keys: 0", "`keys` must be at least 2, not 0", "Keys per half"),
    "absurd keys": ("keys: 1024", f"keys: {MAX_KEYS + 1}", f"`keys` must be at most {MAX_KEYS}", "r.yaml:3:18"),
    "negative seed": ("seed: 0", "seed: -1", "`seed` must be at least 0, not -1", "r.yaml:3:43"),
    "dtype": ("seed: 0", "dtype: float23", "`dtype` cannot be 'float23'", "did you mean 'float32'?"),
    "verify": ("verify: full", "verify: fast", "`verify` cannot be 'fast'", "one of 'full', 'off'"),
    "pool name": ("    pool: shared", "    pool: shard", "there is no pool 'shard'", "did you mean 'shared'?"),
    "no pool": ("    pool: shared\n", "", "'memory_plus' reads a pool", "add `pool:`"),
    "unused pool": ("\nreplace:", "\n  spare: {keys: 8}\nreplace:", "pool 'spare' is not used by any rule", "r.yaml:4:3"),
    "kind": ("memory_plus", "quantum", "unknown layer kind 'quantum'", "one of 'memory_plus'"),
    "no kind": ("    with: memory_plus\n", "", "`with` is missing", "r.yaml:5:5"),
    "empty where": ("{layers: [4, 12, 20]}", "{}", "`where` selects nothing", "`all: true` selects every MLP"),
    "idle where": ("{layers: [4, 12, 20]}", "{all: false}", "`where` selects nothing", "r.yaml:5:12"),
    "no where": ("where: {layers: [4, 12, 20]}", "where:", "`where` must be a mapping", "not empty"),
    "regex": ("layers: [4, 12, 20]", "regex: '*x'", "is not a regular expression", "r.yaml:5:20"),
    "huge regex": ("layers: [4, 12, 20]", "regex: 'a{99999999999}'", "is not a regular expression", "r.yaml:5:20"),
    "empty path": ("layers: [4, 12, 20]", "path: ''", "`path` must not be empty", "r.yaml:5:19"),
    "missing version": ("memrewrite: 1\n", "", "`memrewrite` is missing", "Version of the recipe format: 1"),
    "wrong version": ("memrewrite: 1", "memrewrite: 2", "version 2 cannot be read", "supported versions: 1"),
    "text version": ("memrewrite: 1", "memrewrite: '1'", "version '1' cannot be read", "supported versions: 1"),
    "true version": ("memrewrite: 1", "memrewrite: true", "version true cannot be read", "supported versions: 1"),
    "duplicate key": ("verify: full", "verify: full\nverify: off", "key 'verify' appears twice", "r.yaml:11:1"),
    "tab": ("  shared:", "\tshared:", "a tab is used where YAML allows only spaces", "indent with spaces"),
    "not YAML": ("{heads: 4, topk: 32}", "{heads: 4", "this is not YAML", "check quotes"),
    "no colon": ("with: memory", "with memory", "a `:` is missing", "r.yaml:6:5"),
    "two documents": ("verify: full", "---\nmemrewrite: 1", "more than one YAML document", "r.yaml:10:1"),
    "alias to nothing": ("{heads: 4, topk: 32}", "*gone", "undefined alias 'gone'", "r.yaml:9:14"),
    "cycle": ("{heads: 4, topk: 32}", "&o {heads: *o}", "contains itself through an alias", "r.yaml:9:14"),
    "number as key": ("heads: 4", "4: 4", "`4` cannot be a key", "r.yaml:9:15"),
    "boolean as key": ("heads: 4", "true: 4", "`true` cannot be a key", "put the key in quotes"),
    "list as key": ("heads: 4", "[a]: 4", "this cannot be a key", "r.yaml:9:15"),
    "merge of text": ("heads: 4", "<<: x", "`<<` needs a mapping", "r.yaml:9:19"),
    "bad date": ("keys: 1024", "keys: 2024-13-45", "must be an integer, not '2024-13-45'", "r.yaml:3:18"),
    "long number": ("keys: 1024", f"keys: {'9' * 5000}", "cannot be read as int", "r.yaml:3:18"),
    "set": ("heads: 4", "heads: !!set {a}", "tag '!!set' is not allowed", "r.yaml:9:22"),
    "binary": ("heads: 4", "heads: !!binary aGk=", "tag '!!binary' is not allowed", "without tags"),
    "control": ("paper", "pa\x07per", "character that YAML", "r.yaml:3:32"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    old, new, *expected = BAD[case]
    message = refusal(edited(old, new))
    for words in expected:
        assert words in message
    assert "r.yaml:" in message
    assert "pydantic" not in message
    assert "  try: " in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "empty"), ("# only this\n", "empty"), ("- a\n", "must be a mapping"), ("text", "must be a mapping")],
)
def test_texts_that_are_not_recipes(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_with_a_wrong_version_only_the_version_is_reported() -> None:
    assert "more:" not in refusal("memrewrite: 2\nmystery: {}\n")


@pytest.mark.parametrize("name", ["forward", "training", "_modules", "a-b", "a.b", "class", "1st", "ключ"])
def test_a_pool_name_must_be_a_valid_module_name(name: str) -> None:
    assert f"cannot be named {name!r}" in refusal(GOOD.replace("shared", f'"{name}"'))


def test_python_tags_are_never_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    message = refusal(edited("{heads: 4, topk: 32}", f"!!python/object/apply:os.system ['touch {touched}']"))
    assert "tag '!!python/object/apply:os.system' is not allowed" in message
    assert not touched.exists()


def test_alias_and_nesting_bombs_are_refused() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "too large" in refusal("\n".join(levels))
    assert "nested too deeply" in refusal("a: " + "[" * 5000)
    assert "nested too deeply" in refusal("a: " + "{b: " * 5000)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(source: str | Path) -> str:
        with pytest.raises(RecipeError) as caught:
            read_recipe(source)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "missing.yaml")
    assert "did you mean 'memory-plus'?" in message("memory-pluss")
    assert "did you mean 'pkm'?" in message("pkm.yaml")
    assert "'paper-8b'" in message("zzz")
    assert "is a directory" in message(tmp_path)
    assert "`parse_recipe`" in message(GOOD)
    assert "cannot be read" in message("zero\0byte")
    assert "cannot be read" in message("x" * 5000)
    (tmp_path / "latin.yaml").write_bytes(GOOD.replace("paper", "käse").encode("latin-1"))
    assert "latin.yaml:3:31" in message(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert "too large" in message(tmp_path / "large.yaml")


def test_an_object_that_is_not_a_source_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be read from int"):
        read_recipe(3)  # type: ignore[arg-type]


# --- properties ---------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
counts = st.integers(1, MAX_SIZE)
selectors = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.lists(st.integers(0, 200), min_size=1, unique=True),
        "centred": st.fixed_dictionaries({"count": counts}, optional={"stride": counts}),
        "every": counts,
        "path": words,
        "pattern": words,
        "tower": words,
        "regex": st.sampled_from([r"layers\.\d+", r"^a|b$", r"x{2}", "'\"#: "]),
        "d_model": counts,
        "all": st.just(True),
    },
).filter(bool)
pool_entries = st.fixed_dictionaries(
    {"keys": st.integers(64, MAX_KEYS)},
    optional={
        "value_dim": counts,
        "init": st.just("paper"),
        "seed": st.integers(0, 2**63 - 1),
        "dtype": st.sampled_from(["float32", "bfloat16", None]),
    },
)
pool_names = st.from_regex(r"\A[a-z]{1,8}_[0-9]\Z")


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    pools = draw(st.dictionaries(pool_names, pool_entries, min_size=1, max_size=3))
    rule = st.fixed_dictionaries(
        {"where": selectors, "with": st.just("memory_plus")},
        optional={
            "placement": st.sampled_from(["replace", "parallel"]),
            "options": st.fixed_dictionaries({}, optional={"heads": st.integers(1, 16), "topk": st.integers(2, 64)}),
        },
    )
    rules = [{**draw(rule), "pool": pool} for pool in pools]  # each pool is used
    return {"memrewrite": 1, "pools": pools, "replace": rules, "verify": draw(st.sampled_from(["full", "off"]))}


@given(recipes())
@settings(deadline=None)
def test_writing_and_reading_are_inverse(data: dict[str, Any]) -> None:
    recipe = read_recipe(data)
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert read_recipe(recipe.to_data()) == recipe


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(recipes(), st.data())
@settings(deadline=None)
def test_every_invalid_recipe_raises_recipe_error_with_a_location(data: dict[str, Any], draw: st.DataObject) -> None:
    target: Any = data
    for step in draw.draw(st.sampled_from([(), ("pools",), ("replace",), ("replace", 0), ("replace", 0, "where")])):
        target = target[step]
    spot = draw.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else [0]))
    target[spot] = draw.draw(junk)
    # PyYAML writes a bare U+0085 and reads it back as a space; escaped it stays
    text = yaml.safe_dump(data, allow_unicode="\\x85" not in repr(data))
    try:
        assert parse_recipe(text, name="r.yaml") == read_recipe(data)
    except RecipeError as error:
        assert (error.where or "").startswith("r.yaml:")  # noqa: PT017
        assert "pydantic" not in str(error)  # noqa: PT017


@given(st.text(max_size=60))
@settings(deadline=None)
def test_random_text_raises_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


# --- the schema ---------------------------------------------------------------------------------------------------


def test_every_field_has_a_description() -> None:
    models: tuple[type[BaseModel], ...] = (Recipe, PoolEntry, Rule, Where, Centred, *(kind.Options for kind in KINDS))
    missing = [f"{m.__qualname__}.{n}" for m in models for n, field in m.model_fields.items() if not field.description]
    assert missing == []


def test_the_json_schema_knows_every_kind_s_options() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"]
    rule = schema["$defs"]["Rule"]
    assert [choice["const"] for choice in rule["properties"]["with"]["oneOf"]] == [kind.kind for kind in KINDS]
    for kind in KINDS:
        assert set(schema["$defs"][f"{kind.kind}_options"]["properties"]) == set(kind.Options.model_fields)


def test_the_json_schema_accepts_and_refuses_as_the_reader_does() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    for name in gallery():
        validator.validate(yaml.safe_load(gallery()[name]))
    for kind in KINDS:
        rule = {"where": {"all": True}, "with": kind.kind, "placement": "parallel", **({"pool": "p"} if kind.uses_pool else {})}
        data = {"memrewrite": 1, "replace": [rule], **({"pools": {"p": {"keys": 64}}} if kind.uses_pool else {})}
        assert validator.is_valid(data) == (not kind.replaces_only)
    assert validator.is_valid(yaml.safe_load(GOOD))
    cases = ("unknown option", "bad option", "empty where", "kind", "no pool", "wrong type", "wrong version", "dtype")
    for case in cases:
        old, new, *_ = BAD[case]
        assert not validator.is_valid(yaml.safe_load(edited(old, new))), case
