"""One contract for every backend: each is compared with the operators' definition in float64, forward and gradients.

Backends run through the operators' own functions. Triton's run in its interpreter where there is no GPU, in a process
that is started for it.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from closeness import assert_norm_close, most_reads, norm_bound, relative_error
from devices import GPU, INTERPRETED
from torch import Tensor

from memrewrite.kernels import (
    lookup_update,
    native_backend,
    product_key_topk,
    reference,
    rounding,
    sparse_dots,
    sparse_lookup,
    torch_backend,
    triton_backend,
)

DEVICE = "cpu"  # the fixture `backend` sets it
BACKENDS = [
    pytest.param((torch_backend, "cpu"), id="torch"),
    pytest.param((native_backend, "cpu"), id="native"),
    pytest.param((triton_backend, "cpu"), id="triton", marks=pytest.mark.interpreter),
    pytest.param((torch_backend, "cuda"), id="torch-cuda", marks=GPU),
    pytest.param((triton_backend, "cuda"), id="triton-cuda", marks=GPU),
]
FP8 = torch.float8_e4m3fn
SIZES = (1, 63, 60, 1000)
KEYS = (1, 7, 128)
WIDTHS = (1, 20, 576, 1024)


@pytest.fixture(autouse=True)
def everything_new_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN, so that a kernel that leaves an entry unwritten fails."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poisoned(make):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() and made.itemsize > 1 else made

        return wrapped

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(new_empty))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType
    module, device = request.param
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", device)
    if module is native_backend:
        request.getfixturevalue("native_kernels")
    if module is triton_backend and device == "cpu":
        if importlib.util.find_spec("triton") is None or not INTERPRETED:
            pytest.skip("Triton is not installed, or no TRITON_INTERPRET=1 as `make test` sets it for these")
        monkeypatch.setattr(triton_backend, "supports", lambda *_: None)
        monkeypatch.setattr(triton_backend, "supports_topk", lambda *_: None)
    return module


def dtypes_of(backend: ModuleType) -> list[torch.dtype]:
    return [torch.float32, torch.float16, torch.bfloat16] + ([torch.float64] if backend is torch_backend else [])


def is_interpreted(backend: ModuleType) -> bool:
    return backend is triton_backend and DEVICE == "cpu"


def lookup(n, d, t, k, dtype=torch.float32, index=torch.int64, seed=0):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).to(DEVICE),
        torch.randint(0, n, (t, k), generator=g).to(index).to(DEVICE),
        torch.randn(t, k, generator=g, dtype=torch.float64).to(dtype).to(DEVICE),
    )


def both(values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor, backend: ModuleType, scale: Tensor | None = None):  # type: ignore[no-untyped-def]
    """Output in the dtype of `grad` and gradients by this backend, through the operators' functions."""
    name, gradient = backend.NAME, "fused" if scale is not None else "dense"
    out = sparse_lookup.forward(values, indices, weights, scale, gradient, name, dtype=grad.dtype)
    gv, gw = sparse_lookup.backward(grad, values, indices, weights, scale is None, True, scale, name)
    return out, gv, gw


def meaning(values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = [x.detach().double().requires_grad_() for x in (values, weights)]
    out = reference.sparse_lookup(exact[0], indices, exact[1])
    gv, gw = torch.autograd.grad(out, exact, grad.double())
    return out.detach(), gv, gw


def assert_all_close(got: tuple[Tensor, ...], right: tuple[Tensor, ...], values: Tensor, indices: Tensor) -> None:
    """Output, gradient of the values and gradient of the weights, each against float64."""
    terms = indices.shape[1], most_reads(indices), values.shape[1]
    for one, exact, summed in zip(got, right, terms, strict=True):
        assert_norm_close(one, exact, summed)


def random_grad(t: int, d: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(t, d, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("k", KEYS)
@pytest.mark.parametrize("n", SIZES)
def test_lookup(backend, n, k, d):
    interpreted = is_interpreted(backend)
    for number, dtype in enumerate(dtypes_of(backend)):
        if interpreted and number != (n + k // 7 + d) % 3:
            continue  # the interpreter is slow: each size runs with one dtype, each dtype with a third of the sizes
        t = SIZES[number % len(SIZES)] if not interpreted else 1 if k == 128 else 3
        index = torch.int32 if number % 2 else torch.int64
        inputs, grad = lookup(n, d, t, k, dtype, index), random_grad(t, d, dtype)
        got = both(*inputs, grad, backend)
        assert {one.dtype for one in got} == {dtype}
        assert_all_close(got, meaning(*inputs, grad), *inputs[:2])


@pytest.mark.parametrize("size", [(60, 20, 9, 7), (60, 576, 63, 128), (1000, 1024, 1, 128), (1000, 64, 5, 3)], ids=str)
def test_fp32_weights_of_half_values(backend, size):
    """Output and gradients in bf16 or fp32, each as exact as its own dtype."""
    n, d, t, k = size
    values, indices, weights = lookup(n, d, t, k)
    for dtype, out in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        inputs, grad = (values.to(dtype), indices, weights), random_grad(t, d, out)
        got = both(*inputs, grad, backend)
        assert [one.dtype for one in got] == [out, dtype, torch.float32]
        assert_all_close(got, meaning(*inputs, grad), *inputs[:2])
        coo = sparse_lookup.rows(grad, indices, weights, n, backend.NAME)
        assert coo.dtype == out
        assert_norm_close(coo.to_dense(), meaning(*inputs, grad)[1], most_reads(indices))


@pytest.mark.parametrize("t", SIZES)
def test_lookup_of_many_tokens(backend, t):
    inputs, grad = lookup(60, 4, t, 3), random_grad(t, 4, torch.float32)
    assert_all_close(both(*inputs, grad, backend), meaning(*inputs, grad), *inputs[:2])


@pytest.mark.parametrize(
    "hot", [lambda i: i.fill_(3), lambda i: i[:, 1:].fill_(3), lambda i: i.copy_(i // 8)], ids=["one", "nearly", "few"]
)
def test_hot_rows(backend, hot):
    values, indices, weights = lookup(60, 20, 63, 7)
    hot(indices)
    grad = random_grad(63, 20, torch.float32)
    assert_all_close(both(values, indices, weights, grad, backend), meaning(values, indices, weights, grad), values, indices)


@pytest.mark.parametrize(
    ("n", "t", "k", "d"), [(60, 0, 7, 20), (60, 63, 0, 20), (60, 5, 3, 0), (0, 0, 7, 20), (0, 63, 0, 20), (0, 0, 0, 0)]
)
def test_empty_inputs(backend, n, t, k, d):
    values, weights = torch.zeros(n, d, device=DEVICE), torch.zeros(t, k, device=DEVICE)
    indices, grad = torch.zeros(t, k, dtype=torch.int64, device=DEVICE), torch.ones(t, d, device=DEVICE)
    out, gv, gw = both(values, indices, weights, grad, backend)
    assert (out.shape, gv.shape, gw.shape) == ((t, d), (n, d), (t, k))
    assert not out.any()
    assert not gv.any()
    assert not gw.any()
    assert sparse_lookup.rows(grad, indices, weights, n, backend.NAME).shape == (n, d)


def test_not_contiguous(backend):
    values, indices, weights = lookup(60, 20, 9, 7)
    views = (
        (values.T.contiguous().T, indices.T.contiguous().T, weights.T.contiguous().T),
        (torch.randn(60, 41, device=DEVICE)[:, 1::2], indices, weights[:1].expand(9, 7)),
        (torch.randn(120, 20, device=DEVICE)[::2], indices[:, :1].expand(9, 7), weights),
    )
    for view in views:
        for grad in (torch.ones(1, 1, device=DEVICE).expand(9, 20), random_grad(20, 9, torch.float32).T):
            assert_all_close(both(*view, grad, backend), meaning(*view, grad), *view[:2])


def test_one_gradient_alone(backend):
    inputs, grad = lookup(60, 20, 9, 7), random_grad(9, 20, torch.float32)
    _, gv, gw = meaning(*inputs, grad)
    only_values = sparse_lookup.backward(grad, *inputs, True, False, None, backend.NAME)
    only_weights = sparse_lookup.backward(grad, *inputs, False, True, None, backend.NAME)
    assert_norm_close(only_values[0], gv, most_reads(inputs[1]))
    assert_norm_close(only_weights[1], gw, 20)
    assert only_values[1].shape == only_weights[0].shape == (0,)


def test_index_out_of_range():
    """On the CPU only: a CUDA kernel does not check its indices, as `ops.sparse_lookup` says."""
    values, indices, weights = lookup(60, 20, 9, 7)
    for bad in (60, -1, 2**31 - 1):
        indices[4, 3] = bad
        with pytest.raises(IndexError, match=f"index {bad} is out of range for a table of 60 slots"):
            sparse_lookup.forward(values, indices, weights, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twice_and_split(backend, dtype):
    """A second run returns the same bits, and so does each token in a smaller batch: output and gradient of the weights."""
    t = 70  # more than the limit for few tokens
    inputs, grad = lookup(60, 48, t, 24, dtype), random_grad(t, 48, dtype)
    first, second = both(*inputs, grad, backend), both(*inputs, grad, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    values, indices, weights = inputs
    for begin, end in ((0, 1), (1, 9), (9, t)):
        part = slice(begin, end)
        out, _, gw = both(values, indices[part], weights[part], grad[part], backend)
        assert torch.equal(out, first[0][part])
        assert torch.equal(gw, first[2][part])
    _, alone = sparse_lookup.backward(grad, *inputs, False, True, None, backend.NAME)
    assert_norm_close(alone, meaning(*inputs, grad)[2], 48)


@pytest.mark.parametrize("size", [(60, 20, 9, 7), (1000, 576, 3, 128), (5, 1, 63, 7), (1, 20, 3, 7)], ids=str)
def test_rows(backend, size):
    n, d, t, k = size
    inputs, grad = lookup(*size), random_grad(t, d, torch.float32)
    coo = sparse_lookup.rows(grad, *inputs[1:], n, backend.NAME)
    found, sums = coo._indices()[0], coo._values()
    assert found.numel() == min(t * k, n)
    assert (found.diff() >= 0).all()
    assert set(found.tolist()) == set(inputs[1].flatten().tolist())
    assert not sums[inputs[1].unique().numel() :].any()
    assert_norm_close(coo.to_dense(), meaning(*inputs, grad)[1], most_reads(inputs[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(60, 20, 9, 7), (63, 576, 3, 128), (1, 1, 1, 1)], ids=str)
def test_eight_bits(backend, size, dtype):
    n, d, t, k = size
    wide, indices, exact = lookup(n, d, t, k)
    grad, scale = random_grad(t, d, dtype), rounding.row_scale(wide)
    values = (wide / scale[:, None]).to(FP8)
    for weights in (exact.to(dtype), exact):
        out, _, gw = both(values, indices, weights, grad, backend, scale)
        right, _, right_gw = meaning(values.double() * scale[:, None].double(), indices, weights, grad)
        assert (out.dtype, gw.dtype) == (dtype, weights.dtype)
        assert_norm_close(out, right, k)
        assert_norm_close(gw, right_gw, d)


@pytest.mark.parametrize("size", [(60, 20, 9, 7), (63, 576, 3, 128), (1000, 1024, 1, 7), (1, 1, 1, 1)], ids=str)
def test_dots(backend, size):
    n, d, t, k = size
    wide, indices, _ = lookup(n, d, t, k)
    scale, cases = rounding.row_scale(wide), [torch.float32, torch.bfloat16, torch.float16]
    for dtype in cases:
        for of_x, table in zip(cases, (wide.to(dtype), wide.to(dtype), (wide / scale[:, None]).to(FP8)), strict=True):
            x, rows = random_grad(t, d, of_x), scale if table.dtype == FP8 else None
            got = sparse_dots.forward(table, indices, x, rows, "dense", backend.NAME)
            right = reference.sparse_dots(wide_of(table, rows), indices, x.double())
            assert got.dtype == torch.float32
            assert_norm_close(got, right, d)


def wide_of(values: Tensor, scale: Tensor | None) -> Tensor:
    return values.double() if scale is None else values.double() * scale[:, None].double()


# ------------------------------------------------------------------------------------------------------------ the updates

NUMBERS = {"lr": 0.125, "eps": 2.0**-20, "weight_decay": 0.0}


def update_inputs(n, d, t, k, lookups, *, exact):  # type: ignore[no-untyped-def]
    """Reads; with `exact` small integers, whose sums are the same in any order."""
    g = torch.Generator().manual_seed(3)

    def sample(*shape: int) -> Tensor:
        sampled = torch.randint(-4, 5, shape, generator=g).float() if exact else torch.randn(*shape, generator=g)
        return sampled.to(DEVICE)

    indices = [torch.randint(0, n, (t, k), generator=g).to(DEVICE) for _ in range(lookups)]
    return sample(n, d), ([sample(t, d) for _ in range(lookups)], indices, [sample(t, k) for _ in range(lookups)])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "random"])
@pytest.mark.parametrize("size", [(60, 16, 9, 7, 1), (60, 16, 9, 7, 3), (3, 64, 63, 4, 2), (1000, 20, 5, 7, 1)], ids=str)
def test_updates(backend, size, exact):
    """Equal bits where sums are exact, close values elsewhere. Rows that were not read keep their bits."""
    n, d, t, k, lookups = size
    values, reads = update_inputs(n, d, t, k, lookups, exact=exact and d & (d - 1) == 0)
    bitwise = exact and d & (d - 1) == 0
    gradient = reference.table_gradient(*reads, n)
    touched = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    touched[torch.cat([i.flatten() for i in reads[1]])] = True
    total = torch.ones(n, device=DEVICE)
    want = reference.rowwise_adagrad(values, total, gradient, touched, **NUMBERS)
    got = (values.clone(), total.clone())
    lookup_update.adagrad(got[0], None, got[1], *reads, *NUMBERS.values(), 0, backend.NAME)
    mean, square = torch.ones(n, d, device=DEVICE), torch.ones(n, device=DEVICE)
    wanted = reference.rowwise_adam((values, mean, square), gradient, touched, **NUMBERS, betas=(0.5, 0.75), step=2)
    state = (values.clone(), mean.clone(), square.clone())
    lr, eps, decay = NUMBERS.values()
    lookup_update.adam(state[0], None, state[1], state[2], *reads, lr, 0.5, 0.75, eps, decay, 2, 0, backend.NAME)
    for one, right in zip((*got, *state), (*want, *wanted), strict=True):
        assert torch.equal(one[~touched], right[~touched])
        if bitwise:
            assert torch.equal(one, right)
        else:
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)


def test_updates_with_half_gradients_and_fp32_weights(backend):
    """The gradients of half layers with the unrounded weights of their lookups."""
    values, (grads, indices, weights) = update_inputs(60, 16, 9, 7, 2, exact=False)
    reads = ([grad.bfloat16() for grad in grads], indices, weights)
    gradient = reference.table_gradient(
        [grad.double() for grad in reads[0]], indices, [w.double() for w in weights], 60
    ).float()
    touched = torch.zeros(60, dtype=torch.bool, device=DEVICE)
    touched[torch.cat([i.flatten() for i in indices])] = True
    total = torch.ones(60, device=DEVICE)
    want = reference.rowwise_adagrad(values, total, gradient, touched, **NUMBERS)
    lookup_update.adagrad(values, None, total, *reads, *NUMBERS.values(), 0, backend.NAME)
    torch.testing.assert_close((values, total), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("size", [(60, 20, 9, 7, 1), (24, 200, 9, 3, 2)], ids=str)
def test_a_second_moment_per_element(backend, size, states):
    """The table exactly, moments rounded to a neighbor; rows that were not read keep their bits, and one seed repeats."""
    n, d, t, k, lookups = size
    values, reads = update_inputs(n, d, t, k, lookups, exact=False)
    moments = [(values * factor).abs() for factor in (0.5, 0.1)]
    scales = [rounding.block_scale(moment) if states == FP8 else None for moment in moments]

    def wide(moment: Tensor, scale: Tensor | None) -> Tensor:
        return moment.double() if scale is None else moment.float().double() * rounding.by_column(scale, d).double()

    start = [
        (moment if scale is None else moment / rounding.by_column(scale, d)).to(states)
        for moment, scale in zip(moments, scales, strict=True)
    ]
    power = 1 if states != FP8 else 2  # moments of 8 bits are the roots of the squares
    known = [wide(start[0], scales[0]), wide(start[1], scales[1]) ** power]
    gradient = reference.table_gradient([g.double() for g in reads[0]], reads[1], [w.double() for w in reads[2]], n)
    touched = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    touched[torch.cat([i.flatten() for i in reads[1]])] = True
    numbers = {**NUMBERS, "weight_decay": 0.01}
    want = reference.lazy_adam((values.double(), *known), gradient, touched, **numbers, betas=(0.5, 0.75), step=2)

    def run(seed: int) -> list[Tensor | None]:
        tables = [values, None, start[0], scales[0], start[1], scales[1]]
        new = [None if table is None else table.clone() for table in tables]
        lr, eps, decay = numbers.values()
        lookup_update.lazy_adam(*new, *reads, lr, 0.5, 0.75, eps, decay, 2, seed, backend.NAME)
        return new

    table, _, mean, mean_scale, square, square_scale = run(5)
    assert_norm_close(table, want[0], t * k)
    rounded = {torch.float32: norm_bound(torch.float32, t * k), torch.bfloat16: 2.0**-7, FP8: 2.0**-3}[states]
    assert relative_error(wide(mean, mean_scale), want[1]) <= rounded
    assert relative_error(wide(square, square_scale), want[2] ** (1 / power)) <= rounded
    for new, old in ((table, values), (mean, start[0]), (square, start[1])):
        assert torch.equal(new[~touched].view(torch.uint8), old[~touched].view(torch.uint8))
    same, other = run(5), run(6)
    assert torch.equal(mean.view(torch.uint8), same[2].view(torch.uint8))
    assert torch.equal(mean.view(torch.uint8), other[2].view(torch.uint8)) == (states == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_updates_in_few_bits(backend, dtype):
    """Each entry is one of the two neighbors of the fp32 result; one seed repeats, seeds differ; other rows keep their bits."""
    exact, reads = update_inputs(24, 16, 5, 3, 2, exact=False)
    scale = rounding.row_scale(exact) if dtype == FP8 else None
    start = (exact if scale is None else exact / scale[:, None]).to(dtype)
    known = start.float() if scale is None else start.float() * scale[:, None]
    touched = torch.zeros(24, dtype=torch.bool, device=DEVICE)
    touched[torch.cat([i.flatten() for i in reads[1]])] = True
    numbers = {**NUMBERS, "weight_decay": 0.01}
    gradient = reference.table_gradient(*reads, 24)
    want, _ = reference.rowwise_adagrad(known, torch.ones(24, device=DEVICE), gradient, touched, **numbers)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        values, scales = start.clone(), None if scale is None else scale.clone()
        lookup_update.adagrad(values, scales, torch.ones(24, device=DEVICE), *reads, *numbers.values(), seed, backend.NAME)
        return values.view(torch.uint8), values.float() if scales is None else values.float() * scales[:, None]

    (bits, got), (again, _), (other, _) = run(5), run(5), run(6)
    assert torch.equal(bits, again)
    assert not torch.equal(bits, other)
    assert torch.equal(bits[~touched], start.view(torch.uint8)[~touched])
    spacing = want.abs().amax(-1, keepdim=True) * 2.0 ** (-3 if dtype == FP8 else -7 if dtype == torch.bfloat16 else -10)
    assert ((got - want).abs() <= spacing * 1.01).all()


# --------------------------------------------------------------------------------------------------------------- the top-k


@pytest.mark.parametrize(("n1", "n2", "k"), [(1, 1, 1), (60, 60, 7), (63, 1000, 7), (128, 128, 32), (1000, 1000, 60)])
def test_topk(backend, n1, n2, k):
    for number, dtype in enumerate(dtypes_of(backend)):
        if is_interpreted(backend) and number != (n1 + k) % 3:
            continue
        wide = torch.promote_types(dtype, torch.float32)
        shape = (2, 3) if number % 2 else (5,)
        scores1, scores2 = (torch.randn(*shape, n).to(dtype).to(DEVICE) for n in (n1, n2))
        scores, indices = product_key_topk.forward(scores1, scores2, k, False, backend.NAME)
        want, _ = reference.product_key_topk(scores1.to(wide), scores2.to(wide), k)
        assert torch.equal(scores, want)
        named = scores1.to(wide).gather(-1, indices // n2) + scores2.to(wide).gather(-1, indices % n2)
        assert torch.equal(scores, named)
        assert indices.sort(-1).values.diff(dim=-1).all()  # no slot twice
        s, again = product_key_topk.forward(scores1, scores2, k, True, backend.NAME)
        assert torch.equal(again, indices)
        torch.testing.assert_close(s, want.softmax(-1))
        grad = torch.randn(*shape, k).to(wide).to(DEVICE)
        gots = product_key_topk.backward(grad, indices, n1, n2, backend.NAME)
        rights = torch_backend.topk_backward(grad.double(), indices, n1, n2)
        for got, right in zip(gots, rights, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
