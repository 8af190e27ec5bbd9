"""The gallery's recipes for the models of "Memory Layers at Scale" (arXiv 2412.09764), planned on their shapes, on meta.

The shapes of 134m and 720m are not published: those here have the sizes that the models are named after.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import memrewrite
from memrewrite.layers.kinds import KINDS
from memrewrite.passes.plan.select import select
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.plans import Plan
from memrewrite.recipes.gallery_index import gallery
from memrewrite.recipes.reader import parse_recipe
from memrewrite.site import Inspection

SHAPES = {  # d_model, blocks, heads, key-value heads, d_hidden, vocabulary
    "134m": (768, 12, 12, 12, 2048, 32000),
    "373m": (1024, 24, 16, 16, 2816, 32000),
    "720m": (1536, 22, 12, 12, 4096, 32000),
    "1.3b": (2048, 22, 16, 16, 5632, 32000),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
DENSE = {"134m": 0.134, "373m": 0.373, "720m": 0.720, "1.3b": 1.26, "8b": 8.03}  # billions
TABLE_1 = {  # billions of parameters in Table 1, by recipe
    "paper-1.3b": 3.377,
    "paper-1.3b-4m": 9.823,
    "paper-1.3b-16m": 35.618,
    "paper-1.3b-64m": 138.748,
    "paper-1.3b-memory": 3.377,
    "paper-1.3b-peer": 3.646,
    "paper-1.3b-moe": 3.545,
}
every_size = pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow) if size in ("373m", "720m") else size for size in SHAPES]
)


@cache
def base(size: str) -> tuple[nn.Module, Inspection]:
    """A dense model on meta, and its MLPs."""
    import transformers

    d, blocks, heads, kv, hidden, vocabulary = SHAPES[size]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": False}
    return model, memrewrite.inspect(model, inputs)


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def planned(name: str, size: str, **edits: str) -> tuple[Plan, int]:
    """The plan of a gallery recipe, and the parameters of the rewritten model, which the plan predicts."""
    text = gallery()[name]
    for old, new in edits.items():
        text = text.replace(f"{old}: ", f"{old}: {new}  # ")
    if "with: peer" in text and "peer" not in {kind.kind for kind in KINDS}:
        pytest.skip("there is no kind `peer`")
    model, found = base(size)
    before, plan = size_of(model), select(found, parse_recipe(text))
    edit = substitute(model, plan)
    try:
        after = size_of(model)
        assert all(p.is_meta for p in model.parameters())
    finally:
        edit.revert()
    assert after - before == plan.after().parameters - plan.before().parameters
    assert size_of(model) == before
    return plan, after


@every_size
def test_the_base_models_have_the_sizes_they_are_named_after(size):
    assert size_of(base(size)[0]) / 1e9 == pytest.approx(DENSE[size], rel=0.01)
    assert len(base(size)[1].sites) == SHAPES[size][1]


@pytest.mark.parametrize("name", TABLE_1)
def test_the_models_of_table_1_have_the_papers_parameters(name):
    assert planned(name, "1.3b")[1] / 1e9 == pytest.approx(TABLE_1[name], rel=0.01)


@every_size
def test_memory_plus_has_three_layers_on_one_pool(size):
    plan, _ = planned(f"paper-{size}", size)
    d, blocks = SHAPES[size][:2]
    stride = 4 if size == "134m" else 8
    assert [s.site.block for s in plan.substitutions] == [blocks // 2 - stride, blocks // 2, blocks // 2 + stride]
    (pool,) = plan.pools.values()
    assert pool.cost().parameters == (64 * 2**30 if size == "8b" else 2**20 * d)  # "64b" at 8b


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=pytest.mark.slow) if s in ("373m", "720m") else s for s in list(SHAPES)[:-1]]
)
def test_moe_has_the_smallest_even_number_of_experts_with_more_parameters_than_memory(size):
    plan, moe = planned(f"paper-{size}-moe", size)
    memory = planned(f"paper-{size}", size)[1]
    layers = plan.substitutions
    assert len(layers) == SHAPES[size][1]
    options = layers[0].options
    fewer = moe - 2 * sum(s.site.weights + s.site.d_in for s in layers)
    assert fewer < memory < moe
    assert options["experts"] == {"134m": 16, "373m": 8, "720m": 6, "1.3b": 4}[size]
    assert (options["routing"], options["topk"], options["d_hidden"]) == ("expert_choice", 1, SHAPES[size][4])
    dense = sum(s.site.cost().flops for s in layers)
    routers = sum(2 * s.site.d_in * options["experts"] for s in layers)
    assert plan.after().flops == dense + routers  # the arithmetic of the dense model, and the routers'


@pytest.mark.parametrize("name", ["moe", "dense", "without-mlps"])
def test_the_other_recipes_plan_too(name):
    plan, after = planned(name, "1.3b")
    before = size_of(base("1.3b")[0])
    assert (after < before) == (name == "without-mlps")
    assert len(plan.substitutions) == (3 if name == "without-mlps" else 22)
