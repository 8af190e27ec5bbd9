"""The operator `product_keys` compared with its float64 formula: both ways of the backward, tracing, memory, errors."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from closeness import assert_norm_close, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from memrewrite.kernels import backends, ops, product_keys, reference

OPS = torch.ops.memrewrite
READING, PRODUCTS = 40, 20  # keys of which the backward with k = 3 reads some, or multiplies all


def inputs(t: int = 9, h: int = 2, n: int = READING, d: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t + n)
    queries, keys = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((t, 2 * h, d), (2 * h, n, d)))
    return queries.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()


def formula(queries: Tensor, keys: Tensor, k: int, softmax: bool = True) -> tuple[Tensor, Tensor]:
    """Scores of all keys, all sums of both halves, the k largest."""
    scores = torch.einsum("tad,and->atn", queries, keys)
    best, slots = reference.product_key_topk(scores[::2], scores[1::2], k)
    return best.softmax(-1) if softmax else best, slots


def at_slots(queries: Tensor, keys: Tensor, slots: Tensor, softmax: bool) -> Tensor:
    """The sums of given slots [h, T, k]: for half types, whose rounded scores choose other slots than exact ones."""
    scores = torch.einsum("tad,and->atn", queries, keys)
    sums = scores[::2].gather(-1, slots // keys.shape[1]) + scores[1::2].gather(-1, slots % keys.shape[1])
    return sums.softmax(-1) if softmax else sums


def test_the_two_sizes_differ_in_the_way_of_the_backward():
    assert product_keys.reads_keys("cpu", READING, 3, 5)
    assert not product_keys.reads_keys("cpu", PRODUCTS, 3, 5)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    ("t", "h", "n", "d", "k"), [(1, 1, 1, 1, 1), (63, 2, 60, 20, 7), (9, 4, 129, 33, 32), (5, 3, 300, 64, 8)]
)
def test_forward_and_gradients(t, h, n, d, k, softmax):
    leaves = inputs(t, h, n, d)
    weights, slots = ops.product_keys(*leaves, k, softmax=softmax)
    want, want_slots = formula(*leaves, k, softmax)
    assert torch.equal(slots, want_slots)
    torch.testing.assert_close(weights, want)
    grad = torch.randn(weights.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(weights, leaves, grad), torch.autograd.grad(want, leaves, grad))


@pytest.mark.parametrize("n", [READING, PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_few_bits(dtype, n):
    """The sums' gradients stay fp32 when the keys are read; the products round them to the type of the keys."""
    leaves = inputs(63, 2, n, 33, dtype)
    weights, slots = ops.product_keys(*leaves, 3, softmax=False)
    grad = torch.randn(weights.shape)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = at_slots(*exact, slots, softmax=False)
    assert weights.dtype == torch.float32
    assert relative_error(weights, want) < 4 * torch.finfo(dtype).eps
    got, right = torch.autograd.grad(weights, leaves, grad), torch.autograd.grad(want, exact, grad.double())
    for one, other, terms in zip(got, right, (3, 63 * 3), strict=True):
        assert one.dtype == dtype
        assert_norm_close(one, other, terms, roundings=1 if n == READING else 2)


@pytest.mark.parametrize("n", [READING, PRODUCTS])
@pytest.mark.parametrize("softmax", [True, False])
def test_gradcheck_both_orders(n, softmax):
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = tuple(x.requires_grad_(w) for x, w in zip(inputs(3, 1, n, 3), wanted, strict=True))

        def weights(queries: Tensor, keys: Tensor) -> Tensor:
            return ops.product_keys(queries, keys, 3, softmax=softmax)[0]

        assert torch.autograd.gradcheck(weights, leaves)
        assert torch.autograd.gradgradcheck(weights, leaves)


@pytest.mark.parametrize("n", [READING, PRODUCTS])
def test_opcheck(n):
    leaves = inputs(n=n, dtype=torch.float32)
    for softmax in (True, False):
        torch.library.opcheck(OPS.product_keys, (*leaves, 3, softmax))
    slots = torch.randint(0, n * n, (2, 9, 3))
    grad = torch.randn(2, 9, 3, requires_grad=True)
    for need in itertools.product((True, False), repeat=2):
        torch.library.opcheck(OPS.product_keys_backward, (grad.detach(), slots, *(x.detach() for x in leaves), *need))
    torch.library.opcheck(OPS.product_keys_backward, (grad, slots, *leaves, True, True))


class Largest(TorchDispatchMode):
    """Records the number of entries of the largest tensor that an operator returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return out


def test_nothing_of_all_scores_is_kept_or_made_in_the_backward():
    t, h, n, d, k = 64, 2, 500, 16, 4
    leaves = inputs(t, h, n, d, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        weights, slots = ops.product_keys(*leaves, k)
    scores = t * 2 * h * n
    assert max(x.untyped_storage().nbytes() // x.itemsize for x in kept) < scores / 2
    grad = torch.randn(weights.shape)
    with Largest() as seen:
        product_keys.backward(grad, slots, *(x.detach() for x in leaves), True, True)
    assert 2 * h * n * d <= seen.entries < scores / 2  # the gradient of the keys is the largest
    with Largest() as seen:
        product_keys._by_products(grad, slots, *(x.detach() for x in leaves), True, True)
    assert seen.entries == scores


def test_equal_keys_of_one_query_add_up():
    """Slots of one query share keys: their gradients are summed, in both ways."""
    queries, keys = (x.detach() for x in inputs(1, 1, READING, 5))
    slots = torch.tensor([[[0, 1, READING]]])  # keys (0, 0), (0, 1), (1, 0)
    grad = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=torch.float64)
    wanted = torch.zeros(2, READING, dtype=torch.float64)
    wanted[0, :2], wanted[1, :2] = torch.tensor([3.0, 4.0]), torch.tensor([5.0, 2.0])
    for way in (OPS.product_keys_backward, product_keys._by_products):
        grad_queries, grad_keys = way(grad, slots, queries, keys, True, True)
        torch.testing.assert_close(grad_queries, torch.einsum("an,and->ad", wanted, keys)[None])
        torch.testing.assert_close(grad_keys, wanted[..., None] * queries[0, :, None])


def test_compiled_once_for_any_number_of_tokens():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def run(queries: Tensor, keys: Tensor) -> Tensor:
        return ops.product_keys(queries, keys, 3)[0].square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for t in (63, 5, 60):
        leaves = inputs(t, dtype=torch.float32)
        torch.testing.assert_close(compiled(*leaves), run(*leaves))
        torch.testing.assert_close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, run)))
    assert counter.frame_count == 1


class Select(torch.nn.Module):
    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return ops.product_keys(queries, keys, 3)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operator(strict):
    t = torch.export.Dim("t")
    program = torch.export.export(Select(), inputs(), dynamic_shapes=({0: t}, {}), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "memrewrite.product_keys.default" in targets
    assert not any("bmm" in target for target in targets)
    for tokens in (1, 2, 60):
        other = inputs(tokens)[0], inputs()[1]
        assert all(torch.equal(a, b) for a, b in zip(program.module()(*other), Select()(*other), strict=True))


def test_autocast_converts_as_for_a_product():
    leaves = inputs(63, dtype=torch.float32)
    mixed = leaves[0].detach().bfloat16(), leaves[1]
    program = torch.export.export(Select(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.product_keys(*leaves, 3)
        others = [ops.product_keys(*mixed, 3), program.module()(*leaves), torch.compile(Select(), backend="aot_eager")(*leaves)]
        exact = ops.product_keys(*(x.double() for x in leaves), 3)
    rounded = ops.product_keys(*(x.bfloat16() for x in leaves), 3)
    for other in (rounded, *others):
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    assert exact[0].dtype == torch.float64
    found[0].square().sum().backward()
    assert leaves[1].grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"must share a floating dtype.*bfloat16 and torch\.float32"):
        ops.product_keys(*mixed, 3)


@pytest.mark.parametrize("n", [READING, PRODUCTS])
def test_torch_counts_the_operations_of_the_products(n):
    leaves = inputs(n=n, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        weights = ops.product_keys(*leaves, 3)[0]
    assert counter.get_total_flops() == 2 * 9 * 4 * n * 5
    with FlopCounterMode(display=False) as counter:
        weights.sum().backward()
    assert counter.get_total_flops() == (0 if n == READING else 2 * 2 * 9 * 4 * n * 5)


@pytest.mark.parametrize("order", [("ops", "counter"), ("counter", "ops")], ids="-".join)
def test_formulas_are_registered_in_either_order_of_imports(order):
    lines = {
        "ops": "from memrewrite.kernels import ops",
        "counter": "from torch.utils.flop_counter import FlopCounterMode, flop_registry",
    }
    checks = (
        "import torch; memory = torch.ops.memrewrite; "
        "assert {memory.product_keys, memory.product_keys_backward, memory.sparse_dots} <= set(flop_registry)"
    )
    subprocess.run([sys.executable, "-c", "; ".join([*(lines[name] for name in order), checks])], check=True)


def test_the_rule_of_cuda_prefers_reading_for_many_keys():
    for width in (32, 64, 128, 256, 512):
        chosen = [product_keys.reads_keys("cuda", n, 32, width) for n in (64, 128, 4096, 16384)]
        assert chosen == [False, False, True, True]


def test_no_tokens():
    leaves = inputs(0, dtype=torch.float32)
    weights, slots = ops.product_keys(*leaves, 3)
    assert weights.shape == slots.shape == (2, 0, 3)
    grads = torch.autograd.grad(weights.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert not grads[1].any()


def test_strided_inputs_and_the_gradient_of_a_sum():
    queries, keys = (x.detach() for x in inputs(18, 4, READING, 10))
    leaves = (
        queries[::2, ::2, 1::2].requires_grad_(),
        keys.transpose(0, 1).contiguous().transpose(0, 1)[::2, :, ::2].requires_grad_(),
    )
    got, want = ops.product_keys(*leaves, 3, softmax=False)[0], formula(*leaves, 3, softmax=False)[0]
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), leaves) for out in (got, want)))


def test_a_backend_may_have_a_fused_kernel(monkeypatch):
    asked = []

    def fused(queries: Tensor, keys: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
        asked.append(k)
        return formula(queries, keys, k, softmax)

    chosen = backends.BACKENDS[-1]
    monkeypatch.setattr(chosen, "supports_product_keys", lambda q, keys, k: None if k < 5 else "k", raising=False)
    monkeypatch.setattr(chosen, "product_keys", fused, raising=False)
    leaves = inputs()
    for k in (3, 6):
        assert torch.equal(ops.product_keys(*leaves, k, backend=chosen.NAME)[1], formula(*leaves, k)[1])
    assert asked == [3]


def test_refuses():
    queries, keys = (x.detach() for x in inputs())
    with pytest.raises(ValueError, match="k=0 is below 1"):
        ops.product_keys(queries, keys, 0)
    with pytest.raises(ValueError, match="k=41 is more than the 40 keys"):
        ops.product_keys(queries, keys, 41)
    for wrong in ((queries[0], keys), (queries[:, 1:], keys), (queries[..., 1:], keys), (queries[:, 1:], keys[1:])):
        with pytest.raises(ValueError, match=r"queries \[T, 2h, d\] and keys \[2h, n, d\]"):
            ops.product_keys(*wrong, 3)
    with pytest.raises(TypeError, match="share a floating dtype"):
        ops.product_keys(queries, keys.float(), 3)
    with pytest.raises(ValueError, match="one device"):
        ops.product_keys(queries, keys.to("meta"), 3)
    with pytest.raises(ValueError, match="there is no backend 'cuda'"):
        ops.product_keys(queries, keys, 3, backend="cuda")
