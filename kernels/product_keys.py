"""The operator `product_keys` and its backward: from queries and half keys to the k best slots; the scores are not kept.

Flow: scores of both halves (a matrix product, or a backend's fused kernel) → exact top-k of all sums. Only k of the n scores of
a half have a gradient, so the backward is a lookup of the keys and the sum of the queries by key; `reads_keys` tells where the
products with a dense gradient of the scores are faster. `ops` registers these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels import product_key_topk, sparse_lookup
from memrewrite.kernels.backends import BACKENDS, require_known
from memrewrite.kernels.checks import is_wide, one_device, require, same_shape


def forward(queries: Tensor, keys: Tensor, k: int, softmax: bool = True, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`memrewrite::product_keys`: [T, 2h, d], [2h, n, d] -> [h, T, k] twice; the public function is `ops.product_keys`."""
    _check(queries, keys, k, backend)
    fused = _fused(queries, keys, k, backend)
    if fused is not None:
        best: tuple[Tensor, Tensor] = fused.product_keys(queries, keys, k, softmax)
        return best
    scores1, scores2 = half_scores(queries, keys)
    return product_key_topk.forward(scores1, scores2, k, softmax, backend)


def half_scores(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of all keys of each half: [T, 2h, d], [2h, n, d] -> [h, T, n] twice."""
    scores = torch.bmm(queries.transpose(0, 1), keys.transpose(1, 2))  # [2h, T, n]
    return scores[::2], scores[1::2]


def _fused(queries: Tensor, keys: Tensor, k: int, backend: str) -> ModuleType | None:
    """The first backend that computes scores and top-k in one kernel: optional functions that a backend may define.

    `supports_product_keys(queries, keys, k)` returns why it does not support a call, or None;
    `product_keys(queries, keys, k, softmax)` returns weights and slots as `forward`.
    """
    for module in BACKENDS:
        supports = getattr(module, "supports_product_keys", None)
        if supports is not None and backend in ("auto", module.NAME) and supports(queries, keys, k) is None:
            fused: ModuleType = module
            return fused
    return None


def forward_fake(queries: Tensor, keys: Tensor, k: int, softmax: bool = True, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `forward`."""
    _check(queries, keys, k, backend)
    shape = (keys.shape[0] // 2, queries.shape[0], k)
    weights = queries.new_empty(shape, dtype=torch.promote_types(queries.dtype, torch.float32))
    return weights, queries.new_empty(shape, dtype=torch.int64)


def autocast(device: str) -> Callable[..., Any]:
    """The operator under autocast of "CPU" or "CUDA": queries and keys are converted, as for the product that it contains."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")

    def run(queries: Tensor, keys: Tensor, *others: Any) -> Any:
        dtype = torch.get_autocast_dtype(device.lower())
        cast = [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (queries, keys)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.memrewrite.product_keys.default(*cast, *others)

    return run


def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs, the chosen slots, and with `softmax` its result; no scores."""
    queries, keys, _, ctx.softmax, ctx.backend = inputs
    ctx.save_for_backward(queries, keys, output[1], output[0] if ctx.softmax else None)


def grad_of(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of `forward`, computed by the operator `product_keys_backward`."""
    queries, keys, slots, weights = ctx.saved_tensors
    if ctx.softmax:
        grad = weights * (grad - (weights * grad).sum(-1, keepdim=True))
    need_queries, need_keys = ctx.needs_input_grad[:2]
    backward_op = torch.ops.memrewrite.product_keys_backward
    grad_queries, grad_keys = backward_op(grad, slots, queries, keys, need_queries, need_keys, ctx.backend)
    return grad_queries if need_queries else None, grad_keys if need_keys else None, None, None, None


# ----------------------------------------------------------------------------------------------------------- the backward


def backward(
    grad: Tensor,
    slots: Tensor,
    queries: Tensor,
    keys: Tensor,
    need_queries: bool,
    need_keys: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`memrewrite::product_keys_backward`: from the gradient of the sums [h, T, k] to those of queries and keys.

    An unneeded gradient is returned as an empty tensor [0], since an operator cannot return None for a tensor.
    """
    _check_backward(grad, slots, queries, keys, backend)
    (_, n, width), k = keys.shape, slots.shape[-1]
    product_key_topk.check_slots("product_keys_backward", slots, n, n)
    if not (slots.numel() and keys.numel()):
        return queries.new_zeros(queries.shape if need_queries else 0), keys.new_zeros(keys.shape if need_keys else 0)
    grad = grad.to(torch.promote_types(keys.dtype, torch.float32))
    if not reads_keys(keys.device.type, n, k, width):
        return _by_products(grad, slots, queries, keys, need_queries, need_keys)
    reads, weights = _reads(grad, slots, n)
    table, rows = _rows(keys), _rows(queries)
    grad_queries = grad_keys = None
    if need_queries:
        found = sparse_lookup.forward(table, reads, weights, None, "dense", backend, dtype=queries.dtype)
        grad_queries = found.view(queries.shape)
    if need_keys:
        summed, _ = sparse_lookup.backward(rows, table, reads, weights, True, False, None, backend)
        grad_keys = summed.view(keys.shape)
    return (
        queries.new_empty(0) if grad_queries is None else grad_queries,
        keys.new_empty(0) if grad_keys is None else grad_keys,
    )


def reads_keys(device: str, n: int, k: int, width: int) -> bool:
    """True if the backward is faster by reading the k keys of each query than by products with all n keys.

    Per query, reading costs k rows of `width` twice (once for each gradient) and the sort of k indices. The products cost
    4 n `width` floating-point operations, and a dense gradient of the scores, about 14 bytes for each (zeros, sums, conversion,
    and a read by each product).

    * CPU, measured with h = 4, k = 32, T from 1 to 4096, `width` 64 to 512, fp32 and bf16: the products are faster up to
      n = 8 k in bf16, and reading from n = 16 k on in both, in 0.05 to 0.5 of the time of the products.
    * CUDA, estimated for an H200 and not yet measured: 4.3 TB/s of memory, 6.5 TB/s of L2 (keys and queries stay in it), 790
      TFLOP/s in bf16, a sort of 70 G indices/s. Reading is chosen up to 1.5 times the estimate of the products: it allocates
      nothing of size n.
    """
    if device != "cuda":
        return n >= 12 * k
    products = n * (14 / 4.3e12 + 4 * width / 790e12)
    reading = k * (2 * 2 * width / 6.5e12 + 1 / 70e9)
    return reading <= 1.5 * products


def _halves(slots: Tensor, n: int) -> Tensor:
    """The keys of both halves that each slot consists of: [h, T, k] -> [h, 2, T, k]."""
    return torch.stack((slots // n, slots % n), 1)


def _rows(stack: Tensor) -> Tensor:
    """[a, b, d] -> [a·b, d]. Not `flatten`, which gradcheck's vmap does not batch."""
    return stack.reshape(stack.shape[0] * stack.shape[1], stack.shape[2])


def _reads(grad: Tensor, slots: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The keys that each query's slots consist of, as rows of [2h·n, d], and the gradients of their scores: [T·2h, k] each."""
    heads, tokens, k = slots.shape
    begins = torch.arange(0, 2 * heads * n, n, device=slots.device).view(heads, 2, 1, 1)
    reads = (_halves(slots, n) + begins).permute(2, 0, 1, 3).reshape(-1, k)
    weights = grad.permute(1, 0, 2).unsqueeze(2).expand(tokens, heads, 2, k).reshape(-1, k)
    return reads, weights


def _by_products(
    grad: Tensor, slots: Tensor, queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool
) -> tuple[Tensor, Tensor]:
    """`backward` by two matrix products with the gradient of all scores, one buffer [2h, T, n]."""
    (heads, tokens, k), n = slots.shape, keys.shape[1]
    scores = grad.new_zeros(heads, 2, tokens, n)
    scores.scatter_add_(-1, _halves(slots, n), grad.unsqueeze(1).expand(heads, 2, tokens, k))
    scores = scores.view(2 * heads, tokens, n).to(keys.dtype)
    return (
        torch.bmm(scores, keys).transpose(0, 1).contiguous() if need_queries else queries.new_empty(0),
        torch.bmm(scores.transpose(1, 2), queries.transpose(0, 1)) if need_keys else keys.new_empty(0),
    )


def backward_fake(
    grad: Tensor,
    slots: Tensor,
    queries: Tensor,
    keys: Tensor,
    need_queries: bool,
    need_keys: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `backward`."""
    _check_backward(grad, slots, queries, keys, backend)
    return queries.new_empty(queries.shape if need_queries else (0,)), keys.new_empty(keys.shape if need_keys else (0,))


def chosen_scores(queries: Tensor, keys: Tensor, slots: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The scores of given slots [h, T, k] in `dtype`, as sums of both halves; only these keys are read. Differentiable."""
    heads, tokens, k = slots.shape
    reads, unused = _reads(slots.new_zeros(slots.shape, dtype=dtype), slots, keys.shape[1])
    table, rows = _rows(keys), _rows(queries)
    lookup_backward = torch.ops.memrewrite.sparse_lookup_backward
    scores: Tensor = lookup_backward(rows, table, reads, unused, False, True, None, backend)[1]
    return scores.view(tokens, heads, 2, k).sum(2).transpose(0, 1)


def backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs, and which of the two gradients were computed."""
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted, ctx.backend = inputs[4:6], inputs[6]


def backward_grad(ctx: Any, second_queries: Tensor | None, second_keys: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order: both gradients are bilinear in grad, queries and keys, so their gradients are lookups too."""
    grad, slots, queries, keys = ctx.saved_tensors
    need_grad, _, need_queries, need_keys = ctx.needs_input_grad[:4]
    for_queries, for_keys = ctx.wanted
    reads, weights = _reads(grad, slots, keys.shape[1])
    d_grad = d_queries = d_keys = None
    if for_queries and second_queries is not None:
        if need_grad:
            d_grad = chosen_scores(second_queries, keys, slots, grad.dtype, ctx.backend)
        if need_keys:
            table, rows = _rows(keys), _rows(second_queries)
            lookup_backward = torch.ops.memrewrite.sparse_lookup_backward
            d_keys = lookup_backward(rows, table, reads, weights, True, False, None, ctx.backend)[0].view(keys.shape)
    if for_keys and second_keys is not None:
        if need_grad:
            by_keys = chosen_scores(queries, second_keys, slots, grad.dtype, ctx.backend)
            d_grad = by_keys if d_grad is None else d_grad + by_keys
        if need_queries:
            lookup = torch.ops.memrewrite.sparse_lookup
            second_table = _rows(second_keys)
            d_queries = lookup(second_table, reads, weights, backend=ctx.backend, dtype=queries.dtype).view(queries.shape)
    return d_grad, None, d_queries, d_keys, None, None, None


# ---------------------------------------------------------------------------------------------------------------- checks


def _check(queries: Tensor, keys: Tensor, k: int, backend: str) -> None:
    """Raise ValueError or TypeError for wrong inputs; sizes are checked by `require`, since they may be symbolic."""
    _check_halves(queries, keys)
    if k < 1:
        raise ValueError(f"product_keys: k={k} is below 1")
    require(k <= keys.shape[1], lambda: f"product_keys: k={k} is more than the {keys.shape[1]} keys of a half")
    require_known("product_keys", backend)


def _check_backward(grad: Tensor, slots: Tensor, queries: Tensor, keys: Tensor, backend: str) -> None:
    """Raise ValueError or TypeError for wrong inputs of the backward."""
    op = "product_keys_backward"
    _check_halves(queries, keys)
    one_device(op, queries, grad, slots)
    if slots.dim() != 3:
        raise ValueError(f"{op}: slots must be [h, T, k], not {tuple(slots.shape)}")
    if not is_wide(grad) or slots.dtype != torch.int64:
        raise TypeError(
            f"{op}: grad must have a floating dtype of 16 or more bits, and slots int64, not {grad.dtype} and {slots.dtype}"
        )
    same_shape(op, "grad", tuple(grad.shape), tuple(slots.shape))
    same_shape(op, "slots", tuple(slots.shape), (keys.shape[0] // 2, queries.shape[0], slots.shape[2]))
    require_known(op, backend)


def _check_halves(queries: Tensor, keys: Tensor) -> None:
    shapes = f"{tuple(queries.shape)} and {tuple(keys.shape)}"
    wanted = "product_keys needs queries [T, 2h, d] and keys [2h, n, d]"
    if queries.dim() != 3 or keys.dim() != 3:
        raise ValueError(f"{wanted}, not {shapes}")
    one_device("product_keys", queries, keys)
    if not is_wide(queries) or queries.dtype != keys.dtype:
        raise TypeError(
            "product_keys: queries and keys must share a floating dtype of 16 or more bits, "
            f"not {queries.dtype} and {keys.dtype}"
        )
    require(queries.shape[1] == keys.shape[0], lambda: f"{wanted}, not {shapes}")
    require(queries.shape[2] == keys.shape[2], lambda: f"{wanted}, not {shapes}")
    require(keys.shape[0] % 2 == 0, lambda: f"{wanted} with two halves per head, not {shapes}")
