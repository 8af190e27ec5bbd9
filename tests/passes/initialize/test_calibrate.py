"""Calibrated queries: exact statistics, evenly read slots, and nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from closeness import assert_norm_close, relative_error
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import ModelError, UserError
from memrewrite.layers.kinds import KINDS
from memrewrite.layers.pool import Pool, Pools, PoolSpec
from memrewrite.layers.product_keys import ProductKeys

D, KEYS = 24, 16


class Net(nn.Module):
    """Layers on one pool, one after another on a residual stream; the input is the stream."""

    def __init__(self, layers: list[nn.Module], pool: Pool) -> None:
        super().__init__()
        self.blocks, self.memory = nn.ModuleList(layers), Pools({"shared": pool})

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def build(kind: Any = KINDS[0], dtype: torch.dtype = torch.float64, zero: bool = True, d: int = D, **options: Any) -> Net:
    pool = Pool(PoolSpec(keys=KEYS, value_dim=d, input_dim=d if kind.reads_inputs else None), dtype=dtype)
    chosen = kind.Options(**{"heads": 2, "topk": 4, "key_dim": 8, "qk_norm": False, **options})
    layers = [kind(d, d, chosen, pool, zero_output=zero, dtype=dtype) for _ in range(2)]
    pool.reset_parameters()
    for seed, layer in enumerate(layers):
        layer.reset_parameters(torch.Generator().manual_seed(seed))
    return Net(layers, pool)


def stream(tokens: int, d: int = D, seed: int = 0, mean: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Tokens [T, d] with a mean of several times their deviation, most of which lies in few directions."""
    fixed, random = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=fixed, dtype=torch.float64) * torch.logspace(0, -1.5, d, dtype=torch.float64)
    x = torch.randn(tokens, d, generator=random, dtype=torch.float64) @ mixing.T
    return (x + mean * torch.randn(d, generator=fixed, dtype=torch.float64)).to(dtype)


def product_keys(model: nn.Module) -> list[ProductKeys]:
    return [m for m in model.modules() if isinstance(m, ProductKeys)]


def start_in_numpy(keys: ProductKeys, x: np.ndarray, deviation: float, a: float) -> tuple[np.ndarray, np.ndarray]:
    """The new weight and bias by the formulas of the docstring, a half query at a time, on all tokens `x` at once."""
    half_keys = keys.keys.detach().double().flatten(0, 1).numpy()
    weights = []
    for half, w in zip(half_keys, np.split(keys.query.weight.detach().double().numpy(), 2 * keys.heads), strict=True):
        c = np.cov(w @ x.T, bias=True)
        values, vectors = np.linalg.eigh((1 - a) * c + a * np.trace(c) / len(c) * np.eye(len(c)))
        w = vectors @ np.diag(values**-0.5) @ vectors.T @ w
        q = w @ (x - x.mean(0)).T  # [m, T]
        if keys.query_norm is None:
            w = w * deviation / np.sqrt(2 * np.mean(np.var(half @ q, axis=0)))
        else:
            w = w / np.sqrt(np.mean(q**2))
        weights.append(w)
    weight = np.concatenate(weights)
    return weight, -weight @ x.mean(0)


# ------------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_weights_are_those_of_all_tokens_at_once(kind: Any, qk_norm: bool) -> None:
    if not issubclass(kind.Options, memrewrite.layers.product_key_layer.ProductKeyOptions):
        pytest.skip("this kind has no product keys")
    model = build(kind, qk_norm=qk_norm)
    batches = [stream(n, seed=n) for n in (1, 50, 7, 0, 33)]
    wanted = [start_in_numpy(keys, torch.cat(batches).numpy(), 0.7, 0.2) for keys in product_keys(model)]
    memrewrite.calibrate(model, batches, deviation=0.7, shrinkage=0.2)
    for keys, (weight, bias) in zip(product_keys(model), wanted, strict=True):
        assert relative_error(keys.query.weight, torch.from_numpy(weight)) < 1e-10
        assert relative_error(keys.query.bias, torch.from_numpy(bias)) < 1e-10


def test_queries_have_mean_zero_and_the_same_deviation_in_every_direction() -> None:
    model, x = build(), stream(500)
    memrewrite.calibrate(model, [x], shrinkage=1e-6)
    for keys in product_keys(model):
        for q in keys.query(x).detach().unflatten(1, (-1, keys.half_dim)).unbind(1):
            assert q.mean(0).norm() < 1e-9 * q.std()
            values = torch.linalg.eigvalsh(torch.cov(q.T))
            assert values[-1] / values[0] < 1.001


def test_scores_over_all_slots_get_the_deviation() -> None:
    model, x = build(heads=3), stream(200)
    report = memrewrite.calibrate(model, [x], deviation=0.5)
    for keys, layer in zip(product_keys(model), report.layers, strict=True):
        q = keys.query(x).unflatten(1, (3, 2, -1))
        halves = torch.einsum("thcm,hcnm->thcn", q, keys.keys)
        scores = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)  # [T, h, N]
        found = scores.var(-1, correction=0).mean().sqrt().item()
        assert found == pytest.approx(0.5, rel=1e-9)
        assert layer.deviation_after == pytest.approx(found, rel=1e-9)
    kept = memrewrite.calibrate(model, [x], deviation=None)
    assert [layer.deviation_after for layer in kept.layers] == pytest.approx([0.5, 0.5])


def test_the_report_counts_slots_and_the_energy_of_the_mean() -> None:
    model, batches = build(), [stream(20), stream(30, seed=1)]
    x = torch.cat(batches)
    before = [int(keys(x)[0].unique().numel()) for keys in product_keys(model)]
    report = memrewrite.calibrate(model, batches)
    after = [int(keys(x)[0].unique().numel()) for keys in product_keys(model)]
    assert [layer.path for layer in report.layers] == ["blocks.0", "blocks.1"]
    assert [(layer.tokens, layer.slots) for layer in report.layers] == [(50, KEYS**2)] * 2
    assert ([layer.slots_before for layer in report.layers], [layer.slots_after for layer in report.layers]) == (before, after)
    share = float(x.mean(0).square().sum() / x.square().sum(1).mean())
    assert [layer.mean_share for layer in report.layers] == pytest.approx([share, share])
    with pytest.raises(Exception, match="frozen"):
        report.layers[0].tokens = 1


@pytest.mark.parametrize("qk_norm", [False, True])
def test_slots_are_read_evenly_where_the_mean_had_most_of_the_energy(qk_norm: bool) -> None:
    model, x = build(qk_norm=qk_norm), stream(300, mean=10.0)
    report = memrewrite.calibrate(model, [x])
    for layer in report.layers:
        assert layer.mean_share > 0.8
        assert layer.slots_before < 0.5 * KEYS**2
        assert layer.slots_after > 0.8 * KEYS**2
    fresh = stream(300, seed=99, mean=10.0)  # of tokens that were not among those measured, too
    assert all(keys(fresh)[0].unique().numel() > 0.8 * KEYS**2 for keys in product_keys(model))


def test_one_update_moves_all_queries_together_unless_they_are_calibrated() -> None:
    """The cause of the collapse: Adam moves each weight by the rate, so queries by up to the rate times |x|, mean included."""
    kept = []
    for calibrated in (False, True):
        model, x = build(zero=False, dtype=torch.float32), stream(300, mean=3.0, dtype=torch.float32) / 10
        if calibrated:
            memrewrite.calibrate(model, [x])
        optimizer = torch.optim.Adam([keys.query.weight for keys in product_keys(model)], lr=0.02)
        target = torch.randn(D, generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        kept.append(min(int(keys(x)[0].unique().numel()) for keys in product_keys(model)))
    assert kept[1] > 2 * kept[0]


# -------------------------------------------------------------------------------------------------------- nothing else


@pytest.mark.parametrize("name", ["modular", "llama", "bert", "shared"])
@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_rewritten_models(name: str, placement: str) -> None:
    """Modes, gradients, random state and all other parameters stay; layers that return zero still do."""
    model, inputs = tiny.rewritten(name, placement)
    model.train()
    next(model.modules()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    queries = {key for key in before if ".product_keys.query." in key}
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(**inputs)
    random = torch.get_rng_state()
    report = memrewrite.calibrate(model, [inputs])
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key not in queries)
    assert queries
    assert not any(torch.equal(after[key], before[key]) for key in queries)
    assert len(report.layers) == len(product_keys(model))
    assert not any(m._forward_hooks for m in product_keys(model))
    if placement == "parallel":
        with torch.no_grad():
            same = model.eval()(**inputs)
        flat = [t for t in tree(outputs) if isinstance(t, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(flat, tree(same), strict=True))


def tree(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def test_a_rewritten_graph() -> None:
    recipe = tiny.recipe("parallel")
    recipe["replace"][0]["options"]["qk_norm"] = False  # with the norms, queries are spread evenly before
    report = memrewrite.apply(tiny.modular(), recipe, {"ids": tiny.tokens()}, emit="graph")
    inputs = {"ids": tiny.tokens(4, 7)}
    before = report.model(**inputs)
    calibration = memrewrite.calibrate(report.model, [inputs])
    assert all(layer.tokens == 28 and layer.slots_after > layer.slots_before for layer in calibration.layers)
    assert torch.equal(report.model(**inputs), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Statistics are those of the rounded inputs, in float64; the bias is that of the rounded weight."""
    model, x = build(dtype=dtype), stream(200, dtype=dtype)
    wanted = [start_in_numpy(keys, x.double().numpy(), 1.0, 0.1)[0] for keys in product_keys(model)]
    memrewrite.calibrate(model, [x])
    for keys, weight in zip(product_keys(model), wanted, strict=True):
        assert keys.query.weight.dtype == dtype
        assert_norm_close(keys.query.weight, torch.from_numpy(weight), terms=1)
        assert_norm_close(keys.query.bias, -keys.query.weight.double() @ x.double().mean(0), terms=1)


def test_fewer_tokens_than_dimensions() -> None:
    model, x = build(), stream(3)
    report = memrewrite.calibrate(model, [x])
    assert all(p.isfinite().all() for p in model.parameters())
    assert [layer.deviation_after for layer in report.layers] == pytest.approx([1.0, 1.0])
    assert all(layer.slots_before < layer.slots_after <= 3 * 8 for layer in report.layers)  # of 3 tokens, 2 heads, 4 slots


def test_masked_tokens_are_left_out() -> None:
    real, padded = build(), build()
    x = stream(30).view(3, 10, D)
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7]])).long()
    garbage = torch.where(mask.bool()[..., None], x, 1e6)
    report = memrewrite.calibrate(padded, [{"x": garbage, "attention_mask": mask}])
    assert report == memrewrite.calibrate(real, [x[mask.bool()]])
    assert torch.equal(padded.blocks[0].product_keys.query.weight, real.blocks[0].product_keys.query.weight)


def test_batches_can_be_read_once_and_have_any_form() -> None:
    x = stream(40)
    reports = [
        memrewrite.calibrate(build(), batches)
        for batches in ([x[:30], x[30:]], iter([x[:30], (x[30:],)]), ({"x": part} for part in (x[:30], x[30:])))
    ]
    assert reports[0] == reports[1] == reports[2]


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("batches", "numbers", "says"),
    [
        ([], {}, "contains no batch"),
        (stream(4), {}, "is one Tensor"),
        ({"x": stream(4)}, {}, "is one dict"),
        ([3], {}, "are a int"),
        ([stream(4)], {"deviation": 0.0}, "deviation=0.0"),
        ([stream(4)], {"deviation": float("nan")}, "deviation=nan"),
        ([stream(4)], {"shrinkage": 0.0}, "shrinkage=0.0"),
        ([stream(4)], {"shrinkage": 1.5}, "shrinkage=1.5"),
        ([stream(4, d=D + 1)], {}, "does not run"),
        ([stream(1)], {}, "equal inputs"),
        ([stream(1).expand(5, -1)], {}, "equal inputs"),
        ([stream(0)], {}, "no tokens"),
        ([torch.full((3, D), float("nan"), dtype=torch.float64)], {}, "not finite"),
    ],
)
def test_what_is_refused_changes_nothing(batches: Any, numbers: dict[str, float], says: str) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=says):
        memrewrite.calibrate(model, batches, **numbers)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_weights_that_the_dtype_cannot_hold_are_refused() -> None:
    model = build(dtype=torch.float16)
    with pytest.raises(ModelError, match="too large for float16"):
        memrewrite.calibrate(model, [stream(50, dtype=torch.float16)], deviation=1e6)


def test_models_without_product_keys_or_values_are_refused() -> None:
    with pytest.raises(ModelError, match="no layer with product keys"):
        memrewrite.calibrate(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(ModelError, match="on meta"):
        memrewrite.calibrate(build().to("meta"), [stream(4)])
