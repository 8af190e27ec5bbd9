"""The checks of `sparse_lookup`, its backwards and `sparse_dots`: shapes, dtypes and names, for implementations and fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from memrewrite.kernels.backends import require_known
from memrewrite.kernels.checks import check_reads, check_whole, is_wide, one_device, require, same_shape

GRADIENTS = ("dense", "sparse", "fused")
NO_ROWS = (
    'a table with gradient "sparse" has first derivatives in reverse mode only, and none under torch.func; use gradient "dense"'
)
NO_KEEP = (
    'a table with gradient "fused" has no second derivatives, and no gradient under torch.func: '
    '`loss.backward()` trains it; use gradient "dense"'
)
NO_TENSOR = 'values of 8 bits, or with a scale, cannot have a gradient tensor; use gradient="fused"'
NO_SCALE = "the scale of a table has no derivative; differentiate with respect to the values or the weights"


def check(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None, grad: Tensor | None = None) -> None:
    """Raise ValueError or TypeError for wrong inputs; sizes are checked by `require`, since they may be symbolic."""
    if values.dim() != 2 or indices.dim() != 2 or weights.dim() != 2:
        raise ValueError(
            "sparse_lookup needs values [N, D], indices [T, K] and weights [T, K], "
            f"not {tuple(values.shape)}, {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    one_device("sparse_lookup", values, indices, weights, scale, grad)
    check_whole("sparse_lookup", indices)
    if scale is None:
        known = weights.dtype in (values.dtype, torch.float32)
        if not values.is_floating_point() or not known or values.itemsize == 1:
            raise TypeError(
                "sparse_lookup: values must have a floating dtype (8-bit values need a `scale`), and weights the same or "
                f"float32, not {values.dtype} and {weights.dtype}"
            )
    elif scale.dtype != torch.float32 or not values.is_floating_point() or not is_wide(weights):
        raise TypeError(
            f"sparse_lookup: scale must be float32, values floating, and weights floating with 16 or more bits, "
            f"not {scale.dtype}, {values.dtype} and {weights.dtype}"
        )
    same_shape("sparse_lookup", "weights", tuple(weights.shape), tuple(indices.shape))
    if scale is not None:
        same_shape("sparse_lookup", "scale", tuple(scale.shape), (values.shape[0],))
    if grad is not None:
        if grad.dim() != 2 or not is_wide(grad):
            raise TypeError(
                "sparse_lookup_backward: grad must be [T, D] of a floating dtype with 16 or more bits, "
                f"not {tuple(grad.shape)} of {grad.dtype}"
            )
        same_shape("sparse_lookup", "grad", tuple(grad.shape), (indices.shape[0], values.shape[1]))


def check_dots(values: Tensor, indices: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
    """Raise ValueError or TypeError for wrong inputs of `sparse_dots`."""
    if not values.dim() == indices.dim() == x.dim() == 2:
        shapes = tuple(values.shape), tuple(indices.shape), tuple(x.shape)
        raise ValueError("sparse_dots needs values [N, D], indices [T, K] and x [T, D], not {}, {} and {}".format(*shapes))
    one_device("sparse_dots", values, indices, x, scale)
    check_whole("sparse_dots", indices)
    if not values.is_floating_point() or not is_wide(x) or (values.itemsize == 1 and scale is None):
        raise TypeError(
            "sparse_dots: values must have a floating dtype (8-bit values need a `scale`), and x one of 16 or more bits, "
            f"not {values.dtype} and {x.dtype}"
        )
    same_shape("sparse_dots", "x", tuple(x.shape), (indices.shape[0], values.shape[1]))
    if scale is not None:
        if scale.dtype != torch.float32:
            raise TypeError(f"sparse_dots: scale must be float32, not {scale.dtype}")
        same_shape("sparse_dots", "scale", tuple(scale.shape), (values.shape[0],))


def check_gradient(op: str, values: Tensor, gradient: str, pending: Tensor | None, *, scaled: bool) -> None:
    """Raise ValueError if the table cannot have this kind of gradient."""
    if gradient == "fused" and pending is None:
        raise ValueError(f"{op}: a fused gradient needs the queue of its table: call the `Pool`, not the operator")
    if gradient != "fused" and (scaled or values.itemsize == 1):
        raise ValueError(f"{op}: {NO_TENSOR}")


def check_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    need_values: bool,
    scale: Tensor | None,
    backend: str,
) -> None:
    """Raise ValueError or TypeError for wrong inputs of the backward."""
    check(values, indices, weights, scale, grad)
    require_known("sparse_lookup_backward", backend)
    if need_values and scale is not None:
        raise ValueError(f"sparse_lookup: {NO_TENSOR}")


def check_rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int, backend: str) -> None:
    """Raise ValueError or TypeError for wrong inputs of the row-sparse gradient."""
    check_reads("sparse_lookup_rows", grad, indices, weights)
    require(slots >= 0, lambda: f"sparse_lookup_rows: a table has no {slots} slots")
    require_known("sparse_lookup_rows", backend)


def check_names(op: str, gradient: str, backend: str) -> None:
    """Raise ValueError for a kind of gradient or a backend that does not exist."""
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: there is no gradient {gradient!r}; try one of {', '.join(GRADIENTS)}")
    require_known(op, backend)


def output_dtype(values: Tensor, weights: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the output. Raises TypeError if it is not floating-point, or has 8 bits."""
    dtype = dtype or (values.dtype if scale is None else weights.dtype)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise TypeError(f"sparse_lookup: the output's dtype must be floating, with 16 or more bits, not {dtype}")
    return dtype
