"""Every operator under forward mode, `torch.func` and `vmap`: the values of plain torch in float64, or one clear refusal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from memrewrite.kernels import ops, reference, rounding
from memrewrite.kernels.pending import Pending

OPS = torch.ops.memrewrite
Function = Callable[..., Any]
N, D, T, K = 7, 3, 4, 5
HEADS, WIDTH, KEYS, TOP = 2, 3, 5, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


INDICES = torch.randint(0, N, (T, K), generator=torch.Generator().manual_seed(1))


def halves_of(slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The keys [h, T, k, d] of both halves of slots [h, T, k]."""
    heads = torch.arange(slots.shape[0])[:, None, None]
    n = keys.shape[1]
    return keys[::2][heads, slots // n], keys[1::2][heads, slots % n]


def plain_lookup_backward(grad: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.einsum("tk,td->tkd", weights, grad).reshape(-1, values.shape[1])
    table = torch.zeros_like(values).index_add(0, INDICES.reshape(-1), rows)
    return table, torch.einsum("td,tkd->tk", grad, values[INDICES])


def soft(scores: Tensor) -> Tensor:
    """The softmax by its formula: torch's own has no reverse derivative of its tangent outside `torch.func`."""
    weights = scores.exp()
    return weights / weights.sum(-1, keepdim=True)


def plain_topk(softmax: bool) -> Function:
    def run(scores1: Tensor, scores2: Tensor) -> Tensor:
        best = reference.product_key_topk(scores1, scores2, TOP)[0]
        return soft(best) if softmax else best

    return run


def plain_product_keys(softmax: bool) -> Function:
    def run(queries: Tensor, keys: Tensor) -> Tensor:
        scores = torch.einsum("thd,hnd->htn", queries, keys)
        best = reference.product_key_topk(scores[::2], scores[1::2], TOP)[0]
        return soft(best) if softmax else best

    return run


SLOTS = torch.randint(0, KEYS * KEYS, (HEADS, T, TOP), generator=torch.Generator().manual_seed(2))


def plain_topk_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    zeros = grad.new_zeros(HEADS, T, KEYS)
    return zeros.scatter_add(-1, SLOTS // KEYS, grad), zeros.scatter_add(-1, SLOTS % KEYS, grad)


def plain_product_keys_backward(grad: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    first, second = halves_of(SLOTS, keys)
    of_queries = torch.stack([torch.einsum("htk,htkd->htd", grad, rows) for rows in (first, second)], 1)
    places = plain_topk_backward(grad)
    of_keys = [torch.einsum("htn,htd->hnd", place, queries[:, i::2].transpose(0, 1)) for i, place in enumerate(places)]
    return of_queries.permute(2, 0, 1, 3).reshape(queries.shape), torch.stack(of_keys, 1).flatten(0, 1)


class Case(NamedTuple):
    ours: Function
    plain: Function
    inputs: tuple[Tensor, ...]


QUERIES, HALF_KEYS = randn(T, 2 * HEADS, WIDTH), randn(2 * HEADS, KEYS, WIDTH, seed=3)
CASES = {
    "lookup": Case(
        lambda v, w: ops.sparse_lookup(v, INDICES, w),
        lambda v, w: reference.sparse_lookup(v, INDICES, w),
        (randn(N, D), randn(T, K, seed=1)),
    ),
    "lookup_backward": Case(
        lambda g, v, w: OPS.sparse_lookup_backward(g, v, INDICES, w, True, True),
        plain_lookup_backward,
        (randn(T, D), randn(N, D, seed=1), randn(T, K, seed=2)),
    ),
    "lookup_backward_of_values": Case(
        lambda g, v, w: OPS.sparse_lookup_backward(g, v, INDICES, w, True, False)[0],
        lambda g, v, w: plain_lookup_backward(g, v, w)[0],
        (randn(T, D), randn(N, D, seed=1), randn(T, K, seed=2)),
    ),
    "lookup_backward_of_weights": Case(
        lambda g, v, w: OPS.sparse_lookup_backward(g, v, INDICES, w, False, True)[1],
        lambda g, v, w: plain_lookup_backward(g, v, w)[1],
        (randn(T, D), randn(N, D, seed=1), randn(T, K, seed=2)),
    ),
    "dots": Case(
        lambda v, x: ops.sparse_dots(v, INDICES, x),
        lambda v, x: reference.sparse_dots(v, INDICES, x),
        (randn(N, D), randn(T, D, seed=1)),
    ),
    "topk": Case(
        lambda a, b: ops.product_key_topk(a, b, TOP)[0], plain_topk(False), (randn(2, T, KEYS), randn(2, T, KEYS, seed=1))
    ),
    "topk_softmax": Case(
        lambda a, b: ops.product_key_topk(a, b, TOP, softmax=True)[0], plain_topk(True), (randn(KEYS), randn(KEYS, seed=1))
    ),
    "topk_backward": Case(
        lambda g: OPS.product_key_topk_backward(g, SLOTS, KEYS, KEYS), plain_topk_backward, (randn(HEADS, T, TOP),)
    ),
    "product_keys": Case(
        lambda q, k: ops.product_keys(q, k, TOP, softmax=False)[0], plain_product_keys(False), (QUERIES, HALF_KEYS)
    ),
    "product_keys_softmax": Case(lambda q, k: ops.product_keys(q, k, TOP)[0], plain_product_keys(True), (QUERIES, HALF_KEYS)),
    "product_keys_backward": Case(
        lambda g, q, k: OPS.product_keys_backward(g, SLOTS, q, k, True, True),
        plain_product_keys_backward,
        (randn(HEADS, T, TOP), QUERIES, HALF_KEYS),
    ),
    "product_keys_backward_of_queries": Case(
        lambda g, q, k: OPS.product_keys_backward(g, SLOTS, q, k, True, False)[0],
        lambda g, q, k: plain_product_keys_backward(g, q, k)[0],
        (randn(HEADS, T, TOP), QUERIES, HALF_KEYS),
    ),
    "product_keys_backward_of_keys": Case(
        lambda g, q, k: OPS.product_keys_backward(g, SLOTS, q, k, False, True)[1],
        lambda g, q, k: plain_product_keys_backward(g, q, k)[1],
        (randn(HEADS, T, TOP), QUERIES, HALF_KEYS),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def subsets(count: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(1, count + 1) for chosen in itertools.combinations(range(count), size)]


def of_some(function: Function, inputs: tuple[Tensor, ...], chosen: tuple[int, ...]) -> Function:
    """`function` of the chosen inputs; the others are constants."""

    def run(*some: Tensor) -> Any:
        every = list(inputs)
        for place, tensor in zip(chosen, some, strict=True):
            every[place] = tensor
        return function(*every)

    return run


def loss_of(function: Function) -> Function:
    def run(*inputs: Tensor) -> Tensor:
        found = function(*inputs)
        return sum(out.sin().sum() for out in (found if isinstance(found, tuple) else (found,)))  # type: ignore[return-value]

    return run


def tangents_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(randn(*tensor.shape, seed=9 + i) for i, tensor in enumerate(inputs))


def test_jvp_of_every_subset_of_the_inputs(case: Case) -> None:
    for chosen in subsets(len(case.inputs)):
        some = tuple(case.inputs[i] for i in chosen)
        tangents = tangents_of(some)
        got, want = (jvp(of_some(f, case.inputs, chosen), some, tangents) for f in (case.ours, case.plain))
        torch.testing.assert_close(got, want)
        out, pushed = linearize(of_some(case.ours, case.inputs, chosen), *some)
        torch.testing.assert_close((out, pushed(*tangents)), want)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("records", [False, True])
def test_dual_tensors(case: Case, mode: Function, records: bool) -> None:
    for chosen in subsets(len(case.inputs)):
        some = tuple(case.inputs[i].clone().requires_grad_(records) for i in chosen)
        tangents = tangents_of(some)

        def run(function: Function, some=some, tangents=tangents, chosen=chosen) -> list[tuple[Tensor, Tensor | None]]:
            with mode(), fwAD.dual_level():
                duals = [fwAD.make_dual(*pair) for pair in zip(some, tangents, strict=True)]
                found = of_some(function, case.inputs, chosen)(*duals)
                return [tuple(fwAD.unpack_dual(out)) for out in (found if isinstance(found, tuple) else (found,))]  # type: ignore[misc]

        for got, want in zip(run(case.ours), run(case.plain), strict=True):
            torch.testing.assert_close(got[0], want[0])
            zero = torch.zeros_like(want[0])
            torch.testing.assert_close(zero if got[1] is None else got[1], zero if want[1] is None else want[1])


def test_reverse_over_dual_tensors(case: Case) -> None:
    """Without `torch.func`: the gradient of a tangent."""

    def run(function: Function) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
        tangents = [tensor.requires_grad_() for tensor in tangents_of(case.inputs)]
        with fwAD.dual_level():
            found = function(*map(fwAD.make_dual, leaves, tangents))
            outs = [fwAD.unpack_dual(out).tangent for out in (found if isinstance(found, tuple) else (found,))]
            loss = sum(out.square().sum() for out in outs)
            grads = torch.autograd.grad(loss, [*leaves, *tangents], allow_unused=True)
        zeros = [torch.zeros_like(leaf) for leaf in (*leaves, *tangents)]
        return [zero if one is None else one for one, zero in zip(grads, zeros, strict=True)]

    torch.testing.assert_close(run(case.ours), run(case.plain))


@pytest.mark.parametrize("transform", [grad, jacfwd, jacrev, hessian])
def test_transforms(case: Case, transform: Function) -> None:
    for i in range(len(case.inputs)):
        first, second = (
            transform(f if transform in (jacfwd, jacrev) else loss_of(f), argnums=i)(*case.inputs)
            for f in (case.ours, case.plain)
        )
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_second_derivatives_by_every_order_of_modes(case: Case, outer: Function, inner: Function) -> None:
    everything = tuple(range(len(case.inputs)))
    got, want = (outer(inner(loss_of(f), everything), everything)(*case.inputs) for f in (case.ours, case.plain))
    torch.testing.assert_close(got, want)


def test_third_derivatives(case: Case) -> None:
    for order in ((jacfwd, jacrev, jacfwd), (jacrev, jacfwd, jacrev)):
        first, second, third = order
        got, want = (third(second(first(loss_of(f), 0), 0), 0)(*case.inputs) for f in (case.ours, case.plain))
        torch.testing.assert_close(got, want)


def test_a_vjp_after_its_level_has_ended(case: Case) -> None:
    results = []
    for function in (case.ours, case.plain):
        out, pull = vjp(function, *case.inputs)
        cotangents = tuple(randn(*o.shape, seed=4) for o in out) if isinstance(out, tuple) else randn(*out.shape, seed=4)
        results.append(
            (pull(cotangents), vmap(pull)(torch.utils._pytree.tree_map(lambda c: torch.stack([c, 2 * c]), cotangents)))
        )
    torch.testing.assert_close(*results)


def test_finite_differences(case: Case) -> None:
    leaves = tuple(tensor.clone().requires_grad_() for tensor in case.inputs)
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(case.ours, leaves, **options)
    assert torch.autograd.gradgradcheck(case.ours, leaves, check_fwd_over_rev=True, check_batched_grad=True)


def batches(inputs: tuple[Tensor, ...], chosen: tuple[int, ...], dim: int) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """Three inputs at once on dimension `dim` of the chosen ones."""
    batched = [
        torch.stack([tensor, randn(*tensor.shape, seed=20 + i), randn(*tensor.shape, seed=30 + i)], min(dim, tensor.dim()))
        if i in chosen
        else tensor
        for i, tensor in enumerate(inputs)
    ]
    return batched, tuple(min(dim, tensor.dim()) if i in chosen else None for i, tensor in enumerate(inputs))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_of_every_subset_of_the_inputs(case: Case, dim: int) -> None:
    tangents = tangents_of(case.inputs)
    for chosen in subsets(len(case.inputs)):
        batched, dims = batches(case.inputs, chosen, dim)
        for make in (
            lambda f: f,
            lambda f: grad(loss_of(f)),
            lambda f: lambda *inputs: jvp(f, inputs, tangents),
        ):
            got, want = (vmap(make(f), in_dims=dims)(*batched) for f in (case.ours, case.plain))
            torch.testing.assert_close(got, want)
        got, want = (
            grad(lambda *inputs, f=f, dims=dims: vmap(loss_of(f), in_dims=dims)(*inputs).sum(), tuple(range(len(dims))))(
                *batched
            )
            for f in (case.ours, case.plain)
        )
        torch.testing.assert_close(got, want)
        got, want = (jvp(vmap(f, in_dims=dims), tuple(batched), tangents_of(tuple(batched))) for f in (case.ours, case.plain))
        torch.testing.assert_close(got, want)


def test_nested_vmap(case: Case) -> None:
    inputs = [
        torch.stack([torch.stack([x, x.sin()]), torch.stack([x.cos(), x.exp()]), torch.stack([x, x])]) for x in case.inputs
    ]
    got, want = (vmap(vmap(f), in_dims=0)(*inputs) for f in (case.ours, case.plain))
    torch.testing.assert_close(got, want)
    shared = (0, *[None] * (len(case.inputs) - 1))
    got, want = (
        vmap(vmap(grad(loss_of(f), 0), in_dims=shared), in_dims=shared)(inputs[0], *case.inputs[1:])
        for f in (case.ours, case.plain)
    )
    torch.testing.assert_close(got, want)


def test_batched_indices_slots_and_scales() -> None:
    indices = torch.stack([INDICES, INDICES.flip(0), (INDICES + 1) % N])
    values, weights, scale = randn(3, N, D).float(), randn(3, T, K).float(), torch.rand(3, N)
    for dtype in (torch.int32, torch.int64):
        for dims in itertools.product((None, 0), repeat=4):
            if dims == (None,) * 4:
                continue
            chosen = [x if d == 0 else x[0] for x, d in zip((values, indices.to(dtype), weights, scale), dims, strict=True)]
            got = vmap(ops.sparse_lookup, in_dims=dims)(*chosen)
            parts = [[x[b] if d == 0 else x for x, d in zip(chosen, dims, strict=True)] for b in range(3)]
            torch.testing.assert_close(got, torch.stack([ops.sparse_lookup(*part) for part in parts]))
            for number, x in enumerate((randn(3, T, D), randn(3, T, D).float())):
                pick = number if dims[2] is None else slice(None)
                got = vmap(ops.sparse_dots, in_dims=dims)(chosen[0], chosen[1], x[pick], chosen[3])
                parts = [(*part[:2], x[number] if dims[2] is None else x[b], part[3]) for b, part in enumerate(parts)]
                torch.testing.assert_close(got, torch.stack([ops.sparse_dots(*part) for part in parts]))
    slots = torch.stack([SLOTS, SLOTS.flip(0), (SLOTS + 1) % KEYS**2])
    g = randn(HEADS, T, TOP)
    got = vmap(lambda s: OPS.product_key_topk_backward(g, s, KEYS, KEYS))(slots)
    torch.testing.assert_close(got[0], torch.stack([OPS.product_key_topk_backward(g, s, KEYS, KEYS)[0] for s in slots]))
    backward = lambda s: OPS.product_keys_backward(g, s, QUERIES, HALF_KEYS, True, True)  # noqa: E731
    want = [torch.stack(part) for part in zip(*map(backward, slots), strict=True)]
    torch.testing.assert_close(list(vmap(backward)(slots)), want)


def test_empty_calls_under_vmap_and_jvp() -> None:
    for n, t, k in ((N, 0, K), (N, T, 0), (0, 0, K)):
        values, indices, weights = randn(2, n, D), torch.zeros(2, t, k, dtype=torch.int64), randn(2, t, k)
        out = vmap(ops.sparse_lookup)(values, indices, weights)
        assert out.shape == (2, t, D)
        assert not out.any()
        out, tangent = jvp(
            lambda v, w, i=indices[0]: ops.sparse_lookup(v, i, w), (values[0], weights[0]), (values[1], weights[1])
        )
        assert out.shape == tangent.shape == (t, D)


def test_an_index_outside_its_own_table_is_refused_in_a_batch_of_tables() -> None:
    values, weights = randn(3, N, D), randn(3, T, K)
    for bad in (N, -1, 2 * N):
        indices = torch.stack([INDICES] * 3)
        indices[1, 2, 3] = bad
        for f in (
            lambda i: vmap(ops.sparse_lookup)(values, i, weights),
            lambda i: vmap(ops.sparse_lookup, in_dims=(None, 0, 0))(values[0], i, weights),
            lambda i: vmap(grad(lambda v, j, w: ops.sparse_lookup(v, j, w).sum()), in_dims=(None, 0, 0))(values[0], i, weights),
        ):
            with pytest.raises(IndexError, match="out of range for a table of"):
                f(indices)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_tangents_of_half_types(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    values, weights = randn(N, D).to(dtypes[0]), randn(T, K, seed=1).to(dtypes[1])
    tangents = (randn(N, D, seed=2).to(dtypes[0]), randn(T, K, seed=3).to(dtypes[1]))
    out, tangent = jvp(lambda v, w: ops.sparse_lookup(v, INDICES, w), (values, weights), tangents)
    want = jvp(CASES["lookup"].plain, (values.double(), weights.double()), tuple(t.double() for t in tangents))
    assert tangent.dtype == out.dtype == dtypes[0]
    torch.testing.assert_close(tangent.double(), want[1], rtol=0.02, atol=0.05)
    halves = randn(2, T, KEYS).to(dtypes[0])
    best, tangent = jvp(lambda a: ops.product_key_topk(a, a, TOP)[0], (halves,), (halves,))
    assert tangent.dtype == best.dtype == torch.float32
    torch.testing.assert_close(tangent, best)  # the sums are linear


@pytest.mark.parametrize("name", ["lookup", "dots", "product_keys_softmax"])
def test_compiled(name: str) -> None:
    """Compiled code enters levels of forward mode that `torch.autograd.forward_ad` does not know of."""
    case = CASES[name]
    tangents = tangents_of(case.inputs)

    def by_duals(*inputs: Tensor) -> Tensor:
        with fwAD.dual_level():
            return fwAD.unpack_dual(case.ours(*map(fwAD.make_dual, inputs, tangents))).tangent

    def by_jvp(*inputs: Tensor) -> Tensor:
        return jvp(case.ours, inputs, tangents)[1]

    want = jvp(case.plain, case.inputs, tangents)[1]
    for function in (by_duals, by_jvp):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*case.inputs), want)
    first, second = case.inputs
    for transform, inputs in (
        (lambda f: grad(loss_of(f)), case.inputs),
        (lambda f: vmap(grad(loss_of(f)), in_dims=(0, None)), (torch.stack([first, first.sin()]), second)),
    ):
        torch._dynamo.reset()
        got = torch.compile(transform(case.ours), fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(got, transform(case.plain)(*inputs))


# --------------------------------------------------------------------------------------------- kinds of gradient of the table


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_tangents_do_not_depend_on_the_kind_of_gradient(gradient: str) -> None:
    queue = Pending()
    inputs, tangents = CASES["lookup"].inputs, tangents_of(CASES["lookup"].inputs)
    got = jvp(lambda v, w: ops.sparse_lookup(v, INDICES, w, gradient=gradient, pending=queue), inputs, tangents)
    torch.testing.assert_close(got, jvp(CASES["lookup"].plain, inputs, tangents))


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_a_gradient_without_dense_tensor_is_refused_under_torch_func(gradient: str) -> None:
    queue = Pending()

    def loss(values: Tensor, weights: Tensor) -> Tensor:
        return ops.sparse_lookup(values, INDICES, weights, gradient=gradient, pending=queue).square().sum()

    values, weights = CASES["lookup"].inputs
    advice = f'a table with gradient "{gradient}" .* use gradient "dense"'
    for call in (
        lambda: grad(loss)(values, weights),
        lambda: vmap(grad(loss), in_dims=(None, 0))(values, weights.expand(2, T, K)),
        lambda: hessian(loss)(values, weights),
    ):
        with queue.tried(), pytest.raises(RuntimeError, match=advice):
            call()
    with pytest.raises(RuntimeError, match=f'a batch of tables has no {gradient} gradient; .*gradient="dense"'):
        vmap(loss, in_dims=(0, None))(values.expand(2, N, D), weights)
    torch.testing.assert_close(grad(loss, 1)(values, weights), grad(loss_square, 1)(values, weights))
    assert not queue.waiting


def loss_square(values: Tensor, weights: Tensor) -> Tensor:
    return reference.sparse_lookup(values, INDICES, weights).square().sum()


def test_first_row_sparse_gradients_still_have_no_second_derivative() -> None:
    values, weights = (x.clone().requires_grad_() for x in CASES["lookup"].inputs)
    out = ops.sparse_lookup(values, INDICES, weights, gradient="sparse")
    (first,) = torch.autograd.grad(out.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match='gradient "sparse" has first derivatives in reverse mode only'):
        first.to_dense().sum().backward()


def test_scales_have_no_derivative_and_8_bit_tables_have_tangents() -> None:
    wide, weights = randn(N, D).float(), randn(T, K, seed=1).float()
    scale = rounding.row_scale(wide)
    values = (wide / scale[:, None]).to(rounding.FP8)
    lookup = lambda w, s: ops.sparse_lookup(values, INDICES, w, s)  # noqa: E731
    _, tangent = jvp(lambda w: lookup(w, scale), (weights,), (weights,))
    torch.testing.assert_close(tangent, lookup(weights, scale))
    with pytest.raises(RuntimeError, match="the scale of a table has no derivative"):
        jvp(lambda s: lookup(weights, s), (scale,), (scale,))
    with pytest.raises(RuntimeError, match="the scale of a table has no derivative"):
        grad(lambda s: lookup(weights, s).sum())(scale)
    with pytest.raises(RuntimeError, match="the scale of a table has no derivative"):
        lookup(weights, scale.clone().requires_grad_())


def test_updates_and_queues_refuse_derivatives() -> None:
    values, total, g, weights = randn(N, D).float(), torch.ones(N), randn(T, D).float(), randn(T, K).float()

    def update(values: Tensor, g: Tensor) -> Tensor:
        OPS.rowwise_adagrad_(values, None, total, [g], [INDICES], [weights], 0.1, 1e-8, 0.0, 0)
        return values

    def keep(g: Tensor) -> Tensor:
        queue = Pending()
        with queue.tried():
            OPS.sparse_lookup_keep(g, INDICES, weights, queue.count, queue.handle)
        return g

    before = values.clone()
    for call in (
        lambda: jvp(update, (values, g), (values, g)),
        lambda: grad(lambda g: update(values, g).sum())(g),
        lambda: update(values.clone().requires_grad_(), g),
        lambda: jvp(keep, (g,), (g,)),
    ):
        with pytest.raises(RuntimeError, match=r"has no derivative|has no second"):
            call()
    with pytest.raises(RuntimeError, match="no batch of tables"):
        vmap(update)(values.expand(2, N, D).clone(), g.expand(2, T, D))
    with pytest.raises(RuntimeError, match=r"`loss\.backward"):
        vmap(keep)(g.expand(2, T, D))
    assert torch.equal(values, before)
    with torch.no_grad():
        update(values.requires_grad_(), g.requires_grad_())
    assert not torch.equal(values, before)


# --------------------------------------------------------------------------- around the operators: changes, checkpoints


@pytest.mark.parametrize("changed", ["values", "weights", "indices", "by an update"])
def test_a_change_between_forward_and_backward_is_an_error(changed: str) -> None:
    values, weights = randn(N, D).float().requires_grad_(), randn(T, K).float().requires_grad_()
    indices = INDICES.clone()
    out = ops.sparse_lookup(values, indices, weights)
    with torch.no_grad():
        if changed == "by an update":
            reads = [randn(T, D).float()], [INDICES], [weights.detach()]
            ops.rowwise_adagrad_(values, None, torch.ones(N), *reads, lr=0.1, eps=1e-8, weight_decay=0.0, seed=0)
        else:
            {"values": values, "weights": weights, "indices": indices}[changed].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.usefixtures("native_kernels")
def test_an_update_by_the_native_kernels_is_counted() -> None:
    test_a_change_between_forward_and_backward_is_an_error("by an update")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    results = []
    for function in (CASES["lookup"].ours, CASES["lookup"].plain):
        leaves = [tensor.clone().requires_grad_() for tensor in CASES["lookup"].inputs]
        torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=reentrant).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["jacobian", "hessian", "hvp", "vhp", "jvp", "vjp"])
def test_autograd_functional(name: str) -> None:
    case = CASES["lookup"]
    scalar = name in ("hessian", "hvp", "vhp")
    more = {"jacobian": (), "hessian": (), "vjp": (randn(T, D),)}.get(name, (tangents_of(case.inputs),))
    got, want = (
        getattr(torch.autograd.functional, name)(loss_of(f) if scalar else f, case.inputs, *more)
        for f in (case.ours, case.plain)
    )
    torch.testing.assert_close(got, want)
