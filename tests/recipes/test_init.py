"""`init` of a rule: what it accepts, what it means in a plan, and plans of versions that had none."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from memrewrite.errors import RecipeError
from memrewrite.layers.pkm import Pkm
from memrewrite.plans import MATCH, MAX_MULTIPLE, LayerInit, Plan, Substitution
from memrewrite.recipes.gallery_index import gallery
from memrewrite.recipes.json_schema import json_schema
from memrewrite.recipes.reader import parse_recipe, read_recipe
from memrewrite.recipes.schema import Recipe
from memrewrite.site import Binding, Site


def recipe(init: Any, placement: str = "replace", kind: str = "memory_plus") -> dict[str, Any]:
    wanted = tiny.recipe(placement)
    wanted["replace"][0] |= {"init": init, "with": kind}
    return wanted


def start(init: Any, placement: str = "replace") -> LayerInit:
    (rule,) = read_recipe(recipe(init, placement)).replace
    return rule.init.of_layer(rule.placement, rule.kind)


def test_the_default_depends_on_the_placement() -> None:
    assert start({}) == start({"output": "match"}) == start({"output": 1}) == LayerInit(output=MATCH)
    assert start({}, "parallel") == start({"output": "zero"}, "parallel") == LayerInit(output="zero")
    assert start({"output": "match"}, "parallel") == LayerInit(output=MATCH)


@given(number=st.floats(1e-6, MAX_MULTIPLE), scores=st.floats(1e-6, MAX_MULTIPLE))
@settings(max_examples=30, deadline=None)
def test_numbers_survive_writing_and_reading(number: float, scores: float) -> None:
    given_recipe = read_recipe(recipe({"output": number, "scores": scores}))
    again = parse_recipe(given_recipe.to_yaml())
    assert again == given_recipe
    assert again.replace[0].init.of_layer("replace", Pkm) == LayerInit(output=number, scores=scores)


@pytest.mark.parametrize("field", ["output", "scores"])
@pytest.mark.parametrize("value", [0, -1, -0.5, 1e7, math.inf, math.nan, True, [1], {}, "1", "papr", "", 10**400])
def test_other_values_are_refused_once(field: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe({field: value}))
    message = str(caught.value)
    assert f"`{field}`" in message
    assert "paper" in message
    assert message.count("error") <= 1


def test_a_misspelt_word() -> None:
    with pytest.raises(RecipeError, match="did you mean 'match'"):
        read_recipe(recipe({"output": "mtach"}))
    with pytest.raises(RecipeError, match="did you mean 'scores'"):
        read_recipe(recipe({"score": 1}))


def test_scores_of_a_kind_without_queries() -> None:
    rule = {"where": {"all": True}, "with": "dense"}
    assert read_recipe({"memrewrite": 1, "replace": [{**rule, "init": {"scores": "paper"}}]})
    with pytest.raises(RecipeError, match="no queries and keys"):
        read_recipe({"memrewrite": 1, "replace": [{**rule, "init": {"scores": 1.0}}]})


@pytest.mark.parametrize("kind", ["identity", "none"])
def test_a_kind_without_parameters_has_no_start(kind: str) -> None:
    rule = {"where": {"all": True}, "with": kind}
    start = read_recipe({"memrewrite": 1, "replace": [rule]}).replace[0]
    assert start.init.of_layer("replace", start.kind) == LayerInit()
    with pytest.raises(RecipeError, match="no parameters to initialize"):
        read_recipe({"memrewrite": 1, "replace": [{**rule, "init": {"output": "match"}}]})


def test_editors_know_the_words() -> None:
    schema = json.dumps(json_schema())
    assert all(word in schema for word in ('"match"', '"paper"', '"zero"', '"scores"'))


def test_the_gallery_keeps_the_start_of_the_paper_where_the_base_is_the_papers() -> None:
    for name, text in gallery().items():
        rules = parse_recipe(text, name=name).replace
        assert {rule.init.output for rule in rules} == ({"paper"} if name.startswith("paper-") else {None}), name


# ---------------------------------------------------------------------------------------------------------------- plans


def substitution(**fields: Any) -> dict[str, Any]:
    binding = Binding(kind="module", entries=("mlp",), exit="mlp")
    sizes = {"d_model": 4, "d_in": 4, "d_hidden": 8, "calls": 1, "weights": 64, "active": 64, "biases": 0}
    names = {"path": "mlp", "pattern": "plain", "activation": "relu", "dtype": "float32", "device": "cpu", "tower": ""}
    rest = {"parameters": ("w",), "modules": (), "block": None, "tower_blocks": 0, "bindings": (binding,)}
    site = Site(**sizes, **names, **rest)
    return {"site": site.model_dump(mode="json"), "kind": "pkm", "pool": "shared", "options": {}, **fields}


@pytest.mark.parametrize(("placement", "meant"), [("replace", "paper"), ("parallel", "zero")])
def test_a_plan_without_init_means_what_it_meant(placement: str, meant: str) -> None:
    old = Substitution.model_validate_json(json.dumps(substitution(placement=placement)), strict=True)
    assert old.init == LayerInit(output=meant, scores="paper")
    plan = Plan(captured="", pools={}, substitutions=(old,))
    assert Plan.model_validate_json(plan.model_dump_json(), strict=True) == plan
    assert not plan.measured


@pytest.mark.parametrize(
    "init", [{"output": "match"}, {"output": 0}, {"output": -1}, {"scores": "x"}, {"output": True}, {"x": 1}]
)
def test_a_plan_with_an_init_that_no_recipe_gives(init: Any) -> None:
    with pytest.raises(ValueError, match="init"):
        Substitution.model_validate_json(json.dumps(substitution(placement="replace", init=init)), strict=True)


def test_a_recipe_in_python() -> None:
    assert Recipe.model_validate(recipe({"output": 0.5})).replace[0].init.output == 0.5
