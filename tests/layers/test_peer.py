"""The layer kind `peer` and the second table of its pool: start values, fused training, plans, and whole models."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from closeness import assert_norm_close
from torch import nn

import memrewrite
from memrewrite.errors import SelectError, UserError
from memrewrite.fused import RowwiseAdagrad, RowwiseAdam
from memrewrite.kernels import reference
from memrewrite.layers.peer import Peer
from memrewrite.layers.pool import Pool, Pools, PoolSpec
from memrewrite.passes.plan.select import select
from memrewrite.recipes.reader import read_recipe
from memrewrite.site import Inspection

FP8 = "float8_e4m3fn"
EXPECTED = {"coverage", "untouched", "frame", "sharing", "gradient", "tokenwise"}  # checks that pass for both placements


def peer_recipe(placement: str = "replace", pool: dict[str, object] | None = None, **changes: object) -> dict[str, object]:
    made = tiny.recipe(placement, pools={"shared": {"keys": 8, **(pool or {})}}, **changes)
    made["replace"][0]["with"] = "peer"
    return made


class Two(nn.Module):
    """Two PEER layers on one pool."""

    def __init__(self, **spec: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        pool = Pool(PoolSpec(**{"keys": 8, "value_dim": 16, "input_dim": 16, **spec}))
        layers = [Peer(16, 16, Peer.Options(heads=2, topk=4), pool) for _ in range(2)]
        self.layers, self.memory = nn.ModuleList(layers), Pools({"shared": pool})
        for part in (pool, *layers):
            part.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


# ------------------------------------------------------------------------------------------------------- the tables


def test_both_tables_start_from_the_pool_s_seed_and_differ():
    def tables(seed: int, dtype: str = "float32", input_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        spec = PoolSpec(keys=40, value_dim=64, input_dim=input_dim, seed=seed, dtype=dtype, gradient="fused")
        pool = Pool(spec)
        pool.reset_parameters()
        rows = [t.values.float() if t.scale is None else t.values.float() * t.scale[:, None] for t in (pool, pool.inputs)]
        return rows[0], rows[1]

    values, inputs = tables(3)
    assert torch.equal(values, tables(3)[0])
    assert torch.equal(inputs, tables(3)[1])
    assert not torch.equal(inputs, tables(4)[1])
    assert abs(torch.corrcoef(torch.stack([values.flatten(), inputs.flatten()]))[0, 1]) < 0.02
    plain = Pool(PoolSpec(keys=40, value_dim=64, seed=3))
    plain.reset_parameters()
    assert torch.equal(plain.values, values)  # a second table does not change the first
    assert tables(2**63 - 1)[1].std().item() == pytest.approx(1 / 8, rel=0.02)
    assert tables(0, input_dim=16)[1].std().item() == pytest.approx(1 / 4, rel=0.02)
    eight = tables(3, FP8)
    assert eight[1].std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not torch.equal(*eight)


def test_a_product_with_a_row_has_unit_variance_at_the_start():
    pool = Two().memory.shared
    hidden = pool.inputs(torch.arange(64).expand(200, 64), torch.randn(200, 16))
    assert hidden.std().item() == pytest.approx(1.0, rel=0.05)


def test_cost_of_the_tables():
    spec = PoolSpec(keys=768, value_dim=2048, input_dim=1024, dtype="bfloat16")
    assert spec.cost().parameters == 768**2 * (2048 + 1024)
    assert spec.cost().parameter_bytes == 2 * spec.cost().parameters
    eight = spec.model_copy(update={"dtype": FP8})
    assert eight.cost().parameter_bytes == 768**2 * (2048 + 1024 + 2 * 4)
    cost = Peer.cost(1024, 2048, Peer.Options(key_dim=512, qk_norm=False), spec, 4, zero_output=False)
    keys = 1024 * 4 * 512 + 4 * 512 * 768
    assert cost.flops == 2 * (keys + 128 * (1024 + 2048)) + 4 * 512
    assert cost.bytes_read == 4 * (keys + 4 * 512) + 2 * 128 * (1024 + 2048)


@pytest.mark.parametrize(("width", "words"), [(None, "has no input weights"), (12, "are 12 wide")])
def test_a_pool_without_the_right_inputs_is_refused(width, words):
    with pytest.raises(UserError, match=f"{words}, and the layer's input is 16 wide"):
        Peer(16, 16, Peer.Options(topk=4), Pool(PoolSpec(keys=8, value_dim=16, input_dim=width)))


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rule", [RowwiseAdagrad(), RowwiseAdam(betas=(0.5, 0.75))], ids=str)
def test_fused_updates_train_both_tables(rule):
    """Three steps against the same rule on the dense gradient of a twin, for both tables."""
    fused, dense = Two(gradient="fused"), Two()
    optimizer = torch.optim.SGD(memrewrite.param_groups(fused, lr=0.0, value_lr=0.1), lr=0.0)
    memrewrite.fuse(optimizer, fused, rule)
    twins = [dense.memory.shared.values, dense.memory.shared.inputs.values]
    mine = [fused.memory.shared.values, fused.memory.shared.inputs.values]
    states = [[torch.zeros_like(t), torch.zeros(64)] for t in twins]
    for step in (1, 2, 3):
        x = torch.randn(7, 16, generator=torch.Generator().manual_seed(step))
        fused(x).square().sum().backward()
        gradients = torch.autograd.grad(dense(x).square().sum(), twins)
        assert all(table.grad is None for table in mine)
        optimizer.step()
        for table, twin, gradient, state in zip(mine, twins, gradients, states, strict=True):
            touched, numbers = gradient.any(-1), {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0}
            if isinstance(rule, RowwiseAdagrad):
                new, state[1] = reference.rowwise_adagrad(twin, state[1], gradient, touched, **numbers)
            else:
                old, numbers = (twin, *state), {**numbers, "betas": (0.5, 0.75), "step": step}
                new, state[0], state[1] = reference.rowwise_adam(old, gradient, touched, **numbers)
            twin.data.copy_(new)
            torch.testing.assert_close(table, twin, rtol=1e-4, atol=1e-5)
        assert set(optimizer.state[mine[1]]) == {"step", *rule.fresh(mine[1])}


@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_the_loss_falls_with_tables_in_few_bits(dtype):
    model = Two(gradient="fused", dtype=dtype)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=1e-3, value_lr=1e-1))
    memrewrite.fuse(optimizer, model)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_every_kind_of_gradient_is_the_dense_one(gradient):
    model, dense, x = Two(gradient=gradient), Two(), torch.randn(7, 16)
    tables = [model.memory.shared, model.memory.shared.inputs]
    if gradient == "fused":
        with tables[0].pending.tried(), tables[1].pending.tried():
            model(x).square().sum().backward()
            reads = [list(zip(*table.pending.take(), strict=True)) for table in tables]
        found = [reference.table_gradient(*map(list, factors), 64) for factors in reads]
    else:
        model(x).square().sum().backward()
        found = [table.values.grad.to_dense() for table in tables]
    dense(x).square().sum().backward()
    for got, right in zip(found, (dense.memory.shared.values.grad, dense.memory.shared.inputs.values.grad), strict=True):
        assert_norm_close(got, right.double(), 64, roundings=8)
    for one, other in zip(model.layers.parameters(), dense.layers.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_both_tables_are_among_the_values():
    rest, values = memrewrite.param_groups(Two(), lr=0.1)
    assert [tuple(p.shape) for p in values["params"]] == [(64, 16), (64, 16)]
    assert len(rest["params"]) == 10  # of each layer query, bias, keys and two norms


def test_fused_layers_compile():
    torch._dynamo.reset()
    model, x = Two(gradient="fused"), torch.randn(7, 16)
    twin = copy.deepcopy(model)
    for one, call in ((model, torch.compile(model, fullgraph=True, backend="aot_eager")), (twin, twin)):
        optimizer = torch.optim.SGD(memrewrite.param_groups(one, lr=0.1), lr=0.1)
        memrewrite.fuse(optimizer, one)
        call(x).square().sum().backward()
        assert [len(t.pending.waiting) for t in (one.memory.shared, one.memory.shared.inputs)] == [2, 2]
        optimizer.step()
    for one, other in zip(model.memory.parameters(), twin.memory.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------------- plans


def wide_input(plan_name: str = "modular") -> Inspection:
    """Three MLPs; the input of the last one is wider than its output."""
    sites = [s.site for s in tiny.plan_of(plan_name).substitutions]
    sites[-1] = sites[-1].model_copy(update={"d_in": 24})
    return Inspection(sites=tuple(sites), near_misses=(), captured="whole")


def rules(*pairs: tuple[int, str]) -> list[dict[str, object]]:
    return [
        {"where": {"layers": [block]}, "with": kind, "pool": "shared", "options": {"heads": 2, "topk": 4}}
        for block, kind in pairs
    ]


def test_the_plan_sets_the_width_of_the_inputs():
    for pairs, width in (
        ([(0, "peer")], 16),
        ([(2, "peer")], 24),
        ([(0, "pkm")], None),
        ([(0, "memory_plus"), (1, "pkm"), (2, "peer")], 24),
    ):
        recipe = read_recipe({"memrewrite": 1, "pools": {"shared": {"keys": 8}}, "replace": rules(*pairs)})
        assert select(wide_input(), recipe).pools["shared"].input_dim == width
    mixed = {"memrewrite": 1, "pools": {"shared": {"keys": 8}}, "replace": rules((0, "peer"), (2, "peer"))}
    with pytest.raises(SelectError, match=r"pool 'shared' have inputs of different widths: \[16, 24\]"):
        select(wide_input(), read_recipe(mixed))


def test_an_old_plan_has_no_inputs():
    data = PoolSpec(keys=8, value_dim=16).model_dump()
    del data["input_dim"]
    assert PoolSpec.model_validate(data).input_dim is None


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("name", ["modular", "loose", "llama"])
def test_a_rewritten_model_passes_every_check_and_saves(name, placement, tmp_path):
    model, inputs = tiny.named(name)
    before = tiny.values_of(model, inputs)
    report = memrewrite.apply(model, peer_recipe(placement), inputs)
    assert {check.name for check in report.checks if check.outcome == "passed"} >= EXPECTED
    assert model.memory.shared.inputs.values.shape == (64, 16)
    if placement == "parallel":
        assert torch.equal(tiny.values_of(model, inputs), before)
        tiny.open_up(model)
    saved = memrewrite.save(model, tmp_path / "saved")
    loaded = memrewrite.load(saved) if name == "llama" else memrewrite.load(saved, tiny.named(name)[0])
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))
    assert torch.equal(loaded.memory.shared.inputs.values, model.memory.shared.inputs.values)


@pytest.mark.parametrize("pool", [{"gradient": "fused"}, {"gradient": "fused", "dtype": FP8}, {"gradient": "sparse"}], ids=str)
def test_every_check_runs_for_every_gradient(pool):
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, peer_recipe(pool=pool), inputs)
    assert {check.name for check in report.checks if check.outcome == "passed"} >= EXPECTED


def test_the_recipe_of_the_gallery_plans_the_paper_s_size():
    recipe, plan = read_recipe("peer"), tiny.plan_of("modular")
    site = plan.substitutions[0].site.model_copy(update={"d_in": 2048, "d_model": 2048, "device": "meta", "dtype": "bfloat16"})
    found = Inspection(sites=(site.model_copy(update={"tower_blocks": 1, "block": 0}),), near_misses=(), captured="whole")
    pool = select(found, recipe).pools["experts"]
    assert pool.slots == 589_824
    assert pool.cost().parameters == 2 * 589_824 * 2048
