"""The Triton lookup and its gradients in Triton's interpreter, against float64: values, shapes, bits, poisoned outputs."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from closeness import assert_norm_close, most_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memrewrite.kernels import reference
from memrewrite.kernels.triton_plans import use

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, of the interpreter's NaN and inf
]

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16, FP8]


def kernels(name: str):
    pytest.importorskip("triton")
    return importlib.import_module(f"memrewrite.kernels.triton_{name}")


def inputs(n: int, d: int, t: int, k: int, dtype=torch.float32, index=torch.int64, seed=0):
    """values, indices, weights, scale (None but for fp8)."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, d, generator=g)
    indices = torch.randint(0, n, (t, k), generator=g).to(index)
    weights = torch.randn(t, k, generator=g)
    if dtype == FP8:
        return values.to(FP8), indices, weights.bfloat16(), torch.rand(n, generator=g) + 0.5
    return values.to(dtype), indices, weights.to(dtype), None


def exact(values: Tensor, scale: Tensor | None) -> Tensor:
    wide = values.float().double()
    return wide if scale is None else wide * scale.double()[:, None]


def forward(values, indices, weights, scale=None, dtype=None):
    """The default dtype of the operator."""
    return kernels("lookup").forward(
        values, indices, weights, scale, dtype or (values.dtype if scale is None else weights.dtype)
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Entries that no kernel writes are NaN, or an integer that is no slot."""
    for name in ("empty", "empty_like", "empty_strided"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _plain=plain, **kwargs: poison(_plain(*args, **kwargs)))
    plain_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kwargs: poison(plain_new(self, *args, **kwargs)))


def poison(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return tensor.fill_(float("nan"))
    return tensor.fill_(77) if tensor.dtype in (torch.int32, torch.int64) else tensor


SHAPES = [(1, 1, 1, 1), (63, 20, 6, 7), (60, 576, 3, 7), (1000, 20, 1, 128), (1000, 1024, 2, 7), (60, 1, 63, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "t", "k"), SHAPES)
def test_forward(n, d, t, k, dtype):
    for index in (torch.int64, torch.int32) if d == 20 else (torch.int64,):
        values, indices, weights, scale = inputs(n, d, t, k, dtype, index)
        out = forward(values, indices, weights, scale)
        assert out.dtype == weights.dtype
        assert_norm_close(out, reference.sparse_lookup(exact(values, scale), indices, weights.double()), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_forward_has_the_same_bits_however_it_is_split(dtype, monkeypatch):
    lookup = kernels("lookup")
    monkeypatch.setattr(lookup, "FEW_TOKENS", 4)
    values, indices, weights, scale = inputs(60, 40, 10, 65, dtype)
    out = forward(values, indices, weights, scale)  # one program a token
    for cut in (1, 4):  # a program a chunk
        parts = [forward(values, i, w, scale) for i, w in zip(indices.split(cut), weights.split(cut), strict=True)]
        assert torch.equal(out, torch.cat(parts))


def test_forward_of_strided_inputs_and_poisoned_weights():
    values, indices, weights, _ = inputs(60, 20, 6, 7)
    weights[2, 3] = float("nan")
    out = forward(values.T.contiguous().T, indices.T.contiguous().T, weights.T.contiguous().T)
    assert out.isnan().any(1).tolist() == [t == 2 for t in range(6)]
    assert_norm_close(out[:2], reference.sparse_lookup(values.double(), indices[:2], weights[:2].double()), 7)


def test_forward_does_not_read_the_scale_of_rows_it_does_not_read():
    values, indices, weights, scale = inputs(60, 20, 3, 7, FP8)
    scale[0] = float("nan")
    indices.clamp_(min=1)
    assert forward(values, indices, weights, scale).isfinite().all()


@pytest.fixture(params=[False, True], ids=["decoded", "converted"])
def converts(request, monkeypatch) -> bool:
    """True: 8-bit tables are converted by Triton's cast, which is an instruction on sm_89 and newer."""
    monkeypatch.setattr(kernels("lookup"), "converts_e4m3", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("d", [256, 255])  # words, bytes
def test_every_e4m3_code_is_read(d, converts):
    codes = torch.arange(256, dtype=torch.uint8)[:d].view(1, d)
    if converts:  # the interpreter's cast knows no NaN; the instruction does
        codes = codes.masked_fill((codes & 0x7F) == 0x7F, 0)
    out = forward(codes.view(FP8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(1))
    torch.testing.assert_close(out, codes.view(FP8).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("d", [1, 20, 255, 576])
def test_8_bits_decoded_and_converted_give_the_same_bits(d, monkeypatch):
    lookup, results = kernels("lookup"), []
    values, indices, weights, scale = inputs(60, d, 3, 9, FP8)
    grad = torch.randn(3, d).to(weights.dtype)
    for way, few in ((False, 64), (False, 0), (True, 64), (True, 0)):  # split and whole
        monkeypatch.setattr(lookup, "converts_e4m3", lambda device, way=way: way)
        monkeypatch.setattr(lookup, "FEW_TOKENS", few)
        out = forward(values, indices, weights, scale)
        results.append((out, kernels("backward").backward(grad, values, indices, weights, scale, False, True)[1]))
    for out, grad_weights in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad_weights, results[0][1])


@pytest.mark.parametrize(("capability", "words", "bytes_"), [
    ((8, 0), torch.int32, torch.uint8), ((8, 6), torch.int32, torch.uint8), ((8, 9), FP8, FP8), ((10, 0), FP8, FP8),
])  # fmt: skip
def test_the_device_decides_how_8_bits_are_read(capability, words, bytes_, monkeypatch):
    lookup = kernels("lookup")
    assert not lookup.converts_e4m3(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_device = lookup.converts_e4m3.__wrapped__(torch.device("cuda", 0))  # past the cache
    monkeypatch.setattr(lookup, "converts_e4m3", lambda device: on_device)
    assert [lookup.readable(torch.zeros(3, d).to(FP8)).dtype for d in (20, 21)] == [words, bytes_]
    assert lookup.readable(torch.zeros(3, 20)).dtype == torch.float32


def gradients(values: Tensor, scale: Tensor | None, indices: Tensor, weights: Tensor, grad: Tensor):
    leaves = [exact(values, scale).requires_grad_(), weights.double().requires_grad_()]
    return torch.autograd.grad(reference.sparse_lookup(leaves[0], indices, leaves[1]), leaves, grad.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "t", "k"), SHAPES)
def test_backward(n, d, t, k, dtype):
    backward = kernels("backward").backward
    values, indices, weights, scale = inputs(n, d, t, k, dtype, torch.int32 if d == 20 else torch.int64)
    grad = torch.randn(t, d).to(weights.dtype)
    gv, gw = gradients(values, scale, indices, weights, grad)
    none, alone = backward(grad, values, indices, weights, scale, False, True)
    assert none is None
    assert_norm_close(alone, gw, d)
    assert alone.dtype == weights.dtype
    if dtype != FP8:
        got_gv, got_gw = backward(grad, values, indices, weights, scale, True, True)
        assert_norm_close(got_gv, gv, most_reads(indices))
        assert got_gv.dtype == dtype
        assert torch.equal(got_gw, alone)
        lone, none = backward(grad, values, indices, weights, scale, True, False)
        assert none is None
        assert torch.equal(got_gv, lone)


def hot(n: int, d: int, t: int, k: int, dtype=torch.float32):
    values, indices, weights, _ = inputs(n, d, t, k, dtype)
    indices[:, 0] = n // 2
    indices[: t // 2] = n // 2
    return values, indices, weights, torch.randn(t, d).to(dtype)


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_of_a_hot_row(length, dtype, monkeypatch):
    monkeypatch.setattr(kernels("segments"), "LENGTH", length)
    values, indices, weights, grad = hot(60, 20, 40, 3, dtype)
    backward = kernels("backward").backward
    gv, gw = gradients(values, None, indices, weights, grad)
    got_gv, got_gw = backward(grad, values, indices, weights, None, True, True)
    assert_norm_close(got_gv, gv, most_reads(indices))
    assert_norm_close(got_gw, gw, 20)
    again = backward(grad, values, indices, weights, None, True, True)
    assert torch.equal(got_gv, again[0])
    assert torch.equal(got_gw, again[1])


@pytest.mark.parametrize("need_values", [True, False])
def test_gradient_of_weights_has_the_same_bits_however_it_is_split(need_values):
    values, indices, weights, grad = hot(20, 40, 12, 9)
    backward = kernels("backward").backward
    whole = backward(grad, values, indices, weights, None, need_values, True)[1]
    cuts = zip(grad.split(5), indices.split(5), weights.split(5), strict=True)
    assert torch.equal(whole, torch.cat([backward(g, values, i, w, None, need_values, True)[1] for g, i, w in cuts]))


@pytest.mark.parametrize("length", [2, 128])
@pytest.mark.parametrize(("n", "t", "k"), [(60, 40, 3), (1000, 6, 7), (1, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(n, t, k, dtype, length, monkeypatch):
    monkeypatch.setattr(kernels("segments"), "LENGTH", length)
    values, indices, weights, grad = hot(n, 20, t, k, dtype)
    rows, grads = kernels("backward").rows(grad, indices, weights, n)
    read = indices.unique()
    assert rows.dtype == torch.int64
    assert grads.dtype == dtype
    assert rows.tolist() == (read.tolist() + [read[-1].item()] * (min(n, t * k) - len(read)))
    assert not grads[len(read) :].any()
    table = torch.zeros(n, 20, dtype=dtype).index_copy(0, read, grads[: len(read)])
    assert_norm_close(table, gradients(values, None, indices, weights, grad)[0], most_reads(indices))


@pytest.mark.parametrize("hot_rows", [1, 5])
@pytest.mark.parametrize("width", [1, 20, 577])
def test_hot_rows_within_a_small_scratch(width, hot_rows, monkeypatch):
    """The sums of the hot rows' segments fit in SCRATCH, and every read is added: backward, rows and fused update."""
    segments, places = kernels("segments"), 6
    monkeypatch.setattr(segments, "LENGTH", 3)
    monkeypatch.setattr(segments, "SCRATCH", 4 * width * places)
    values, indices, weights, _ = inputs(9, width, 31, 3)
    indices[:, 1:] = torch.arange(62).view(31, 2) % hot_rows
    grad = torch.randn(31, width)
    found = segments.segment([indices], [weights], *values.shape)
    assert kernels("segments").sum_hot(grad, found).nbytes <= 4 * width * places
    assert len(found.long_rows) <= places // 2
    gv, gw = gradients(values, None, indices, weights, grad)
    got_gv, got_gw = kernels("backward").backward(grad, values, indices, weights, None, True, True)
    assert_norm_close(got_gv, gv, most_reads(indices))
    assert_norm_close(got_gw, gw, width)
    read, grads = kernels("backward").rows(grad, indices, weights, 9)
    assert_norm_close(grads[: len(read.unique())], gv[read.unique()], most_reads(indices))
    total = torch.zeros(9)
    kernels("update").adagrad_(
        values.clone(), None, total, [grad], [indices], [weights], lr=0.1, eps=1e-9, weight_decay=0.0, seed=0
    )
    assert_norm_close(total, gv.square().mean(1), most_reads(indices) + width)


WIDTHS = [576, 577, 768, 1000, 1001, 1536]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_fp32_weights_of_half_values(width, dtype):
    """Weights are not rounded to the dtype of the values: the results are as exact as their own dtypes."""
    values, indices, _, _ = inputs(60, width, 3, 9, dtype)
    weights = torch.randn(3, 9)
    right = reference.sparse_lookup(values.double(), indices, weights.double())
    for out in (torch.float32, dtype):
        got = forward(values, indices, weights, dtype=out)
        assert got.dtype == out
        assert_norm_close(got, right, 9)
    backward = kernels("backward").backward
    for kind in (torch.float32, dtype):
        grad = torch.randn(3, width).to(kind)
        gv, gw = gradients(values, None, indices, weights, grad)
        got_gv, got_gw = backward(grad, values, indices, weights, None, True, True)
        assert got_gv.dtype == dtype
        assert got_gw.dtype == torch.float32
        assert_norm_close(got_gv, gv, most_reads(indices))
        assert_norm_close(got_gw, gw, width)
        assert_norm_close(backward(grad, values, indices, weights, None, False, True)[1], gw, width)
        read, rows = kernels("backward").rows(grad, indices, weights, 60)
        assert rows.dtype == kind
        assert_norm_close(rows[: len(read.unique())], gv[read.unique()], most_reads(indices))


@pytest.mark.parametrize("width", WIDTHS)
def test_few_lanes_have_no_column(width):
    """A slice is two warps of 16 bytes a lane, or one where that covers fewer columns: less than a warp has no column."""
    lookup = kernels("lookup")
    for dtype in DTYPES:
        warp = 512 // dtype.itemsize
        for how in (lookup.plan(width, dtype), kernels("backward").plan("segment_gradients", width, dtype)):
            assert how.block in (warp, 2 * warp)
            assert width <= how.block * how.slices < width + warp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("few", [0, 64])
def test_a_measured_plan_replaces_the_default(dtype, few, monkeypatch):
    """Its slices, warps, registers and hints change no bit; its rows per step change the order of the additions."""
    monkeypatch.setattr(kernels("lookup"), "FEW_TOKENS", few)
    values, indices, weights, scale = inputs(60, 40, 5, 19, dtype)
    out = forward(values, indices, weights, scale)
    seen = []
    launch = kernels("lookup").lookup_forward
    monkeypatch.setattr(kernels("lookup"), "lookup_forward", recorded(launch, seen))
    for change in ({"block": 16}, {"warps": 4, "registers": 128}, {"cache": ""}, {"cache": "evict_first", "block": 128}):
        plan = {"rows": 8, "block": 64, "warps": 1, "registers": None, "cache": "evict_last"} | change
        with use("forward", plan):
            assert torch.equal(forward(values, indices, weights, scale), out)
        options = {"ROWS": 8, "BLOCK_D": plan["block"], "CACHE": plan["cache"], "num_warps": plan["warps"]}
        assert options.items() <= seen[-1].items()
        assert seen[-1].get("maxnreg") == plan["registers"]
    right = reference.sparse_lookup(exact(values, scale), indices, weights.double())
    for rows in (1, 2, 16, 32):
        with use("forward", {"rows": rows, "block": 32, "warps": 1, "cache": ""}):
            assert_norm_close(forward(values, indices, weights, scale), right, 19)


def recorded(kernel, seen: list[dict]):
    """The kernel; each launch adds its keyword arguments to `seen`."""

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **options: (seen.append(options), kernel[grid](*args, **options))

    return Recorded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_measured_plan_of_the_gradients_replaces_the_default(dtype, monkeypatch):
    monkeypatch.setattr(kernels("segments"), "LENGTH", 4)
    values, indices, weights, grad = hot(60, 40, 12, 3, dtype)
    backward = kernels("backward").backward
    default = backward(grad, values, indices, weights, None, True, True)
    right = gradients(values, None, indices, weights, grad)
    for change in ({"registers": 96}, {"cache": "evict_first"}, {"warps": 2}, {"rows": 8}, {"block": 16}, {"block": 256}):
        plan = {"rows": 2, "block": 64, "warps": 1, "registers": None, "cache": ""} | change
        with use("segment_gradients", plan), use("token_dots", plan):
            got = backward(grad, values, indices, weights, None, True, True)
            alone = backward(grad, values, indices, weights, None, False, True)[1]
        if "rows" not in change:
            assert torch.equal(got[0], default[0])
        assert_norm_close(got[0], right[0], most_reads(indices))
        assert_norm_close(got[1], right[1], 40)
        assert_norm_close(alone, right[1], 40)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_segments_cover_every_read_once(data):
    segments = kernels("segments")
    n, length, most = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5)), data.draw(st.integers(2, 40))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3))
    indices = [
        torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=t * k, max_size=t * k))).view(t, k) for t, k in sizes
    ]
    weights = [torch.rand(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "LENGTH", length)
        patch.setattr(segments, "SCRATCH", 4 * most)
        found = segments.segment(indices, weights, n, width=1)
    flat = torch.cat([i.flatten() for i in indices])
    order = flat.argsort(stable=True)
    assert torch.equal(found.order, order)
    assert torch.equal(found.slots.long(), flat[order])
    owners = [torch.arange(t).repeat_interleave(k) + sum(s for s, _ in sizes[:at]) for at, (t, k) in enumerate(sizes)]
    assert torch.equal(found.tokens.long(), torch.cat(owners)[order])
    assert torch.equal(found.weights, torch.cat([w.flatten() for w in weights])[order])
    reads = len(flat)
    entries, places, pieces, longs = [], 0, [], []
    counts = flat.unique(return_counts=True)[1].tolist()
    length = max(length, -(-2 * sum(count for count in counts if count > length) // most))
    first = 0
    for rank, count in enumerate(counts):
        assert found.starts[rank] == first
        cuts = [(first + at, min(first + at + length, first + count)) for at in range(0, count, length)]
        many = len(cuts) > 1
        entries += [(*cut, rank, places + at if many else -1) for at, cut in enumerate(cuts)]
        if many:
            longs.append((first, rank, places, places + len(cuts)))
            pieces += cuts
            places += len(cuts)
        first += count
    assert (found.starts[rank + 1 :] == reads).all()
    assert found.last.item() == rank
    assert len(found.long_segments) <= most
    for got, want, width in ((found.table, entries, 4), (found.long_segments, pieces, 2), (found.long_rows, longs, 4)):
        assert len(want) <= len(got)
        assert got.tolist() == [list(entry) for entry in want] + [[0] * width] * (len(got) - len(want))
