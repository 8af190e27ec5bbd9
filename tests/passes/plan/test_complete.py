"""Options that a layer kind takes from the MLP that it replaces, and kinds that can only replace one."""

from __future__ import annotations

from typing import Any

import pytest
from test_select import located, site

from memrewrite.errors import RecipeError, SelectError
from memrewrite.passes.plan.select import select
from memrewrite.recipes.reader import read_recipe
from memrewrite.site import Site


def wanted(kind: str, placement: str = "replace", **options: Any) -> dict[str, Any]:
    rule = {"where": {"all": True}, "with": kind, "placement": placement, "options": options}
    return {"memrewrite": 1, "replace": [rule]}


def options_of(kind: str, at: Site, **options: Any) -> dict[str, Any]:
    (substitution,) = select(located(at), read_recipe(wanted(kind, **options))).substitutions
    return substitution.options


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_options_are_completed_from_the_mlp(kind):
    gated = site(0, pattern="gated", d_hidden=40, activation="silu", biases=0)
    plain = site(0, pattern="plain", d_hidden=40, activation="gelu", biases=7)
    complete = {"d_hidden": 40, "width": None, "gated": True, "activation": "silu", "bias": False}
    assert options_of(kind, gated).items() >= complete.items()
    complete |= {"gated": False, "activation": "gelu", "bias": True}
    assert options_of(kind, plain).items() >= complete.items()
    assert options_of(kind, plain, width=0.01)["d_hidden"] == 1
    assert options_of(kind, plain, width=1.26)["d_hidden"] == 50
    own = {"d_hidden": 3, "gated": True, "activation": "relu", "bias": False}
    assert options_of(kind, plain, **own).items() >= own.items()


def test_what_the_mlp_does_not_say_must_be_said():
    mixture = site(0, pattern="moe", d_hidden=40, activation="?")
    for given, words in (
        ({}, "may be gated or not"),
        ({"gated": True}, "activation of the MLP at 'layers.0.mlp' is not known"),
    ):
        with pytest.raises(SelectError, match=words) as caught:
            options_of("dense", mixture, **given)
        assert caught.value.where == "replace[0] at 'layers.0.mlp'"
        assert caught.value.hint
    assert options_of("dense", mixture, gated=True, activation="silu")["d_hidden"] == 40


def test_identity_needs_equal_widths():
    with pytest.raises(SelectError, match="returns its input, which has 5 features, and the MLP's output has 4"):
        options_of("identity", site(0, d_in=5, d_model=4))


@pytest.mark.parametrize("kind", ["identity", "none"])
def test_kinds_that_only_replace_are_refused_in_parallel_where_the_recipe_is_read(kind):
    with pytest.raises(RecipeError, match=f"`{kind}` cannot be added to an MLP") as caught:
        read_recipe(wanted(kind, "parallel"))
    assert caught.value.where == "replace[0].placement"
