"""`sparse_dots` compared with its float64 reference: values, gradients of all three kinds, shapes, dtypes, errors, tracing.

Forward mode, `torch.func` and second derivatives are in `test_derivatives`, every backend in `test_contract`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from closeness import assert_norm_close, most_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memrewrite.kernels import ops, reference, rounding
from memrewrite.kernels.pending import Pending

OPS = torch.ops.memrewrite
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def dots_inputs(n, d, t, k, dtype=torch.float64, of_x=None, index=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    indices = torch.randint(0, n, (t, k), generator=g).to(index)
    x = torch.randn(t, d, generator=g, dtype=torch.float64).to(of_x or dtype)
    return values, indices, x


def loops(values: Tensor, indices: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients, written out one read at a time, in float64."""
    values, x, grad = values.double(), x.double(), grad.double()
    out, gv, gx = torch.zeros(indices.shape, dtype=torch.float64), torch.zeros_like(values), torch.zeros_like(x)
    for t, j in itertools.product(*map(range, indices.shape)):
        i = int(indices[t, j])
        out[t, j] = values[i] @ x[t]
        gv[i] += grad[t, j] * x[t]
        gx[t] += grad[t, j] * values[i]
    return out, gv, gx


def assert_dots_right(values: Tensor, indices: Tensor, x: Tensor) -> None:
    values, x = values.detach().requires_grad_(), x.detach().requires_grad_()
    out = ops.sparse_dots(values, indices, x)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    gv, gx = torch.autograd.grad(out, (values, x), grad)
    exact = [one.detach().double().requires_grad_() for one in (values, x)]
    want = reference.sparse_dots(exact[0], indices, exact[1])
    want_gv, want_gx = torch.autograd.grad(want, exact, grad.double())
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    assert (out.dtype, gv.dtype, gx.dtype) == (wide, values.dtype, x.dtype)
    assert_norm_close(out, want, values.shape[1])
    assert_norm_close(gv, want_gv, most_reads(indices))
    assert_norm_close(gx, want_gx, indices.shape[1])


def test_reference_is_the_formula():
    values, indices, x = dots_inputs(5, 3, 4, 6)
    grad = torch.randn(4, 6, dtype=torch.float64)
    exact = [values.requires_grad_(), x.requires_grad_()]
    out = reference.sparse_dots(values, indices, x)
    found = (out, *torch.autograd.grad(out, exact, grad))
    for got, right in zip(found, loops(values.detach(), indices, x.detach(), grad), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize(("dtype", "of_x"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize(
    ("n", "d", "t", "k"), [(1, 1, 1, 1), (63, 20, 60, 7), (60, 576, 63, 128), (1000, 1024, 1, 128), (60, 1, 63, 1)]
)
def test_dots_and_gradients(n, d, t, k, dtype, of_x):
    if dtype != torch.float64 and of_x == torch.float64:  # the sums are fp32, and so is the gradient of x, whatever its dtype
        values, indices, x = dots_inputs(n, d, t, k, dtype, of_x)
        assert_norm_close(ops.sparse_dots(values, indices, x), reference.sparse_dots(values.double(), indices, x), d)
        return
    for index in (torch.int32, torch.int64):
        assert_dots_right(*dots_inputs(n, d, t, k, dtype, of_x, index))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES[1:]),
    st.integers(),
)
def test_any_shape(n, d, t, k, dtype, of_x, seed):
    assert_dots_right(*dots_inputs(n, d, t, k, dtype, of_x, seed=seed % 2**32))


@pytest.mark.parametrize("of_x", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("n", "d", "t", "k"), [(60, 20, 9, 7), (63, 576, 3, 128), (1, 1, 1, 1)])
def test_eight_bits(n, d, t, k, of_x):
    """The rows are multiplied by their scales; the gradient of x is computed, that of the table goes to its queue."""
    wide, indices, x = dots_inputs(n, d, t, k, torch.float32, of_x)
    scale = rounding.row_scale(wide)
    values = (wide / scale[:, None]).to(rounding.FP8).requires_grad_()
    exact, queue = values.detach().double() * scale[:, None].double(), Pending()
    x.requires_grad_()
    out, grad = ops.sparse_dots(values, indices, x, scale, gradient="fused", pending=queue), torch.randn(t, k)
    with queue.tried():
        out.backward(grad)
        (kept,) = queue.take()
    want, gv, gx = loops(exact, indices, x.detach(), grad)
    assert out.dtype == torch.float32
    assert x.grad.dtype == of_x
    assert values.grad is None
    assert_norm_close(out, want, d)
    assert_norm_close(x.grad, gx, k)
    factors = kept.grad.double(), kept.indices, kept.weights.double()
    assert_norm_close(reference.table_gradient(*([one] for one in factors), n), gv, most_reads(indices))


def test_non_contiguous():
    values, indices, x = dots_inputs(60, 20, 63, 7)
    wide = torch.randn(60, 41, dtype=torch.float64)
    for table in (values.T.contiguous().T, wide[:, 1::2], values.flip(0)[::2].repeat_interleave(2, 0)):
        assert_dots_right(table, indices.T.contiguous().T, x.T.contiguous().T)
    assert_dots_right(values.float(), indices[:1].expand(63, 7), x[:1].expand(63, 20).bfloat16())
    table, x = values.clone().requires_grad_(), x.clone().requires_grad_()
    ops.sparse_dots(table, indices, x).sum().backward()  # the gradient arrives expanded
    _, gv, gx = loops(values, indices, x.detach(), torch.ones(63, 7))
    torch.testing.assert_close((table.grad, x.grad), (gv, gx))


@pytest.mark.parametrize(("wants_values", "wants_x"), [(True, False), (False, True)])
def test_gradient_of_one_input(wants_values, wants_x):
    values, indices, x = dots_inputs(60, 20, 63, 7)
    grad = torch.randn(63, 7, dtype=torch.float64)
    _, gv, gx = loops(values, indices, x, grad)
    ops.sparse_dots(values.requires_grad_(wants_values), indices, x.requires_grad_(wants_x)).backward(grad)
    for leaf, wanted, right in ((values, wants_values, gv), (x, wants_x, gx)):
        assert (leaf.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(leaf.grad, right)


@pytest.mark.parametrize("of_x", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_row_sparse_gradient(dtype, of_x):
    values, indices, x = dots_inputs(60, 20, 63, 7, dtype, of_x)
    grad = torch.randn(63, 7)
    ops.sparse_dots(values.requires_grad_(), indices, x, gradient="sparse").backward(grad)
    assert values.grad.is_sparse
    assert values.grad.dtype == dtype
    gv = loops(values.detach(), indices, x, grad)[1]
    assert_norm_close(values.grad.to_dense(), gv, most_reads(indices))


def test_fused_factors_are_kept_only_for_a_table_that_is_trained():
    values, indices, x = dots_inputs(60, 20, 63, 7, torch.float32)
    queue, leaves = Pending(), (values.requires_grad_(), x.requires_grad_())
    with queue.tried():
        out = ops.sparse_dots(values, indices, x, gradient="fused", pending=queue).square().sum()
        torch.autograd.grad(out, x, retain_graph=True)
        assert not queue.waiting
        out.backward()
        assert len(queue.take()) == 1
        again = ops.sparse_dots(values, indices, x, gradient="fused", pending=queue).square().sum()
        with pytest.raises(RuntimeError, match='gradient "fused" has no second derivatives'):
            torch.autograd.grad(again, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no optimizer uses it"):
        ops.sparse_dots(values, indices, x, gradient="fused", pending=queue).sum().backward()


def test_one_hot_row_adds_up_in_fp32():
    """4096 gradients of one row: a bf16 running sum would stop growing at 256."""
    values = torch.ones(3, 20, dtype=torch.bfloat16, requires_grad=True)
    x = torch.ones(64, 20, dtype=torch.bfloat16)
    ops.sparse_dots(values, torch.ones(64, 64, dtype=torch.int64), x).sum().backward()
    assert values.grad.tolist() == [[0.0] * 20, [4096.0] * 20, [0.0] * 20]


@pytest.mark.parametrize(
    ("n", "t", "k", "d"), [(60, 0, 7, 20), (60, 63, 0, 20), (60, 5, 3, 0), (0, 0, 7, 20), (0, 63, 0, 20), (0, 0, 0, 0)]
)
def test_empty(n, t, k, d):
    values, x = torch.zeros(n, d, requires_grad=True), torch.zeros(t, d, requires_grad=True)
    out = ops.sparse_dots(values, torch.zeros(t, k, dtype=torch.int64), x)
    assert out.shape == (t, k)
    assert not out.any()
    out.sum().backward()
    assert values.grad.shape == (n, d)
    assert x.grad.shape == (t, d)


@pytest.mark.parametrize(("bad", "named"), [(60, "60"), (-1, "-1"), (2**31 - 1, str(2**31 - 1))])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_index_out_of_range(bad, named, index):
    values, indices, x = dots_inputs(60, 20, 63, 7, index=index)
    indices[40, 3] = bad
    with pytest.raises(IndexError, match=rf"^sparse_dots: index {named} is out of range for a table of 60 slots"):
        ops.sparse_dots(values, indices, x)
    with pytest.raises(IndexError, match=r"^sparse_dots: .*table of 0 slots"):
        ops.sparse_dots(values[:0], indices, x)


def test_refuses():
    values, indices, x = dots_inputs(60, 20, 63, 7)
    scale = torch.ones(60)
    for error, words, call in (
        (ValueError, r"values \[N, D\].*\(60,\)", (values[:, 0], indices, x)),
        (ValueError, r"x is \(63, 19\), not \(63, 20\)", (values, indices, x[:, 1:])),
        (ValueError, r"x is \(62, 20\), not \(63, 20\)", (values, indices, x[1:])),
        (ValueError, r"scale is \(59,\), not \(60,\)", (values, indices, x, scale[1:])),
        (TypeError, "int16", (values, indices.short(), x)),
        (TypeError, "floating dtype", (values.long(), indices, x)),
        (TypeError, r"one of 16 or more bits, not torch\.float64 and torch\.int64", (values, indices, x.long())),
        (TypeError, "8-bit values need a `scale`", (values.to(rounding.FP8), indices, x)),
        (TypeError, "scale must be float32", (values, indices, x, scale.double())),
        (ValueError, "one device", (values, indices, x.to("meta"))),
    ):
        with pytest.raises(error, match=f"sparse_dots.*{words}"):
            ops.sparse_dots(*call)
    with pytest.raises(ValueError, match="sparse_dots: there is no gradient 'none'; try one of dense, sparse, fused"):
        ops.sparse_dots(values, indices, x, gradient="none")
    with pytest.raises(ValueError, match="sparse_dots: there is no backend 'cuda'"):
        ops.sparse_dots(values, indices, x, backend="cuda")
    with pytest.raises(ValueError, match="sparse_dots: a fused gradient needs the queue"):
        ops.sparse_dots(values.requires_grad_(), indices, x, gradient="fused")
    eight = values.detach().to(rounding.FP8).requires_grad_()
    with pytest.raises(ValueError, match=r'sparse_dots: values of 8 bits.*gradient="fused"'):
        ops.sparse_dots(eight, indices, x, scale)
    with pytest.raises(RuntimeError, match="the scale of a table has no derivative"):
        ops.sparse_dots(values.detach(), indices, x, scale.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    values, indices, x = dots_inputs(60, 20, 63, 7, dtype)
    for index in (indices, indices.int()):
        torch.library.opcheck(OPS.sparse_dots, (values.requires_grad_(), index, x.requires_grad_()))
    narrow, scale = values.detach(), torch.rand(60)
    torch.library.opcheck(OPS.sparse_dots, (narrow, indices, x.detach().half().requires_grad_(), scale), {"backend": "torch"})


def peer(values: Tensor, inputs: Tensor, x: Tensor, scores: Tensor) -> Tensor:
    best, slots = ops.product_key_topk(scores, scores, 7)
    return ops.sparse_lookup(values, slots, best.softmax(-1) * ops.sparse_dots(inputs, slots, x).sigmoid())


def test_compile_fullgraph_and_dynamic():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(peer, fullgraph=True, dynamic=True, backend=counter)
    for t in (63, 5, 60):
        inputs = [torch.randn(shape, requires_grad=True) for shape in ((400, 20), (400, 9), (t, 9), (t, 20))]
        got, want = compiled(*inputs), peer(*inputs)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1  # no recompilation for another T


def test_a_direct_call_gives_the_bits_of_the_dispatcher(monkeypatch):
    values, indices, x = dots_inputs(60, 20, 63, 7, torch.float32)
    want = OPS.sparse_dots(values, indices, x)
    with torch.no_grad():
        monkeypatch.setattr(OPS, "sparse_dots", None)
        assert torch.equal(ops.sparse_dots(values, indices, x), want)


def test_repeats_and_keeps_its_bits_across_batch_splits():
    values, indices, x = dots_inputs(1000, 576, 63, 128, torch.bfloat16)
    whole = ops.sparse_dots(values, indices, x)
    assert torch.equal(whole, ops.sparse_dots(values, indices, x))
    for begin, end in ((0, 1), (1, 8), (8, 63)):
        part = slice(begin, end)
        assert torch.equal(ops.sparse_dots(values, indices[part], x[part]), whole[part])


def test_torch_counts_its_operations():
    values, indices, x = dots_inputs(60, 20, 63, 7)
    with FlopCounterMode(display=False) as counter:
        ops.sparse_dots(values, indices, x)
    with FlopCounterMode(display=False) as plain:
        reference.sparse_dots(values, indices, x)
    assert counter.get_total_flops() == plain.get_total_flops() == 2 * 63 * 7 * 20
