"""What `plan` accepts, `apply` can do: random recipes over a small model, and each kind that the plan refuses."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_select import located, recipe, refused, site

import memrewrite
from memrewrite.errors import RecipeError, SelectError, UserError
from memrewrite.passes.plan import feasible
from memrewrite.passes.plan.memory_budget import refuse_too_large
from memrewrite.passes.plan.select import select
from memrewrite.recipes.field_types import MAX_SIZE
from memrewrite.recipes.reader import read_recipe
from memrewrite.recipes.schema import Recipe

ONE = located(site(0))
TWO = located(site(0), site(1))


# ------------------------------------------------------------------------------------------------- random recipes

POOLS = st.fixed_dictionaries(
    {"keys": st.sampled_from([1, 2, 3, 4, 8, 17, 64])},
    optional={
        "value_dim": st.sampled_from([1, 2, 3, 8, 16, 33]),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"]),
        "gradient": st.sampled_from(["dense", "sparse", "fused"]),
        "backend": st.sampled_from(["auto", "triton", "native", "torch"]),
        "seed": st.sampled_from([0, 2**63 - 1]),
    },
)
OPTIONS = st.fixed_dictionaries(
    {"topk": st.sampled_from([1, 2, 3, 8])},
    optional={
        "heads": st.sampled_from([1, 2, 5]),
        "key_dim": st.sampled_from([1, 2, 4, 6, 32]),
        "qk_norm": st.booleans(),
        "dropout": st.sampled_from([0, 0.5, 0.99]),
        "query_dropout": st.sampled_from([0, 0.5, 0.99]),
        "gate": st.sampled_from(["swilu", "sigmoid"]),
    },
)
WHERE = st.sampled_from(
    [
        {"all": True},
        {"layers": [0]},
        {"layers": [0, 1]},
        {"every": 2},
        {"centred": {"count": 1}},
        {"path": "*mlp"},
        {"regex": "1.mlp"},
    ]
)
RULES = st.fixed_dictionaries(
    {
        "where": WHERE,
        "with": st.sampled_from(["memory_plus", "pkm", "peer"]),
        "pool": st.just("p"),
        "placement": st.sampled_from(["replace", "parallel"]),
        "options": OPTIONS,
    }
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@cache
def _model(dtype: torch.dtype) -> tiny.Tiny:
    torch.manual_seed(0)
    return tiny.Tiny([tiny.Block(tiny.WIDTH, lambda d: tiny.MLP(d, 2 * d), 0.0) for _ in range(2)]).eval().to(dtype)


def _plan_then_apply(pool: dict[str, Any], rule: dict[str, Any], dtype: torch.dtype) -> None:
    wanted = {"memrewrite": 1, "pools": {"p": pool}, "replace": [rule]}
    found = _found(dtype)
    try:
        select(found, read_recipe(wanted))
    except UserError as error:
        assert error.where  # noqa: PT017
        assert error.hint  # noqa: PT017
        return
    report = memrewrite.apply(copy.deepcopy(_model(dtype)), wanted, (tiny.tokens(),))
    assert report.ok


@cache
def _found(dtype: torch.dtype) -> memrewrite.site.Inspection:
    return memrewrite.inspect(_model(dtype), (tiny.tokens(),))


FAST = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


@settings(FAST, max_examples=50, derandomize=True)
@given(POOLS, RULES, DTYPES)
def test_apply_completes_what_the_plan_accepts(pool: dict[str, Any], rule: dict[str, Any], dtype: torch.dtype) -> None:
    _plan_then_apply(pool, rule, dtype)


@pytest.mark.slow
@settings(FAST, max_examples=1000)
@given(POOLS, RULES, DTYPES)
def test_apply_completes_what_the_plan_accepts_in_many_cases(
    pool: dict[str, Any], rule: dict[str, Any], dtype: torch.dtype
) -> None:
    _plan_then_apply(pool, rule, dtype)


@settings(FAST, max_examples=15, derandomize=True)
@given(POOLS.map(lambda pool: pool | {"backend": "native"}), RULES, DTYPES)
def test_so_with_the_native_kernels(
    native_kernels: None, pool: dict[str, Any], rule: dict[str, Any], dtype: torch.dtype
) -> None:
    _plan_then_apply(pool, rule, dtype)


# ------------------------------------------------------------------------------------------------- kinds that are refused


@pytest.mark.parametrize(
    ("pool", "options", "what", "hint"),
    [
        ({}, {"topk": 1}, "the softmax over one slot is always 1", "topk: 2 or more"),
        ({}, {"key_dim": 2}, "keeps only the sign", "key_dim: 4 or more"),
        ({"keys": 1}, {}, "`keys` must be at least 2", "Keys per half"),
        ({"keys": 2}, {"topk": 3}, "more than the pool's 2 keys", "topk: 2 or less"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_where_it_is_read(
    pool: dict[str, Any], options: dict[str, Any], what: str, hint: str
) -> None:
    rule = {"where": {"all": True}, "with": "pkm", "pool": "p", "options": {"topk": 2, **options}}
    with pytest.raises(RecipeError) as caught:
        read_recipe({"memrewrite": 1, "pools": {"p": {"keys": 8, **pool}}, "replace": [rule]})
    assert what in str(caught.value)
    assert hint in str(caught.value)


def test_by_default_no_norm_is_over_one_entry() -> None:
    assert select(located(site(0, d_in=6, d_model=6)), recipe({"all": True})).substitutions


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_backend_that_cannot_run_at_the_site_is_refused(backend: str) -> None:
    reason = {"triton": "the tensors are not on a CUDA device", "native": "it is not built"}[backend]
    error = refused(ONE, recipe({"all": True}, pool={"backend": backend}))
    assert f"`backend: {backend}` cannot run this layer on cpu: {reason}" in error.what
    assert "backend: auto" in str(error.hint)
    on_meta = located(site(0, device="meta"))
    assert select(on_meta, recipe({"all": True}, pool={"backend": backend})).pools["shared"].backend == backend


@pytest.mark.parametrize("stored", [None, "float64"])
def test_native_kernels_refuse_float64(native_kernels: None, stored: str | None) -> None:
    assert select(ONE, recipe({"all": True}, pool={"backend": "native"}))
    found = located(site(0, dtype="float64" if stored is None else "float32"))
    error = refused(found, recipe({"all": True}, pool={"backend": "native", "dtype": stored}))
    assert "there are no kernels for torch.float64" in error.what


def test_sparse_gradients_that_torch_cannot_add_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"dtype": "float16", "gradient": "sparse"}
    monkeypatch.setattr(feasible, "_sparse_sum", lambda dtype, device: "not implemented" if dtype == "float16" else None)
    assert "is read 2 times" in refused(TWO, recipe({"all": True}, pool=half)).what
    assert "is read 2 times" in refused(located(site(0, calls=2)), recipe({"all": True}, pool=half)).what
    assert select(ONE, recipe({"all": True}, pool=half))
    assert select(TWO, recipe({"all": True}, pool=half | {"dtype": "bfloat16"}))


def test_whether_sparse_gradients_can_be_added_is_tried() -> None:
    one = torch.sparse_coo_tensor([[0]], torch.ones(1, 1, dtype=torch.float16), (1, 1))
    try:
        one + one
    except NotImplementedError:
        assert feasible._sparse_sum("float16", "cpu")
    else:
        assert feasible._sparse_sum("float16", "cpu") is None
    assert feasible._sparse_sum("float32", "cpu") is None
    assert feasible._sparse_sum("float16", "meta") is None


def test_fused_updates_of_float64_are_refused() -> None:
    found = located(site(0, dtype="float64"))
    assert "no fused update" in refused(found, recipe({"all": True}, pool={"gradient": "fused"})).what
    assert select(found, recipe({"all": True}, pool={"gradient": "fused", "dtype": "float32"}))


def test_one_pool_on_two_devices_is_refused() -> None:
    error = refused(located(site(0), site(1, device="meta")), recipe({"all": True}))
    assert error.what == "the sites that share pool 'shared' are on different devices: ['cpu', 'meta']"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "complex64"])
def test_weights_in_which_no_layer_can_compute_are_refused(dtype: str) -> None:
    found = located(site(0, dtype=dtype))
    assert "no dtype of a new table" in refused(found, recipe({"all": True})).what
    assert "in which no layer can compute" in refused(found, recipe({"all": True}, pool={"dtype": "float32"})).what


# ------------------------------------------------------------------------------------------------- sizes


def test_a_table_beyond_64_bits_is_refused() -> None:
    error = refused(ONE, recipe({"all": True}, pool={"keys": 2**16, "value_dim": MAX_SIZE}))
    assert "4,294,967,296 slots × 2,147,483,647 float32" in error.what
    assert error.where == "pools.shared"


def test_a_layer_beyond_64_bits_is_refused() -> None:
    found = located(site(0, d_in=2**40))
    error = refused(found, recipe({"all": True}, heads=2**12, key_dim=2**16))
    assert "parameters" in error.what
    assert "lower `heads`" in str(error.hint)


def test_layers_count_for_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = select(ONE, recipe({"all": True}, heads=2**12, key_dim=2**16))
    monkeypatch.setattr("memrewrite.passes.plan.memory_budget.free_memory", lambda device: 2**34)
    with pytest.raises(SelectError, match=r"the layers \d+\.\d GiB, and cpu has 16.0 GiB"):
        refuse_too_large(made)


@pytest.mark.parametrize(
    "where",
    [
        {"centred": {"count": 863290989}},
        {"centred": {"count": MAX_SIZE, "stride": MAX_SIZE}},
        {"centred": {"count": 2, "stride": MAX_SIZE}},
        {"layers": [MAX_SIZE]},
        {"every": MAX_SIZE},
        {"d_model": MAX_SIZE},
    ],
    ids=str,
)
def test_a_large_number_in_a_selector_is_refused_at_once(where: dict[str, Any]) -> None:
    error = refused(located(*(site(i) for i in range(24))), recipe(where))
    assert len(str(error)) < 500


def test_a_recipe_of_python_may_name_many_sites() -> None:
    """`narrowed` writes an expression that is longer than a recipe may write."""
    from memrewrite.passes.plan.select import narrowed

    many = [site(i, "decoder.stack_with_a_long_name.layers", depth=400) for i in range(400)]
    found = narrowed(many, recipe({"all": True}), {})
    assert isinstance(found[0].where.regex, str)
    assert len(found[0].where.regex) > 10_000
    made = select(located(*many), Recipe.model_construct(**{**dict(recipe({"all": True})), "replace": (found[0],)}))
    assert len(made.substitutions) == 400
