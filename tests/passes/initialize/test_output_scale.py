"""Layers start at the scale of the MLPs that they replace: recomputed with hooks, on bases of several initializations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import starts
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memrewrite
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.passes.initialize.measure import SAMPLE, sample, token_rms, typical
from memrewrite.passes.rewrite.edit_module import layers_of

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "memory_plus": ("memory_plus", {}, {}),
    "sigmoid": ("memory_plus", {"gate": "sigmoid", "qk_norm": True}, {}),
    "pkm with a projection": ("pkm", {}, {"value_dim": 24}),
    "pkm": ("pkm", {}, {}),
}


def recipe(
    kind: str = "memory_plus", *, verify: str = "off", init: Any = None, where: Any = None, placement: str = "replace"
) -> dict[str, Any]:
    """One layer or more of a kind of `KINDS`."""
    name, options, pool = KINDS[kind]
    rule = {"where": where or {"all": True}, "with": name, "pool": "shared", "placement": placement}
    rule |= {"options": {"heads": 2, "topk": 4, **options}, "init": init or {}}
    return {"memrewrite": 1, "pools": {"shared": {"keys": 8, **pool}}, "replace": [rule], "verify": verify}


def built(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A base twice, and its inputs."""
    build, inputs = starts.BASES[name]
    return build(), build(), inputs()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    a_state, b_state = a.state_dict(), b.state_dict()
    return a_state.keys() == b_state.keys() and all(torch.equal(a_state[name], b_state[name]) for name in a_state)


# ---------------------------------------------------------------------------------------------------------------- match


@pytest.mark.parametrize("base", starts.BASES)
def test_a_layer_starts_with_the_rms_of_its_mlp(base: str) -> None:
    """One kind in each block, with its own pool."""
    original, model, inputs = built(base)
    blocks = {"shared": 1, "vit": 2}.get(base, tiny.BLOCKS)
    wanted = recipe("memory_plus", where={"layers": [0]})
    for number, kind in enumerate(["sigmoid", "pkm with a projection"][: blocks - 1], 1):
        other = recipe(kind, where={"layers": [number]})
        wanted["pools"][f"pool{number}"] = other["pools"]["shared"]
        wanted["replace"].append(other["replace"][0] | {"pool": f"pool{number}"})
    report = memrewrite.apply(model, wanted, inputs)
    found = starts.compared(original, model, inputs, report.plan)
    assert len(found) == len(report.scales) == blocks
    for scale in report.scales:
        mlp, layer = found[scale.path]
        assert (scale.mlp, scale.layer) == (pytest.approx(mlp, rel=1e-3), pytest.approx(layer, rel=1e-3))
        assert layer == pytest.approx(mlp, rel=1e-3)
        assert not scale.note
        assert not scale.loud


def test_layers_that_are_their_pool_share_one_scale() -> None:
    """The geometric mean of layer / MLP is 1; a layer of the pool with a projection is matched after that."""
    original, model, inputs = built("pretrained")
    mixed = recipe("pkm", where={"layers": [0, 2]})
    mixed["replace"] += recipe("memory_plus", where={"layers": [1]})["replace"]
    report = memrewrite.apply(model, mixed, inputs)
    (first, second, third) = [layer / mlp for mlp, layer in starts.compared(original, model, inputs, report.plan).values()]
    assert math.log(first) + math.log(third) == pytest.approx(0, abs=1e-3)
    assert second == pytest.approx(1, rel=1e-3)


def test_an_8_bit_table_is_scaled_by_its_rows() -> None:
    original, model, inputs = built("llama")
    eight = recipe("pkm", where={"layers": [1]})
    eight["pools"]["shared"] |= {"dtype": "float8_e4m3fn", "gradient": "fused"}
    report = memrewrite.apply(model, eight, inputs)
    ((mlp, layer),) = starts.compared(original, model, inputs, report.plan).values()
    assert layer == pytest.approx(mlp, rel=1e-3)


def test_a_multiple_of_the_mlp() -> None:
    original, model, inputs = built("gpt2")
    report = memrewrite.apply(model, recipe(init={"output": 0.05}), inputs)
    for mlp, layer in starts.compared(original, model, inputs, report.plan).values():
        assert layer == pytest.approx(0.05 * mlp, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    original, model, inputs = built("llama")
    report = memrewrite.apply(model.to(dtype), recipe(), inputs)
    for mlp, layer in starts.compared(original.to(dtype), model, inputs, report.plan).values():
        assert layer == pytest.approx(mlp, rel=4 * torch.finfo(dtype).eps + 1e-3)


def test_features_on_another_axis() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Conv2d(24, 48, 1), nn.GELU(), nn.Conv2d(48, 24, 1))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.GroupNorm(1, 24), mlp

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.blocks = nn.Conv2d(3, 24, 4, 4), nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.stem(x))

    image = torch.randn(2, 3, 16, 12)
    model, original = Base().eval(), Base().eval()
    report = memrewrite.apply(model, recipe(), (image,))
    assert report.plan.substitutions[0].site.axis == 1
    x = original.stem(image)
    (scale,) = report.scales
    with torch.no_grad():
        read = original.blocks[0].norm(x)
        layer = layers_of(model, report.plan)[scale.path](read)
    assert scale.stream == pytest.approx(starts.rms(x.movedim(1, -1), 24), rel=1e-3)
    assert starts.rms(layer.movedim(1, -1), 24) == pytest.approx(starts.rms(mlp(read).movedim(1, -1), 24), rel=1e-3)


def test_many_tokens_are_measured_on_a_sample() -> None:
    """More tokens than `SAMPLE`: the rms is that of all tokens within the error of a median of 256."""
    original, model, _ = built("llama")
    inputs = {"input_ids": tiny.tokens(40, 25), "use_cache": False}
    assert inputs["input_ids"].numel() > 3 * SAMPLE
    report = memrewrite.apply(model, recipe(), inputs)
    for mlp, layer in starts.compared(original, model, inputs, report.plan).values():
        assert layer == pytest.approx(mlp, rel=0.15)


def test_the_stream_is_what_the_blocks_read() -> None:
    original, model, inputs = built("llama")
    seen: list[Tensor] = []
    for block in original.model.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        original(**inputs)
    report = memrewrite.apply(model, recipe(), inputs)
    assert [scale.stream for scale in report.scales] == [pytest.approx(starts.rms(x, tiny.WIDTH), rel=1e-3) for x in seen]


def test_the_stream_of_a_base_initialized_as_hugging_face_does_keeps_its_scale() -> None:
    """With the paper's start the layers' outputs are many times larger than all that is before them."""
    scales = {}
    for name, init in (("original", None), ("match", {}), ("paper", {"output": "paper"})):
        model = tiny.llama(hidden_size=32, num_hidden_layers=6, intermediate_size=64)
        inputs = {"input_ids": tiny.tokens(4, 16), "use_cache": False}
        if init is not None:
            memrewrite.apply(model, recipe(init=init), inputs)
        last: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
        with torch.no_grad():
            model(**inputs)
        scales[name] = starts.rms(last[0], 32)
    assert scales["match"] == pytest.approx(scales["original"], rel=0.5)
    assert scales["paper"] > 2 * scales["original"]


# ----------------------------------------------------------------------------------------------- the same by every route


def test_the_result_is_the_same_with_checks_without_them_and_again() -> None:
    results = []
    for verify in ("full", "off", "off"):
        model, _, inputs = built("llama")
        report = memrewrite.apply(model, recipe(verify=verify), inputs)
        assert report.ok
        results.append((model, report))
    (first, report), *others = results
    assert all(same(first, model) and report.scales == other.scales for model, other in others)


@pytest.mark.parametrize(("kind", "verify"), [("memory_plus", "full"), ("pkm", "off")])
def test_a_graph_gets_the_layers_of_the_live_model(kind: str, verify: str) -> None:
    original, model, inputs = built("mup")
    live = memrewrite.apply(model, recipe(kind), inputs)
    graph = memrewrite.apply(original, recipe(kind, verify=verify), inputs, emit="graph")
    assert [(s.path, s.mlp, s.layer) for s in graph.scales] == [(s.path, s.mlp, s.layer) for s in live.scales]
    assert torch.equal(graph.model.memory.shared.values, model.memory.shared.values)
    with torch.no_grad():
        torch.testing.assert_close(graph.model(**inputs), model(**inputs))


@pytest.mark.parametrize("verify", ["full", "off"])
def test_layers_of_a_compiled_model(verify: str) -> None:
    original, model, inputs = built("mup")
    torch._dynamo.reset()
    ours = memrewrite.backend(recipe(verify=verify), model=model, then="eager")
    compiled = torch.compile(model, backend=ours)
    with torch.no_grad():
        for _ in range(2):
            compiled(**inputs)
            compiled(tiny.tokens(3, 7))
    assert len(ours.scales) == tiny.BLOCKS  # a layer that is in several graphs starts once
    live = memrewrite.apply(original, recipe(), inputs)
    assert [s.layer for s in ours.scales] == pytest.approx([s.layer for s in live.scales])


def test_a_saved_model_starts_where_it_was_saved(tmp_path: Path) -> None:
    model, _, inputs = built("llama")
    report = memrewrite.apply(model, recipe(init={"output": 0.5, "scores": 0.7}), inputs)
    loaded = memrewrite.load(memrewrite.save(model, tmp_path / "out"))
    assert same(model, loaded)
    saved = memrewrite.Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert (saved.scales, saved.plan) == (report.scales, report.plan)
    assert report.plan.substitutions[0].init.model_dump() == {"output": 0.5, "scores": 0.7}


def test_the_plan_does_not_depend_on_the_inputs() -> None:
    model, _, inputs = built("llama")
    other = {"input_ids": tiny.tokens(seed=9), "use_cache": False}
    assert memrewrite.plan(model, recipe(), inputs).digest() == memrewrite.plan(model, recipe(), other).digest()


# ----------------------------------------------------------------------------------------------------- the other starts


def test_parallel_layers_start_at_zero() -> None:
    original, model, inputs = built("gpt2")
    report = memrewrite.apply(model, recipe(placement="parallel"), inputs)
    assert all((s.layer, s.loud, s.note) == (0.0, False, "") for s in report.scales)
    assert torch.equal(tiny.values_of(model, inputs), tiny.values_of(original, inputs))


def test_a_parallel_layer_can_start_at_a_multiple_of_its_mlp() -> None:
    original, model, inputs = built("mup")
    report = memrewrite.apply(model, recipe("pkm", placement="parallel", init={"output": 0.1}, verify="full"), inputs)
    assert next(c for c in report.checks if c.name == "identity").outcome == "skipped"
    logs = [math.log(layer / mlp) for mlp, layer in starts.compared(original, model, inputs, report.plan).values()]
    assert sum(logs) / len(logs) == pytest.approx(math.log(0.1), abs=1e-3)


@pytest.mark.parametrize("kind", ["memory_plus", "pkm"])
def test_a_layer_that_replaces_an_mlp_can_start_at_zero(kind: str) -> None:
    model, _, inputs = built("llama")
    report = memrewrite.apply(model, recipe(kind, init={"output": "zero"}, verify="full"), inputs)
    assert report.ok  # every parameter can be trained
    for path, layer in layers_of(model, report.plan).items():
        assert isinstance(layer, MemoryLayer)
        assert not layer(torch.randn(3, layer.d_model)).any(), path
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.after.parameters - report.before.parameters == report.parameters_after - report.parameters_before


@pytest.mark.parametrize("kind", ["sigmoid", "pkm with a projection"])
def test_the_start_of_the_paper_is_what_it_was(kind: str) -> None:
    """Built by hand: the pool from its seed, layer n from the seed `seed · 1000003 + n + 1`."""
    model, _, inputs = built("llama")
    wanted = recipe(kind, init={"output": "paper"})
    wanted["pools"]["shared"]["seed"] = 5
    report = memrewrite.apply(model, wanted, inputs)
    pool = Pool(report.plan.pools["shared"])
    pool.reset_parameters()
    assert torch.equal(pool.values, model.memory.shared.values)
    for number, (substitution, layer) in enumerate(
        zip(report.plan.substitutions, layers_of(model, report.plan).values(), strict=True)
    ):
        assert isinstance(layer, MemoryLayer)
        again = type(layer)(tiny.WIDTH, tiny.WIDTH, type(layer).Options.model_validate(substitution.options), pool)
        again.reset_parameters(torch.Generator().manual_seed(5 * 1_000_003 + number + 1))
        assert same(again, layer)


def test_a_loud_layer_is_marked(caplog: pytest.LogCaptureFixture) -> None:
    model, _, inputs = built("llama")
    with caplog.at_level("WARNING", logger="memrewrite"):
        report = memrewrite.apply(model, recipe(init={"output": "paper"}), inputs)
        assert not report.scales  # without checks nothing is measured
        model, _, inputs = built("llama")
        report = memrewrite.apply(model, recipe(init={"output": "paper"}, verify="full"), inputs)
    assert all(scale.loud and "3 times" in scale.remark for scale in report.scales)
    assert sum("starts with an output of rms" in message for message in caplog.messages) == tiny.BLOCKS


# ------------------------------------------------------------------------------------------------ nothing to be matched


def _without_outputs(fill: float) -> Any:
    model = tiny.modular()
    for block in model.blocks:
        nn.init.constant_(block.mlp.down.weight, fill)
        nn.init.zeros_(block.mlp.down.bias)
    return model


def test_a_layer_whose_mlp_returns_zeros_starts_at_zero() -> None:
    model = _without_outputs(0.0)
    report = memrewrite.apply(model, recipe(verify="full"), (tiny.tokens(),))
    assert report.ok
    assert all((s.mlp, s.layer, s.note) == (0.0, 0.0, "") for s in report.scales)


def test_a_pool_whose_mlps_return_zeros_keeps_its_values() -> None:
    """With values of zero, queries and keys would get no gradient."""
    model = _without_outputs(0.0)
    report = memrewrite.apply(model, recipe("pkm"), (tiny.tokens(),))
    pool = Pool(report.plan.pools["shared"])
    pool.reset_parameters()
    assert torch.equal(pool.values, model.memory.shared.values)
    assert all(scale.loud and scale.note.startswith("not matched: the MLP returns zeros") for scale in report.scales)


def test_an_mlp_whose_output_is_not_finite_is_not_matched() -> None:
    model = _without_outputs(math.inf)
    report = memrewrite.apply(model, recipe(), (tiny.tokens(),))
    assert all(scale.mlp is None and "not finite" in scale.note for scale in report.scales)
    assert all(p.isfinite().all() for layer in layers_of(model, report.plan).values() for p in layer.parameters())


def test_no_token_of_the_inputs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="memrewrite"):
        report = memrewrite.apply(tiny.modular(), recipe(), (tiny.tokens(0, 4),))
    assert all((s.mlp, s.layer) == (None, None) and "no token" in s.note for s in report.scales)
    assert any("not matched" in message for message in caplog.messages)


def test_a_model_on_meta_is_not_matched() -> None:
    with torch.device("meta"):
        model = tiny.modular()
    report = memrewrite.apply(model, recipe(verify="full"), (tiny.tokens(),))
    assert all("on meta" in scale.note and scale.layer is None for scale in report.scales)


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("qk_norm", "std"), [(False, 2), (True, 0.3)])
def test_scores_have_the_standard_deviation_asked_for(qk_norm: bool, std: float) -> None:
    """Recomputed from the full keys of all 64 slots."""
    original, model, inputs = built("gpt2")
    wanted = recipe(init={"scores": std})
    wanted["replace"][0]["options"] |= {"qk_norm": qk_norm, "key_dim": 12}
    report = memrewrite.apply(model, wanted, inputs)
    for substitution in report.plan.substitutions:
        keys = layers_of(model, report.plan)[substitution.site.path].product_keys
        x, _ = starts.calls_of(original, inputs, substitution.site)
        q, halves = keys.query(x).view(-1, 2, 2, 6), keys.keys  # [T, heads, half, 6], [heads, half, 8, 6]
        if qk_norm:
            q, halves = keys.query_norm(q), keys.key_norm(halves)
        half = torch.einsum("thad,hand->than", q.double(), halves.double())
        scores = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)  # [T, heads, 64]
        each = scores.var(-1, correction=0).mean(-1).sqrt().sort().values
        assert each[(len(each) - 1) // 2].item() == pytest.approx(std, rel=1e-3)


# ------------------------------------------------------------------------------------------------- the parts, on any input


@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 40),
    factor=st.floats(0, 1e3),
    gate=st.sampled_from(["swilu", "sigmoid"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_scaling_is_linear(tokens: int, width: int, factor: float, gate: str, seed: int) -> None:
    pool = Pool(PoolSpec(keys=4, value_dim=5), dtype=torch.float64)
    pool.reset_parameters()
    layer = MemoryPlus(width, 3, MemoryPlusOptions(heads=1, topk=2, gate=gate), pool, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    layer.reset_parameters(generator)
    nn.init.normal_(layer.value_proj.bias, generator=generator)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        before = layer(x)
        layer.scale_output(factor)
        torch.testing.assert_close(layer(x), factor * before)


@given(
    rows=st.integers(0, 12), width=st.integers(1, 9), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e15]), zeros=st.integers(0, 3)
)
@settings(max_examples=40, deadline=None)
def test_the_rms_is_the_median_token(rows: int, width: int, scale: float, zeros: int) -> None:
    values = torch.cat([torch.randn(rows, width, dtype=torch.float64) * scale, torch.zeros(zeros, width, dtype=torch.float64)])
    assert typical(token_rms(values)) == pytest.approx(starts.rms(values, width))
    if rows:
        values[0, 0] = math.nan
        assert math.isnan(typical(token_rms(values)))


def test_half_types_are_squared_in_fp32() -> None:
    assert typical(token_rms(torch.full((4, 8), 6e4, dtype=torch.float16))) == pytest.approx(6e4, rel=1e-3)


def test_a_sample_is_repeatable_and_has_no_period() -> None:
    """Tokens at equal distances could all be the first of a sequence."""
    tokens = torch.arange(4096.0)[:, None]
    chosen = sample(tokens, 256).flatten()
    assert torch.equal(chosen, sample(tokens, 256).flatten())
    assert len(chosen.unique()) == 256
    assert len((chosen % 16).unique()) == 16
