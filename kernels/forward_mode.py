"""Forward-mode derivatives: the tangents of every operator's outputs, computed by the operators themselves.

Apart from a softmax, an operator is linear in each of its differentiable inputs. So a tangent is the sum, over the inputs with
a tangent, of the operator with that input replaced by its tangent: the tangent of a lookup is two lookups. The functions are
`derivatives.Rules.jvp`; `kernels/operators.py` registers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels import product_keys as _keys
from memrewrite.kernels.lookup_checks import NO_SCALE

Tangents = Sequence[Tensor | None]
_OPS = torch.ops.memrewrite


def sparse_lookup(inputs: list[Any], outputs: list[Tensor], tangents: Tangents) -> Tensor | None:
    """Rows with the tangents of the weights, and tangents of the rows with the weights."""
    values, indices, weights, scale, gradient, backend, pending, handle, _ = inputs
    values_t, weights_t, dtype = tangents[0], tangents[2], outputs[0].dtype
    _refuse_scale(tangents[3])
    parts = []
    if weights_t is not None:
        parts.append(_OPS.sparse_lookup(values, indices, weights_t, scale, gradient, backend, pending, handle, dtype))
    if values_t is not None:
        parts.append(_OPS.sparse_lookup(values_t, indices, weights, scale, "dense", backend, None, 0, dtype))
    return _sum(parts)


def sparse_dots(inputs: list[Any], outputs: list[Tensor], tangents: Tangents) -> Tensor | None:
    """Rows times the tangent of x, and tangents of the rows times x."""
    values, indices, x, scale, gradient, backend, pending, handle = inputs
    values_t, x_t = tangents[0], tangents[2]
    _refuse_scale(tangents[3])
    parts = []
    if x_t is not None:
        parts.append(_OPS.sparse_dots(values, indices, x_t, scale, gradient, backend, pending, handle))
    if values_t is not None:
        parts.append(_OPS.sparse_dots(values_t, indices, x, scale, "dense", backend, None, 0))
    return _sum(parts)


def sparse_lookup_backward(inputs: list[Any], outputs: list[Tensor], tangents: Tangents) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of values is bilinear in grad and weights, that of weights in grad and values."""
    grad, values, indices, weights, need_values, need_weights, *others = inputs
    grad_t, values_t, weights_t = tangents[0], tangents[1], tangents[3]
    _refuse_scale(tangents[6])
    backward, of_values, of_weights = _OPS.sparse_lookup_backward, [], []
    if grad_t is not None:
        both = backward(grad_t, values, indices, weights, need_values, need_weights, *others)
        of_values.append(both[0])
        of_weights.append(both[1])
    if weights_t is not None and need_values:
        of_values.append(backward(grad, values, indices, weights_t, True, False, *others)[0])
    if values_t is not None and need_weights:
        of_weights.append(backward(grad, values_t, indices, weights, False, True, *others)[1])
    return _sum(of_values), _sum(of_weights)


def product_key_topk(inputs: list[Any], outputs: list[Tensor], tangents: Tangents) -> tuple[Tensor | None, None]:
    """The tangents of the two scores of each chosen sum."""
    _, scores2, _, softmax, _ = inputs
    best, slots = outputs
    n2 = scores2.shape[-1]
    places = slots // n2, slots % n2
    parts = [t.gather(-1, place).to(best.dtype) for t, place in zip(tangents, places, strict=False) if t is not None]
    return _softmax(best, _sum(parts)) if softmax else _sum(parts), None


def product_key_topk_backward(
    inputs: list[Any], outputs: list[Tensor], tangents: Tangents
) -> tuple[Tensor | None, Tensor | None]:
    """The operator is linear in grad."""
    halves: tuple[Tensor, Tensor] = _OPS.product_key_topk_backward(tangents[0], *inputs[1:])
    return halves


def product_keys(inputs: list[Any], outputs: list[Tensor], tangents: Tangents) -> tuple[Tensor | None, None]:
    """The scores of the chosen keys are bilinear in queries and keys."""
    queries, keys, _, softmax, backend = inputs
    queries_t, keys_t = tangents[:2]
    best, slots = outputs
    parts = []
    if queries_t is not None:
        parts.append(_keys.chosen_scores(queries_t, keys, slots, best.dtype, backend))
    if keys_t is not None:
        parts.append(_keys.chosen_scores(queries, keys_t, slots, best.dtype, backend))
    return _softmax(best, _sum(parts)) if softmax else _sum(parts), None


def product_keys_backward(inputs: list[Any], outputs: list[Tensor], tangents: Tangents) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of queries is bilinear in grad and keys, that of keys in grad and queries."""
    grad, slots, queries, keys, need_queries, need_keys, backend = inputs
    grad_t, _, queries_t, keys_t, *_ = tangents
    backward, of_queries, of_keys = _OPS.product_keys_backward, [], []
    if grad_t is not None:
        both = backward(grad_t, slots, queries, keys, need_queries, need_keys, backend)
        of_queries.append(both[0])
        of_keys.append(both[1])
    if keys_t is not None and need_queries:
        of_queries.append(backward(grad, slots, queries, keys_t, True, False, backend)[0])
    if queries_t is not None and need_keys:
        of_keys.append(backward(grad, slots, queries_t, keys, False, True, backend)[1])
    return _sum(of_queries), _sum(of_keys)


def _softmax(s: Tensor, tangent: Tensor | None) -> Tensor | None:
    """The tangent of `s`, a softmax, from that of its argument."""
    return None if tangent is None else s * (tangent - (s * tangent).sum(-1, keepdim=True))


def _sum(parts: list[Tensor]) -> Tensor | None:
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _refuse_scale(tangent: Tensor | None) -> None:
    if tangent is not None:
        raise RuntimeError(NO_SCALE)
