"""The operators compared with their float64 reference: values, first and second gradients, shapes, dtypes, errors, tracing."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_norm_close, most_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memrewrite.kernels import ops, reference
from memrewrite.kernels.pending import Pending
from memrewrite.kernels.torch_topk import candidate_ranks

OPS = torch.ops.memrewrite
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def lookup_inputs(n: int, d: int, t: int, k: int, dtype=torch.float64, index=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    indices = torch.randint(0, n, (t, k), generator=g).to(index)
    weights = torch.randn(t, k, generator=g, dtype=torch.float64).to(dtype)
    return values, indices, weights


def loops(values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients, written out one read at a time, in float64."""
    values, weights, grad = values.double(), weights.double(), grad.double()
    out, gv, gw = torch.zeros_like(grad), torch.zeros_like(values), torch.zeros_like(weights)
    for t, j in itertools.product(*map(range, indices.shape)):
        i = int(indices[t, j])
        out[t] += weights[t, j] * values[i]
        gv[i] += weights[t, j] * grad[t]
        gw[t, j] = grad[t] @ values[i]
    return out, gv, gw


def assert_lookup_right(values: Tensor, indices: Tensor, weights: Tensor, dtype: torch.dtype | None = None) -> None:
    values, weights = values.detach().requires_grad_(), weights.detach().requires_grad_()
    out = ops.sparse_lookup(values, indices, weights, dtype=dtype)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    gv, gw = torch.autograd.grad(out, (values, weights), grad)
    with torch.enable_grad():
        exact = [x.detach().double().requires_grad_() for x in (values, weights)]
        want = reference.sparse_lookup(exact[0], indices, exact[1])
        want_gv, want_gw = torch.autograd.grad(want, exact, grad.double())
    assert (out.dtype, gv.dtype, gw.dtype) == (dtype or values.dtype, values.dtype, weights.dtype)
    # sums of half values stay fp32 until they are stored: fp32 outputs and gradients of fp32 weights have fp32 errors
    assert_norm_close(out, want, indices.shape[1])
    assert_norm_close(gv, want_gv, most_reads(indices))
    assert_norm_close(gw, want_gw, values.shape[1])


def test_reference_is_the_formula():
    values, indices, weights = lookup_inputs(5, 3, 4, 6)
    grad = torch.randn(4, 3, dtype=torch.float64)
    exact = [values.requires_grad_(), weights.requires_grad_()]
    out = reference.sparse_lookup(values, indices, weights)
    gv, gw = torch.autograd.grad(out, exact, grad)
    for got, right in zip((out, gv, gw), loops(values.detach(), indices, weights.detach(), grad), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "t", "k"),
    [(1, 1, 1, 1), (63, 20, 60, 7), (60, 576, 63, 128), (1000, 20, 1000, 7), (1000, 1024, 1, 128), (60, 1, 63, 1)],
)
def test_lookup_and_gradients(n, d, t, k, dtype, index):
    assert_lookup_right(*lookup_inputs(n, d, t, k, dtype, index))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([None, *DTYPES[1:]]),
    st.integers(),
)
def test_lookup_any_shape(n, d, t, k, dtype, wide_weights, out, seed):
    values, indices, weights = lookup_inputs(n, d, t, k, torch.float64, seed=seed % 2**32)
    assert_lookup_right(values.to(dtype), indices, weights.to(torch.float32 if wide_weights else dtype), out)


@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookup_with_fp32_weights(dtype, out):
    for n, d, t, k in [(1000, 1024, 1, 128), (60, 576, 63, 128), (5000, 1024, 5, 7)]:
        values, indices, weights = lookup_inputs(n, d, t, k)
        assert_lookup_right(values.to(dtype), indices, weights.float(), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_weights_are_not_rounded(dtype):
    """The output is the value nearest to the exact sum; with weights rounded first, many entries would be others."""
    values, indices, weights = lookup_inputs(60, 64, 63, 7)
    values, weights = values.to(dtype), weights.float()
    exact = reference.sparse_lookup(values.double(), indices, weights.double())
    out = ops.sparse_lookup(values, indices, weights)
    assert (out == exact.to(dtype)).double().mean() > 0.99
    assert (ops.sparse_lookup(values, indices, weights.to(dtype)) == exact.to(dtype)).double().mean() < 0.8
    coo = OPS.sparse_lookup_rows(out, indices, weights, 60).to_dense()
    gradient = reference.table_gradient([out.double()], [indices], [weights.double()], 60)
    assert (coo == gradient.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_row_adds_up_in_fp32(dtype):
    """4096 gradients of one row: a bf16 running sum would stop growing at 256."""
    values = torch.ones(3, 20, dtype=dtype, requires_grad=True)
    out = ops.sparse_lookup(values, torch.ones(64, 64, dtype=torch.int64), torch.ones(64, 64, dtype=dtype))
    out.sum().backward()
    assert (out == 64).all()
    assert values.grad.tolist() == [[0.0] * 20, [4096.0] * 20, [0.0] * 20]


def test_lookup_repeats_bit_for_bit():
    inputs = lookup_inputs(63, 20, 200, 32, torch.float32)
    grad = torch.randn(200, 20)
    first, second = (OPS.sparse_lookup_backward(grad, *inputs, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_lookup_non_contiguous():
    values, indices, weights = lookup_inputs(60, 20, 63, 7)
    wide = torch.randn(60, 41, dtype=torch.float64)
    for table in (values.T.contiguous().T, wide[:, 1::2], values.flip(0)[::2].repeat_interleave(2, 0)):
        assert_lookup_right(table, indices.T.contiguous().T, weights.T.contiguous().T)
    assert_lookup_right(values.float().T.contiguous().T, indices, weights[:1].expand(63, 7).float())
    table = values.clone().requires_grad_()
    ops.sparse_lookup(table, indices, weights).sum().backward()  # the gradient arrives expanded
    torch.testing.assert_close(table.grad, loops(values, indices, weights, torch.ones(63, 20))[1])


@pytest.mark.parametrize(("wants_values", "wants_weights"), [(True, False), (False, True)])
def test_lookup_gradient_of_one_input(wants_values, wants_weights):
    values, indices, weights = lookup_inputs(60, 20, 63, 7)
    values.requires_grad_(wants_values)
    weights.requires_grad_(wants_weights)
    grad = torch.randn(63, 20, dtype=torch.float64)
    ops.sparse_lookup(values, indices, weights).backward(grad)
    _, gv, gw = loops(values.detach(), indices, weights.detach(), grad)
    for leaf, wanted, right in ((values, wants_values, gv), (weights, wants_weights, gw)):
        assert (leaf.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(leaf.grad, right)


@pytest.mark.parametrize(
    ("n", "t", "k", "d"), [(60, 0, 7, 20), (60, 63, 0, 20), (60, 5, 3, 0), (0, 0, 7, 20), (0, 63, 0, 20), (0, 0, 0, 0)]
)
def test_lookup_empty(n, t, k, d):
    values = torch.zeros(n, d, requires_grad=True)
    weights = torch.zeros(t, k, requires_grad=True)
    out = ops.sparse_lookup(values, torch.zeros(t, k, dtype=torch.int64), weights)
    assert out.shape == (t, d)
    assert not out.any()
    out.sum().backward()
    assert values.grad.shape == (n, d)
    assert weights.grad.shape == (t, k)


@pytest.mark.parametrize(("bad", "named"), [(60, "60"), (-1, "-1"), (2**31 - 1, str(2**31 - 1))])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_lookup_out_of_range(bad, named, index):
    values, indices, weights = lookup_inputs(60, 20, 63, 7, index=index)
    indices[40, 3] = bad
    with pytest.raises(IndexError, match=rf"^sparse_lookup: index {named} is out of range for a table of 60 slots"):
        ops.sparse_lookup(values, indices, weights)
    with pytest.raises(IndexError, match=f"^sparse_lookup_backward: index {named} "):
        OPS.sparse_lookup_backward(torch.zeros(63, 20, dtype=torch.float64), values, indices, weights, True, False)
    with pytest.raises(IndexError, match="table of 0 slots"):
        ops.sparse_lookup(values[:0], indices, weights)


def test_lookup_refuses():
    values, indices, weights = lookup_inputs(60, 20, 63, 7)
    with pytest.raises(ValueError, match=r"values \[N, D\].*\(60,\)"):
        ops.sparse_lookup(values[:, 0], indices, weights)
    with pytest.raises(ValueError, match=r"weights is \(63, 6\), not \(63, 7\)"):
        ops.sparse_lookup(values, indices, weights[:, 1:])
    with pytest.raises(TypeError, match="int16"):
        ops.sparse_lookup(values, indices.short(), weights)
    with pytest.raises(TypeError, match=r"the same or float32, not torch\.float32 and torch\.float64"):
        ops.sparse_lookup(values.float(), indices, weights)
    with pytest.raises(TypeError, match=r"the same or float32, not torch\.float64 and torch\.bfloat16"):
        ops.sparse_lookup(values, indices, weights.bfloat16())
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"output's dtype must be floating, with 16 or more bits, not {dtype}"):
            ops.sparse_lookup(values, indices, weights, dtype=dtype)
    with pytest.raises(TypeError, match=r"grad must be \[T, D\] of a floating dtype.*int64"):
        OPS.sparse_lookup_backward(torch.zeros(63, 20, dtype=torch.int64), values, indices, weights, True, False)
    with pytest.raises(TypeError, match="floating"):
        ops.sparse_lookup(values.long(), indices, weights.long())


def test_topk_candidates_suffice():
    for k in (1, 2, 7, 8, 32, 128):
        pairs = set(zip(*candidate_ranks(k), strict=True))
        assert all(((i + 1) * (j + 1) <= k) == ((i, j) in pairs) for i in range(k) for j in range(k))
    assert len(candidate_ranks(32)[0]) == 119


def assert_topk_right(scores1: Tensor, scores2: Tensor, k: int) -> None:
    """Against all pairs, summed in the type the sums are returned in; indices only name pairs with those sums."""
    wide = torch.float64 if scores1.dtype == torch.float64 else torch.float32
    scores, indices = ops.product_key_topk(scores1, scores2, k)
    want, _ = reference.product_key_topk(scores1.to(wide), scores2.to(wide), k)
    assert scores.dtype == wide
    assert indices.dtype == torch.int64
    torch.testing.assert_close(scores, want, rtol=0, atol=0, equal_nan=True)  # the same multiset, bit for bit
    n2 = scores2.shape[-1]
    named = scores1.to(wide).gather(-1, indices // n2) + scores2.to(wide).gather(-1, indices % n2)
    torch.testing.assert_close(scores, named, rtol=0, atol=0, equal_nan=True)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()  # no slot twice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "n1", "n2", "k"), [((), 1, 1, 1), ((3, 63), 60, 60, 7), ((5,), 128, 200, 128)])
def test_topk_is_exact(lead, n1, n2, k, dtype):
    assert_topk_right(torch.randn(*lead, n1).to(dtype), torch.randn(*lead, n2).to(dtype), k)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_topk_any_shape_with_ties_and_nan(data):
    n1, n2, t = (data.draw(st.integers(1, 24)) for _ in range(3))
    k = data.draw(st.integers(1, min(n1, n2)))
    few = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 3.0, float("nan"), float("-inf")])
    scores1, scores2 = (torch.tensor(data.draw(st.lists(few, min_size=t * n, max_size=t * n))).reshape(t, n) for n in (n1, n2))
    assert_topk_right(scores1, scores2, k)


def test_topk_empty_and_strided():
    scores, indices = ops.product_key_topk(torch.zeros(0, 3, 9), torch.zeros(0, 3, 9), 4)
    assert scores.shape == indices.shape == (0, 3, 4)
    pair = torch.randn(4, 63, 60).transpose(0, 1)
    assert_topk_right(pair[:, ::2], pair[:, 1::2], 9)


def test_topk_gradient():
    halves = [torch.randn(5, 60, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grad = torch.randn(5, 7, dtype=torch.float64)
    got = torch.autograd.grad(ops.product_key_topk(*halves, 7)[0], halves, grad)
    want = torch.autograd.grad(reference.product_key_topk(*halves, 7)[0], halves, grad)
    torch.testing.assert_close(got, want)
    half = [x.detach().bfloat16().requires_grad_() for x in halves]
    ops.product_key_topk(*half, 7)[0].sum().backward()
    assert half[0].grad.dtype == torch.bfloat16
    assert half[0].grad.sum(-1).tolist() == [7.0] * 5


def test_topk_first_called_in_inference_mode():
    halves = [torch.randn(5, 60, requires_grad=True) for _ in range(2)]
    with torch.inference_mode(), torch.device("meta"):
        before = ops.product_key_topk(*halves, 13)[0]
    after = ops.product_key_topk(*halves, 13)[0]
    after.sum().backward()
    assert torch.equal(before, after)


def test_topk_refuses():
    scores = torch.randn(5, 60)
    with pytest.raises(ValueError, match="k=0"):
        ops.product_key_topk(scores, scores, 0)
    with pytest.raises(ValueError, match="k=61 is more than the 60"):
        ops.product_key_topk(scores, scores, 61)
    with pytest.raises(ValueError, match="leading shapes"):
        ops.product_key_topk(scores, scores[:4], 3)
    with pytest.raises(ValueError, match="leading shapes"):
        ops.product_key_topk(scores, scores[0], 3)
    with pytest.raises(TypeError, match="floating"):
        ops.product_key_topk(scores, scores.double(), 3)


def test_gradcheck_both_orders():
    values, indices, weights = lookup_inputs(6, 3, 4, 5)
    leaves = (values.requires_grad_(), weights.requires_grad_())
    halves = tuple(torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for function, inputs in (
        (lambda v, w: ops.sparse_lookup(v, indices, w), leaves),
        (lambda a, b: ops.product_key_topk(a, b, 4)[0], halves),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32, None), (torch.float32,) * 2 + (torch.bfloat16,)], ids=str)
def test_second_derivatives_in_several_dtypes(dtypes):
    """Against float64: of half types, the inner gradients are stored rounded, too."""
    dtype, weights_dtype, out = dtypes
    values, indices, weights = lookup_inputs(60, 20, 63, 7)
    leaves = [values.to(dtype).requires_grad_(), weights.to(weights_dtype).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]

    def second(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        grad = torch.randn(63, 20, generator=torch.Generator().manual_seed(1)).to(y.dtype).requires_grad_()
        first = torch.autograd.grad(y, leaves, grad, create_graph=True)
        return list(torch.autograd.grad(sum(g.double().square().sum() for g in first), [*leaves, grad]))

    got = second(ops.sparse_lookup(leaves[0], indices, leaves[1], dtype=out), leaves)
    want = second(reference.sparse_lookup(exact[0], indices, exact[1]), exact)
    for one, right, leaf in zip(
        got, want, [*leaves, ops.sparse_lookup(*leaves[:1], indices, leaves[1], dtype=out)], strict=True
    ):
        assert one.dtype == leaf.dtype
        assert (one.double() - right).norm() <= 0.02 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    values, indices, weights = lookup_inputs(60, 20, 63, 7, dtype)
    grad = torch.randn(63, 20).to(dtype)
    for index in (indices, indices.int()):
        torch.library.opcheck(OPS.sparse_lookup, (values.requires_grad_(), index, weights.requires_grad_()))
    detached = (grad, values.detach(), indices, weights.detach())
    for need in itertools.product((True, False), repeat=2):
        torch.library.opcheck(OPS.sparse_lookup_backward, (*detached, *need))
    scores = [torch.randn(3, 60).to(dtype).requires_grad_() for _ in range(2)]
    torch.library.opcheck(OPS.product_key_topk, (*scores, 7))
    slots = torch.randint(0, 3600, (3, 7))
    torch.library.opcheck(OPS.product_key_topk_backward, (torch.randn(3, 7).to(dtype), slots, 60, 60))
    if dtype == torch.float32:  # second order: in bf16, tracing adds the two paths in another order
        leaves = tuple(x.requires_grad_() for x in (grad, values, weights))
        torch.library.opcheck(OPS.sparse_lookup_backward, (leaves[0], leaves[1], indices, leaves[2], True, True))
        torch.library.opcheck(OPS.product_key_topk_backward, (torch.randn(3, 7, requires_grad=True), slots, 60, 60))


class Both(torch.nn.Module):
    def forward(self, values: Tensor, scores1: Tensor, scores2: Tensor) -> Tensor:
        best, slots = ops.product_key_topk(scores1, scores2, 7)
        return ops.sparse_lookup(values, slots, best.softmax(-1))


def both_inputs(t: int) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in ((400, 20), (t, 20), (t, 20))]


def test_compile_fullgraph_and_dynamic():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(Both(), fullgraph=True, dynamic=True, backend=counter)
    for t in (63, 5, 60):
        inputs = both_inputs(t)
        got, want = compiled(*inputs), Both()(*inputs)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1  # no recompilation for another T


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_ops_with_dynamic_tokens(strict):
    t = torch.export.Dim("t")
    program = torch.export.export(Both(), tuple(both_inputs(63)), dynamic_shapes=({}, {0: t}, {0: t}), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "memrewrite.sparse_lookup.default" in targets
    assert "memrewrite.product_key_topk.default" in targets
    for tokens in (1, 2, 60):
        inputs = both_inputs(tokens)
        torch.testing.assert_close(program.module()(*inputs), Both()(*inputs))


def test_a_stray_import_of_the_folder_registers_nothing():
    """transformers imports any `kernels` on the path, this folder included when it is run from the root."""
    root = Path(__file__).parents[2]
    code = "import sys, kernels; assert 'torch' not in sys.modules and 'memrewrite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_compiled_ahead_of_time_with_dynamic_tokens(tmp_path):
    t = torch.export.Dim("t", min=2, max=4096)
    program = torch.export.export(Both(), tuple(both_inputs(63)), dynamic_shapes=({}, {0: t}, {0: t}))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "both.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for tokens in (63, 5):
        inputs = [x.detach() for x in both_inputs(tokens)]
        torch.testing.assert_close(compiled(*inputs), Both()(*inputs))


def test_the_backend_and_the_reason_are_logged_once(caplog, monkeypatch):
    monkeypatch.setattr("memrewrite.kernels.backends._logged", set())
    inputs = lookup_inputs(6, 3, 4, 5)
    with caplog.at_level("INFO", "memrewrite.kernels"):
        for _ in range(3):
            ops.sparse_lookup(*inputs)
        ops.sparse_lookup(*inputs, backend="torch")
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [
        "sparse_lookup runs on the backend 'torch' (triton cannot: the tensors are not on a CUDA device; "
        "native cannot: there are no kernels for torch.float64 with weights of torch.float64)",
        "sparse_lookup runs on the backend 'torch' (requested)",
    ]


def test_backends_are_refused_by_name():
    inputs = lookup_inputs(6, 3, 4, 5)
    with pytest.raises(ValueError, match="no backend 'cuda'; try one of auto, triton, native, torch"):
        ops.sparse_lookup(*inputs, backend="cuda")
    with pytest.raises(ValueError, match='triton cannot: the tensors are not on a CUDA device; try backend="auto"'):
        ops.sparse_lookup(*inputs, backend="triton")
    with pytest.raises(ValueError, match="triton cannot"):
        ops.product_key_topk(torch.randn(3, 9), torch.randn(3, 9), 2, backend="triton")
    with pytest.raises(ValueError, match="no gradient 'none'; try one of dense, sparse, fused"):
        ops.sparse_lookup(*inputs, gradient="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lookup_keeps_its_bits_across_batch_splits(dtype):
    """A token's output and the gradient of its weights do not depend on the other tokens of the batch."""
    values, indices, weights = lookup_inputs(1000, 576, 63, 128, dtype)
    grad = torch.randn(63, 576).to(dtype)
    whole = ops.sparse_lookup(values, indices, weights)
    _, gw = OPS.sparse_lookup_backward(grad, values, indices, weights, False, True)
    for begin, end in ((0, 1), (1, 8), (8, 63)):
        part = slice(begin, end)
        assert torch.equal(ops.sparse_lookup(values, indices[part], weights[part]), whole[part])
        _, part_gw = OPS.sparse_lookup_backward(grad[part], values, indices[part], weights[part], False, True)
        assert torch.equal(part_gw, gw[part])


def test_topk_with_softmax():
    halves = [torch.randn(5, 60, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grad = torch.randn(5, 7, dtype=torch.float64)
    s, slots = ops.product_key_topk(*halves, 7, softmax=True)
    best, others = ops.product_key_topk(*halves, 7)
    assert torch.equal(slots, others)
    torch.testing.assert_close(s, best.softmax(-1))
    got, want = (torch.autograd.grad(out, halves, grad) for out in (s, best.softmax(-1)))
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda a, b: ops.product_key_topk(a, b, 7, softmax=True)[0], halves)
    assert torch.autograd.gradgradcheck(lambda a, b: ops.product_key_topk(a, b, 7, softmax=True)[0], halves)


def test_opcheck_of_every_option():
    values, indices, weights = lookup_inputs(60, 20, 63, 7, torch.float32)
    leaves = (values.requires_grad_(), indices, weights.requires_grad_())
    torch.library.opcheck(OPS.sparse_lookup, leaves, {"backend": "torch"})
    torch.library.opcheck(OPS.sparse_lookup, leaves, {"dtype": torch.float64})
    half = values.detach().bfloat16().requires_grad_()
    torch.library.opcheck(OPS.sparse_lookup, (half, indices, leaves[2]), {"dtype": torch.float32})
    narrow, scale = values.detach().bfloat16(), torch.rand(60)  # opcheck itself multiplies its inputs, which 8 bits cannot
    torch.library.opcheck(OPS.sparse_lookup, (narrow, indices, weights.detach().half().requires_grad_(), scale))
    grad = torch.randn(63, 20)
    torch.library.opcheck(OPS.sparse_lookup_backward, (grad, narrow, indices, weights.detach(), False, True, scale))
    halves = [torch.randn(3, 60, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(OPS.product_key_topk, (*halves, 7, True))
    queue = Pending()
    with queue.tried():
        torch.library.opcheck(OPS.sparse_lookup_keep, (grad, indices, weights.detach(), queue.count, queue.handle))
    # opcheck compares outputs with torch.testing.assert_close, which knows COO, and traces, which needs fakes of it
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.sparse_lookup_rows, (grad, indices, weights.detach(), 60), test_utils=tests)


def test_topk_backward_uses_the_backend_of_its_forward(monkeypatch):
    """The choice depends on the widths of the scores, which the gradient does not have."""
    asked = []
    monkeypatch.setattr(
        "memrewrite.kernels.triton_backend.supports_topk", lambda a, b, k: asked.append((a.shape[-1], b.shape[-1], k)) or "no"
    )
    halves = [torch.randn(2, n, requires_grad=True) for n in (70, 90)]
    ops.product_key_topk(*halves, 5)[0].sum().backward()
    assert asked == [(70, 90, 5), (70, 90, 5)]
