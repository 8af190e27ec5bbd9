"""The layer kinds that read a pool: compared with the paper's equations in float64; their tables, options and cost."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from closeness import assert_norm_close
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.cost import Cost, dense_cost
from memrewrite.errors import UserError
from memrewrite.kernels import ops
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import KINDS
from memrewrite.layers.memory_plus import MemoryPlus
from memrewrite.layers.peer import Peer
from memrewrite.layers.pkm import Pkm
from memrewrite.layers.pool import Pool, Pools, PoolSpec

KEYS, D = 16, 24
every_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.uses_pool], ids=lambda kind: kind.kind)


class Model(nn.Module):
    """Two layers on one pool that is registered on the root module, as in a rewritten model."""

    def __init__(self, layers: list[MemoryLayer], pool: Pool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.memory = Pools({"shared": pool})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def spec_for(kind, d=D, d_v=D, **fields) -> PoolSpec:
    return PoolSpec(keys=KEYS, value_dim=d_v, input_dim=d if kind.reads_inputs else None, **fields)


def build(kind, d=D, d_out=None, *, d_v=None, dtype=None, zero_output=False, device=None, layers=2, **options) -> Model:
    d_out = d_out or d
    pool = Pool(spec_for(kind, d, d_v or d_out), device=device, dtype=dtype)
    chosen = kind.Options(**{"topk": 4, **options})
    stack = [kind(d, d_out, chosen, pool, zero_output=zero_output, device=device, dtype=dtype) for _ in range(layers)]
    model = Model(stack, pool)
    generator = torch.Generator().manual_seed(0)
    pool.reset_parameters()
    for layer in stack:
        layer.reset_parameters(generator)
    return model


# --- the equations ---------------------------------------------------------------------------------------------------


def equation(layer: MemoryLayer, x: Tensor) -> Tensor:
    """Eqs. (1) and (2), one head at a time, with all N full keys written out."""
    addressing, (half,) = layer.product_keys, {layer.product_keys.keys.shape[-1]}
    V, n_keys = layer.pool.values, layer.product_keys.keys.shape[2]
    y = 0
    for head in range(layer.options.heads):
        rows = slice(head * 2 * half, (head + 1) * 2 * half)
        q = x @ addressing.query.weight[rows].T + addressing.query.bias[rows]  # [T, n]
        k1, k2 = addressing.keys[head]
        if layer.options.qk_norm:
            q = torch.cat([rms(part, addressing.query_norm.weight) for part in q.split(half, -1)], -1)
            k1, k2 = (rms(part, addressing.key_norm.weight) for part in (k1, k2))
        K = torch.stack([torch.cat([k1[i], k2[j]]) for i, j in itertools.product(range(n_keys), repeat=2)])  # [N, n]
        best, slots = (q @ K.T).topk(layer.options.topk, dim=-1)
        s = best.softmax(-1)
        if isinstance(layer, Peer):
            hidden = torch.einsum("td,tkd->tk", x, layer.pool.inputs.values[slots])
            s = s * hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))  # the exact gelu
        y = y + torch.einsum("tk,tkd->td", s, V[slots])
    if isinstance(layer, Pkm):
        return y if layer.value_proj is None else y @ layer.value_proj.weight.T + layer.value_proj.bias
    gate = x @ layer.gate.weight.T + layer.gate.bias
    gated = y * (gate * gate.sigmoid() if layer.options.gate == "swilu" else gate.sigmoid())
    return gated @ layer.value_proj.weight.T + layer.value_proj.bias


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * scale


@every_kind
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 1, "topk": 1},
        {"heads": 3, "topk": KEYS, "key_dim": 10},
        {"qk_norm": True},
        {"gate": "sigmoid"},
        {"d_v": 10},
        {"d": 97, "d_out": 20},
    ],
    ids=str,
)
def test_layer_is_the_equation(kind, options):
    if "gate" in options and kind is not MemoryPlus:
        pytest.skip("only memory_plus has a gate")
    model = build(kind, dtype=torch.float64, layers=1, **options)
    layer = model.blocks[0]
    for parameter in model.parameters():  # biases and scales too
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(13, layer.d_model, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    got, want = layer(x), equation(layer, x)
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(out, leaves, probe) for out in (got, want)), strict=True):
        torch.testing.assert_close(one, other)


# --- every kind that reads a pool -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [24, 97, 576])
def test_dtypes_and_odd_widths(kind, dtype, d):
    """For the slots and weights that a layer chose, its output is the float64 formula to the precision of the dtype."""
    layer = build(kind, d, dtype=dtype, layers=1).blocks[0]
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    slots, s = layer.product_keys(x)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.unflatten(-1, (4, 4)).sum(-1), torch.ones(5, 4))
    s = s.double()
    if kind is Peer:
        s = s * F.gelu(torch.einsum("td,tkd->tk", x.double(), layer.pool.inputs.values.double()[slots]))
    y = torch.einsum("tk,tkd->td", s, layer.pool.values.double()[slots])
    if kind is MemoryPlus:
        gate, out = (copy.deepcopy(m).double() for m in (layer.gate, layer.value_proj))
        y = out(y * F.silu(gate(x.double())))
    # stored in `dtype` on the way: weights and y; the gate, its silu, their product and the output of memory_plus
    assert_norm_close(got, y, terms=2 * d if kind is MemoryPlus else 16, roundings=6 if kind is MemoryPlus else 2)


@every_kind
def test_zero_output_is_exactly_zero_and_can_be_trained(kind):
    model = build(kind, zero_output=True)
    x = torch.randn(7, D)
    assert torch.equal(model(x), x)
    assert not model.blocks[0](x).any()
    model(x).square().sum().backward()
    assert model.blocks[0].value_proj.weight.grad.any()


def tables_of(kind) -> list[str]:
    return ["values", "inputs.values"] if kind.reads_inputs else ["values"]


@every_kind
def test_one_name_and_one_storage_for_the_pool(kind):
    model = build(kind)
    tables = tables_of(kind)
    assert [name for name in model.state_dict() if "values" in name] == [f"memory.shared.{name}" for name in tables]
    assert list(dict(model.memory.shared.named_parameters())) == tables
    twin = copy.deepcopy(model)
    assert all(layer.pool is twin.memory.shared for layer in twin.blocks)
    assert twin.memory.shared.values is not model.memory.shared.values
    model.to(torch.float64)
    assert all(layer.pool.values is model.memory.shared.values for layer in model.blocks)
    assert model(torch.randn(3, D, dtype=torch.float64)).dtype == torch.float64


@every_kind
def test_init_is_the_papers_and_repeats(kind):
    first, second = build(kind, 64, d_out=96), build(kind, 64, d_out=96)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    layer = first.blocks[0]
    keys, query = layer.product_keys.keys, layer.product_keys.query
    assert 0.95 * 32**-0.5 < keys.abs().max() <= 32**-0.5
    assert 0.95 < query.weight.abs().max() / (6 / (64 + 4 * 32)) ** 0.5 <= 1
    assert not query.bias.any()
    for weight in [layer.gate.weight, layer.value_proj.weight] if kind is MemoryPlus else []:
        assert weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    before = torch.get_rng_state()
    build(kind)
    assert torch.equal(torch.get_rng_state(), before)  # building and seeded initialisation leave the global RNG alone


@every_kind
def test_hooks_of_the_pool_fire(kind):
    model, calls = build(kind), []
    for table in model.memory.shared.modules():
        table.register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.randn(3, D))
    reads = len(tables_of(kind))  # each is a call of the pool, in each of the two layers
    assert len(calls) == 2 * (reads + (reads - 1))  # the second table is a child, called by the pool


@every_kind
def test_autocast(kind):
    model, x = build(kind, zero_output=False), torch.randn(7, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.blocks[0](x)
        loss = model(x).float().square().mean()
    loss.backward()
    assert out.dtype == (torch.bfloat16 if kind is MemoryPlus else torch.float32)
    assert model.memory.shared.values.grad.dtype == torch.float32


@every_kind
def test_pool_of_another_dtype(kind):
    pool = Pool(spec_for(kind, dtype="bfloat16"), dtype=torch.float32)
    pool.reset_parameters()
    layer = kind(D, D, kind.Options(topk=4), pool)
    layer.reset_parameters()
    out = layer(torch.randn(3, D))
    out.sum().backward()
    assert out.dtype == torch.float32
    assert {(p.dtype, p.grad.dtype) for p in pool.parameters()} == {(torch.bfloat16, torch.bfloat16)}


@every_kind
def test_dropout_only_while_training(kind):
    model, x = build(kind, dropout=0.5, query_dropout=0.5), torch.randn(7, D)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), build(kind)(x))  # in eval mode the options change nothing


def scores_of(layer: MemoryLayer, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The scores of both halves for `x`, [T, 2 * heads, keys]."""
    seen, select = [], ops.product_keys
    with monkeypatch.context() as patched:
        patched.setattr(ops, "product_keys", lambda q, keys, *a, **k: seen.append((q, keys)) or select(q, keys, *a, **k))
        layer(x)
    return torch.einsum("tad,and->tan", *seen[0])


@every_kind
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_query_dropout_zeroes_and_scales_entries_of_the_query(kind, rate, monkeypatch):
    """With keys that are unit vectors, a score is one entry of the query: 0, or the entry times 1 / (1 - rate)."""
    dropping, plain = (
        build(kind, layers=1, heads=1, key_dim=2 * KEYS, query_dropout=p, qk_norm=False).blocks[0] for p in (rate, 0.0)
    )
    for layer in (dropping, plain):
        layer.product_keys.keys.data.copy_(torch.eye(KEYS).expand(1, 2, KEYS, KEYS))
    x = torch.randn(200, D)
    got, query = (scores_of(layer, x, monkeypatch) for layer in (dropping, plain))
    dropped = got == 0
    assert dropped.double().mean().item() == pytest.approx(rate, abs=0.03)
    torch.testing.assert_close(got, torch.where(dropped, 0.0, query / (1 - rate)))
    assert torch.equal(scores_of(dropping.eval(), x, monkeypatch), query)


@every_kind
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_zeroes_and_scales_entries_of_what_is_read(kind, rate):
    """The option `dropout` applies to y, the weighted sum of values: 0, or the entry times 1 / (1 - rate)."""
    dropping, plain = (build(kind, layers=1, dropout=p).blocks[0] for p in (rate, 0.0))
    x = torch.randn(200, D)
    got, y = dropping.read(x), plain.read(x)
    dropped = got == 0
    assert dropped.double().mean().item() == pytest.approx(rate, abs=0.03)
    torch.testing.assert_close(got, torch.where(dropped, 0.0, y / (1 - rate)))
    assert torch.equal(dropping.eval().read(x), y)
    model = build(kind, layers=1, dropout=rate)
    assert not torch.equal(model(x), model(x))  # the output depends on it


@every_kind
def test_norms_start_with_scores_of_unit_variance(kind, monkeypatch):
    """The queries' scale starts at 1, the keys' at (key_dim / 2)^-1/2."""
    layer = build(kind, layers=1, qk_norm=True, key_dim=40).blocks[0]
    assert layer.product_keys.query_norm.weight.tolist() == [1.0] * 20
    assert layer.product_keys.key_norm.weight.tolist() == pytest.approx([20**-0.5] * 20)
    scores = scores_of(layer, torch.randn(500, D), monkeypatch)
    assert scores.square().mean().item() == pytest.approx(1.0, rel=0.1)


@every_kind
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_tokens(kind, strict):
    model = build(kind, qk_norm=True).eval()
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
    program = torch.export.export(model, (torch.randn(3, 5, D),), dynamic_shapes=shapes, strict=strict)
    assert [name for name in program.state_dict if "values" in name] == [f"memory.shared.{name}" for name in tables_of(kind)]
    for op in ("sparse_lookup", "sparse_dots")[: len(tables_of(kind))]:
        reads = [node for node in program.graph.nodes if str(node.target) == f"memrewrite.{op}.default"]
        assert len(reads) == 2
        assert len({node.args[0] for node in reads}) == 1  # one table, read twice
    for shape in ((3, 5), (1, 1), (2, 9)):
        x = torch.randn(*shape, D)
        torch.testing.assert_close(program.module()(x), model(x))


@every_kind
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "key_dim": 10}, {"gate": "sigmoid"}], ids=str)
@pytest.mark.parametrize("zero_output", [True, False])
@pytest.mark.parametrize(("d_out", "d_v"), [(D, D), (20, 40)])
def test_cost_counts_the_real_parameters(kind, options, zero_output, d_out, d_v):
    if "gate" in options and kind is not MemoryPlus:
        pytest.skip("only memory_plus has a gate")
    model = build(kind, d_out=d_out, d_v=d_v, zero_output=zero_output, layers=1, **options)
    layer, spec = model.blocks[0], model.memory.shared.spec
    cost = kind.cost(D, d_out, layer.options, spec, 4, zero_output=zero_output)
    assert cost.parameters == sum(p.numel() for p in layer.parameters())
    assert cost.parameter_bytes == 4 * cost.parameters
    widths = d_v + D if kind.reads_inputs else d_v
    assert cost.bytes_read == cost.parameter_bytes + 4 * 4 * widths * 4  # heads · topk rows of floats from each table
    assert spec.cost().parameters == sum(p.numel() for p in model.memory.shared.parameters())


def test_a_token_reads_only_the_active_weights():
    """A mixture stores all its experts and uses some of them: arithmetic and reading count these, and all biases."""
    assert dense_cost(100, 10, 2, active=30) == Cost(parameters=110, parameter_bytes=220, flops=70, bytes_read=80)
    assert dense_cost(100, 10, 2) == Cost(parameters=110, parameter_bytes=220, flops=210, bytes_read=220)


@pytest.mark.parametrize(("d_model", "width"), [(1, 4), (3, 4), (7, 4), (8, 4), (10, 4), (97, 48), (576, 288)])
def test_a_query_is_half_as_wide_as_the_model_even_and_4_at_least(d_model, width):
    assert Pkm.Options().query_width(d_model) == width
    assert Pkm.Options(key_dim=6).query_width(d_model) == 6


def test_cost_is_the_papers_arithmetic():
    """The 1.3b block: 8.4M + 4.2M + 8.4M + 0.26M multiply-adds, and half a megabyte of rows in bf16."""
    spec, options = PoolSpec(keys=1024, value_dim=2048), MemoryPlus.Options(key_dim=1024, qk_norm=False)
    cost = MemoryPlus.cost(2048, 2048, options, spec, 2, zero_output=False)
    macs = 2048 * 4 * 1024 + 4 * 1024 * 1024 + 2 * 2048 * 2048 + 4 * 32 * 2048
    assert cost.flops == 2 * macs + 4 * 1024 + 2 * 2048
    assert cost.bytes_read - cost.parameter_bytes == 128 * 2048 * 2
    bf16 = spec.model_copy(update={"dtype": "bfloat16"})
    wide = MemoryPlus.cost(2048, 2048, options, bf16, 4, zero_output=False)
    assert wide.bytes_read - wide.parameter_bytes == 128 * 2048 * 2  # rows are read in the pool's dtype


# --- what is refused -------------------------------------------------------------------------------------------------


@every_kind
def test_check_refuses(kind):
    spec = spec_for(kind)
    for options, pool, words in (
        ({"key_dim": 7}, spec, "`key_dim: 7` is odd"),
        ({"topk": KEYS + 1}, spec, f"`topk: {KEYS + 1}` is more than the pool's {KEYS} keys"),
        ({}, None, "none is set"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            kind.check(D, D, kind.Options(**{"topk": 4, **options}), pool)
        assert caught.value.hint
    with pytest.raises(UserError, match="at least one slot"):
        kind.check(D, D, kind.Options.model_construct(topk=0), spec)
    with pytest.raises(UserError, match="none is set"):
        kind(D, D, kind.Options())


@every_kind
def test_options_are_frozen_described_and_bounded(kind):
    for name, field in kind.Options.model_fields.items():
        assert field.description, name
    for wrong in ({"heads": 0}, {"topk": 0}, {"dropout": 1.0}, {"no_such_option": 1}):
        with pytest.raises(ValidationError):
            kind.Options(**wrong)
    with pytest.raises(ValidationError):
        kind.Options().topk = 3
    assert (kind.Options().heads, kind.Options().topk) == (4, 32)


def test_options_of_another_kind():
    with pytest.raises(TypeError, match="options must be MemoryPlusOptions, not PkmOptions"):
        MemoryPlus.check(D, D, Pkm.Options(), PoolSpec(keys=KEYS, value_dim=D))


# --- pools -----------------------------------------------------------------------------------------------------------


def test_pool_init():
    pool = Pool(PoolSpec(keys=40, value_dim=64, seed=3))
    pool.reset_parameters()
    first = pool.values.detach().clone()
    assert first.std().item() == pytest.approx(64**-0.5, rel=0.02)
    address = pool.values.data_ptr()
    pool.values.data.fill_(float("nan"))
    pool.reset_parameters()
    assert torch.equal(pool.values, first)
    assert pool.values.data_ptr() == address  # in place
    other = Pool(PoolSpec(keys=40, value_dim=64, seed=4))
    other.reset_parameters()
    assert not torch.equal(other.values, first)
    meta = Pool(PoolSpec(keys=2**16, value_dim=4096), device="meta")
    meta.reset_parameters()
    assert meta.values.shape == (2**32, 4096)


@pytest.mark.parametrize("name", ["", "a.b", "1st", "class", "training", "forward", "_modules", "parameters", "größe"])
def test_pools_refuse_names(name):
    with pytest.raises(UserError, match="cannot be named"):
        Pools({name: Pool(PoolSpec(keys=2, value_dim=2))})


def test_pools_by_name():
    pools = Pools({"shared": Pool(PoolSpec(keys=2, value_dim=2))})
    assert pools["shared"] is pools.shared
    with pytest.raises(KeyError):
        pools["other"]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("input_dim", [None, 5])
def test_casting_a_model_leaves_8_bit_tables(cast, input_dim):
    pool = Pool(PoolSpec(keys=4, value_dim=6, dtype="float8_e4m3fn", gradient="fused", input_dim=input_dim))
    pool.reset_parameters()
    tables = [pool] if input_dim is None else [pool, pool.inputs]
    before = [(t.values.detach().view(torch.uint8).clone(), t.scale.clone()) for t in tables]
    getattr(nn.Sequential(pool), cast)()
    for table, (values, scale) in zip(tables, before, strict=True):
        assert table.values.dtype == torch.float8_e4m3fn
        assert torch.equal(table.values.view(torch.uint8), values)
        assert torch.equal(table.scale, scale)
    assert {t.device.type for t in pool.to("meta", torch.float16).state_dict().values()} == {"meta"}
