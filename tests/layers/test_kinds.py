"""One contract for every layer kind, with a pool or without: shapes, dtypes, meta, gradients, export, compilation, cost."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from closeness import assert_norm_close
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memrewrite.cost import Cost
from memrewrite.errors import ModelError, UserError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import KINDS, kind_named
from memrewrite.layers.pool import Pool, Pools, PoolSpec

KEYS, D = 8, 24
MLP = {"d_hidden": 20, "gated": True, "activation": "silu", "bias": True}
PLAIN = {"d_hidden": 20, "gated": False, "activation": "gelu", "bias": False}
OPTIONS: dict[str, list[dict[str, Any]]] = {  # by kind; a kind that is not here is built with its defaults
    "memory_plus": [{"topk": 4}],
    "pkm": [{"topk": 4}],
    "peer": [{"topk": 4}],
    "dense": [MLP, PLAIN],
    "moe": [{"experts": 3, **MLP}, {"experts": 5, "routing": "token_choice", "topk": 2, **PLAIN}],
}
CASES = [(kind, options) for kind in KINDS for options in OPTIONS.get(kind.kind, [{}])]
IDS = [f"{kind.kind}-{options.get('routing', '')}{'' if options.get('gated', True) else 'plain'}" for kind, options in CASES]
every_kind = pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)


class Model(nn.Module):
    """Layers and the pool they read, registered on the root module, as in a rewritten model."""

    def __init__(self, layers: list[MemoryLayer], pools: dict[str, Pool]) -> None:
        super().__init__()
        self.blocks, self.memory = nn.ModuleList(layers), Pools(pools)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def build(
    kind: type[MemoryLayer],
    options: dict[str, Any],
    d: int = D,
    d_out: int | None = None,
    *,
    gradient: str = "dense",
    dtype: torch.dtype | None = None,
    zero_output: bool = False,
    device: str | None = None,
) -> Model:
    d_out = d_out or d
    inputs = {"input_dim": d} if getattr(kind, "reads_inputs", False) else {}
    spec = PoolSpec(keys=KEYS, value_dim=d_out, gradient=gradient, **inputs)
    pools = {"shared": Pool(spec, device=device, dtype=dtype)} if kind.uses_pool else {}
    how = {"zero_output": zero_output, "device": device, "dtype": dtype}
    layers = [kind(d, d_out, kind.Options(**options), pools.get("shared"), **how) for _ in range(2)]
    for pool in pools.values():
        pool.reset_parameters()
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.reset_parameters(generator)
    return Model(layers, pools)


def widths(kind: type[MemoryLayer]) -> int:
    """A width of the output that differs from the input's, if the kind can have one."""
    return D if kind.kind == "identity" else 20


def skip_unless_parallel(kind: type[MemoryLayer]) -> None:
    if kind.replaces_only:
        pytest.skip("is not added to MLPs")


# --- shapes and dtypes -------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 5), (2, 3, 4)], ids=str)
def test_leading_shapes(kind, options, shape, training):
    layer = build(kind, options, d_out=widths(kind)).blocks[0].train(training)
    x = torch.randn(*shape, D)
    out = layer(x)
    assert out.shape == (*shape, layer.d_out)
    flat = layer(x.reshape(-1, D)) if x.numel() else torch.zeros(0, layer.d_out)
    torch.testing.assert_close(out.reshape(-1, layer.d_out), flat)


@every_kind
@pytest.mark.parametrize("shape", [(2, 3, D // 2), (D, 5), (D,), (2, 2 * D), ()], ids=str)
def test_an_input_of_another_width_is_refused(kind, options, shape):
    """Where the number of elements fits, a reshape alone would mix tokens."""
    layer = build(kind, options, d=D // 3 if shape == (D,) else D).blocks[0]
    with pytest.raises(ModelError, match=r"was made for \[\.\.\., "):
        layer(torch.randn(shape))


@every_kind
def test_non_contiguous(kind, options):
    layer = build(kind, options).blocks[0]
    x = torch.randn(D, 5, 3).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [24, 97])
def test_dtypes_and_odd_widths(kind, options, dtype, d):
    """The output is that of the same layer in float64 to the precision of the dtype, where rounding changed no choice."""
    model = build(kind, options, d, dtype=dtype).eval()
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, right = model.blocks[0](x), copy.deepcopy(model).double().blocks[0](x.double())
    assert got.dtype == dtype
    assert_norm_close(got, right, terms=4 * d, roundings=16)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind, options, training):
    model = build(kind, options).train(training)
    x = torch.randn(7, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().mean().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.1 * float(out.detach().abs().max()))


# --- what a layer computes -----------------------------------------------------------------------------------------------


@every_kind
def test_tokens_are_independent_in_eval_mode(kind, options):
    layer = build(kind, options).blocks[0].eval()
    x = torch.randn(9, D)
    other = x.clone()
    other[4] += 1
    changed = (layer(x) - layer(other)).abs().amax(-1) > 1e-5
    assert changed.tolist() == [token == 4 and not kind.constant for token in range(9)]


@every_kind
def test_zero_output_is_exactly_zero_and_can_be_trained(kind, options):
    skip_unless_parallel(kind)
    model = build(kind, options, zero_output=True)
    x = torch.randn(7, D)
    assert torch.equal(model(x), x)
    assert not model.blocks[0](x).any()
    model(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.blocks[0].parameters())


@every_kind
def test_initial_values_repeat_and_leave_the_global_generator_alone(kind, options):
    before = torch.get_rng_state()
    first, second = build(kind, options), build(kind, options)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.isfinite().all() for p in first.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_parameters_are_initialized_whatever_they_were(kind, options):
    layer = build(kind, options).blocks[0]
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters(torch.Generator().manual_seed(0))
    assert all(p.isfinite().all() for p in layer.parameters())


@every_kind
def test_save_load_and_meta(kind, options):
    model, x = build(kind, options), torch.randn(7, D)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    bare = build(kind, options, device="meta")
    assert all(t.is_meta for t in bare.state_dict().values())
    bare.to_empty(device="cpu").load_state_dict(torch.load(file))
    assert torch.equal(bare(x), model(x))
    with torch.device("meta"):
        assert all(p.is_meta for p in build(kind, options).parameters())
    assigned = build(kind, options, device="meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(assigned(x), model(x))
    model(x)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# --- gradients -----------------------------------------------------------------------------------------------------------


@every_kind
def test_every_parameter_and_the_input_get_a_gradient(kind, options):
    model = build(kind, options)
    x = torch.randn(40, D, requires_grad=True)
    (model(x) * torch.randn(40, D)).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def table_gradients(model: Model) -> list[Tensor]:
    """The gradient of every table, as one dense tensor each, however the table is trained."""
    found = []
    for table in (m for m in model.memory.modules() if hasattr(m, "pending")):
        if table.pending is None:
            grad = table.values.grad
            found.append(grad.to_dense() if grad.is_sparse else grad)
            continue
        dense = torch.zeros_like(table.values)
        for one in table.pending.take():
            rows = one.weights.to(dense.dtype)[..., None] * one.grad.to(dense.dtype)[:, None]  # [T, K, D]
            dense.index_add_(0, one.indices.flatten().long(), rows.flatten(0, 1))
        found.append(dense)
    return found


@every_kind
@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_every_gradient_of_the_tables_is_the_dense_one(kind, options, gradient):
    if not kind.uses_pool:
        pytest.skip("has no table")
    x = torch.randn(11, D)
    grads = []
    for how in ("dense", gradient):
        model = build(kind, options, gradient=how)
        with ExitStack() as stack:
            for queue in (m.pending for m in model.memory.modules() if getattr(m, "pending", None) is not None):
                stack.enter_context(queue.tried())
            model(x).square().sum().backward()
            grads.append([*table_gradients(model), *(p.grad for p in model.blocks.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


@every_kind
def test_functional_call_and_checkpointing(kind, options):
    model, x = build(kind, options), torch.randn(7, D, requires_grad=True)
    swapped = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(swapped, strict=False)
    torch.testing.assert_close(torch.func.functional_call(model, swapped, (x,)), twin(x))
    plain, saved = model(x).square().sum(), torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    grads = [torch.autograd.grad(loss, [x, *model.parameters()]) for loss in (plain, saved.square().sum())]
    torch.testing.assert_close(*grads)


# --- export and compilation ----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_tokens(kind, options, strict):
    model = build(kind, options).eval()
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
    program = torch.export.export(model, (torch.randn(3, 5, D),), dynamic_shapes=shapes, strict=strict)
    assert program.state_dict.keys() == model.state_dict().keys()
    for shape in ((3, 5), (1, 1), (2, 9)):
        x = torch.randn(*shape, D)
        torch.testing.assert_close(program.module()(x), model(x))


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(kind, options, training):
    torch._dynamo.reset()
    model = build(kind, options).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 3, 1):
        x = torch.randn(2, tokens, D, requires_grad=True)
        got, want = compiled(x), model(x)
        torch.testing.assert_close(got, want)
        leaves = [x, *model.parameters()]
        grads = [torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True) for out in (got, want)]
        torch.testing.assert_close(*grads)


# --- cost and options ----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("zero_output", [True, False])
def test_cost_counts_the_real_parameters(kind, options, zero_output):
    if zero_output:
        skip_unless_parallel(kind)
    d_out = widths(kind)
    model = build(kind, options, d_out=d_out, zero_output=zero_output)
    layer, spec = model.blocks[0], model.memory.shared.spec if kind.uses_pool else None
    cost = kind.cost(D, d_out, layer.options, spec, 2, zero_output=zero_output)
    assert cost.parameters == sum(p.numel() for p in layer.parameters())
    assert cost.parameter_bytes == 2 * cost.parameters
    if spec is not None:
        assert spec.cost().parameters == sum(p.numel() for p in model.memory.parameters())


@every_kind
def test_cost_counts_the_arithmetic_of_a_token(kind, options):
    """Matrix products as torch counts them; biases, which torch does not count, are less than the rest."""
    if kind.uses_pool:
        pytest.skip("torch does not count lookups: see test_cost_is_the_papers_arithmetic")
    layer = build(kind, options).blocks[0].eval()
    cost = kind.cost(D, D, layer.options, None, 4, zero_output=False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, D))
    biases = sum(p.numel() for name, p in layer.named_parameters() if name.endswith("bias"))
    assert counter.get_total_flops() <= cost.flops <= counter.get_total_flops() + biases


@every_kind
def test_options_are_described_and_frozen(kind, options):
    for name, field in kind.Options.model_fields.items():
        assert field.description, name
    with pytest.raises(ValidationError):
        kind.Options(no_such_option=1)
    with pytest.raises(ValidationError):
        kind.Options().anything = 3
    with pytest.raises(TypeError, match="options must be"):
        kind.check(D, D, next(other for other in KINDS if other.Options is not kind.Options).Options(), None)


@every_kind
def test_a_kind_that_replaces_only_says_why(kind, options):
    if kind.replaces_only:
        assert kind.kind in kind.replaces_only
    if kind.kind == "identity":
        with pytest.raises(UserError, match="cannot be added to an MLP"):
            build(kind, options, zero_output=True)


def test_kind_named():
    assert [kind_named(kind.kind) for kind in KINDS] == list(KINDS)
    assert len({kind.kind for kind in KINDS}) == len(KINDS)
    with pytest.raises(UserError, match="did you mean 'memory_plus'"):
        kind_named("memory_pluss")
    with pytest.raises(UserError, match="one of 'memory_plus', 'pkm'"):
        kind_named("zzz")


def test_kinds_without_parameters_cost_nothing():
    for name in ("identity", "none"):
        kind = kind_named(name)
        assert kind.cost(D, D, kind.Options(), None, 4, zero_output=False) == Cost()
        assert not list(build(kind, {}).parameters())
