"""Compares results of any floating dtype with a float64 reference, relative to the norm of the reference.

An elementwise `atol` is meaningless for half types: it depends on the scale of the inputs, and one that passes for the largest
entries hides errors of the small ones. Here the allowed error follows from the dtype and the number of summed terms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_bound(dtype: torch.dtype, terms: int, stored: torch.dtype | None = None) -> float:
    """The largest allowed `||got - right|| / ||right||` for entries that are sums of `terms` products, returned in `dtype`.

    Two errors are allowed. Storing: one rounding to `stored` (`dtype` if None) changes an entry by at most eps(stored), the
    distance between two neighbors (half of it if it rounds to nearest; Triton's interpreter truncates). Summing: kernels
    multiply and add in fp32 (float64 for float64), so each of the `terms` additions and up to three factors (weight, value,
    scale) round by eps(fp32). For terms of random sign the errors grow like sqrt(terms); `terms` itself is the upper bound.
    """
    computed = torch.promote_types(dtype, torch.float32)
    return torch.finfo(stored or dtype).eps + (terms + 3) * torch.finfo(computed).eps


def relative_error(got: Tensor, right: Tensor) -> float:
    """`||got - right|| / ||right||` in float64; 0 if both are zero or empty, NaN if `got` has one, inf if only `right` is 0."""
    right = right.detach().double()
    error, size = (got.detach().double() - right).norm().item(), right.norm().item()
    return 0.0 if error == 0.0 else error / size if size else float("inf")


def assert_norm_close(got: Tensor, right: Tensor, terms: int, stored: torch.dtype | None = None) -> None:
    """Fail unless the shapes are equal and `relative_error(got, right)` is within `norm_bound`; NaN fails."""
    assert got.shape == right.shape
    error, allowed = relative_error(got, right), norm_bound(got.dtype, terms, stored)
    assert error <= allowed, f"relative error {error:.3g}, {allowed:.3g} is allowed for {terms} terms in {got.dtype}"
