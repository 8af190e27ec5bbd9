"""Compares results of any floating dtype with a float64 reference, relative to the norm of the reference.

An elementwise `atol` does not fit half types: its meaning depends on the scale of the inputs, and a value that suits the
largest entries hides errors of the small ones. Here the allowed error follows from the dtype and the number of summed terms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_bound(dtype: torch.dtype, terms: int, roundings: int = 1) -> float:
    """The largest allowed `||got - right|| / ||right||` for entries in `dtype` that are sums of `terms` products.

    Two kinds of error are allowed. Storing: a value that is rounded to `dtype` changes by at most eps(dtype), the distance of
    two neighbors (half of it if it rounds to nearest; Triton's interpreter truncates); `roundings` counts the values that are
    stored in `dtype` between inputs and result. Summing: kernels multiply and add in fp32 (float64 for float64). The rounding
    errors of `terms` additions are of random sign and add up like sqrt(terms) times eps(fp32) / 2, relative to the sum; up to
    three factors (weight, value, scale) round once each. With eps instead of eps / 2 even a sum of one entry stays within.
    """
    computed = torch.promote_types(dtype, torch.float32)
    return roundings * torch.finfo(dtype).eps + (terms**0.5 + 3) * torch.finfo(computed).eps


def relative_error(got: Tensor, right: Tensor) -> float:
    """`||got - right|| / ||right||` in float64: 0 if both are equal or empty, NaN if `got` has a NaN, inf if `right` is 0."""
    right = right.detach().double()
    error, size = (got.detach().double() - right).norm().item(), right.norm().item()
    if error == 0.0:
        return 0.0
    return error / size if size else float("inf")


def assert_norm_close(got: Tensor, right: Tensor, terms: int, roundings: int = 1) -> None:
    """Fail unless the shapes are equal and the relative error is within `norm_bound` of `got.dtype`; a NaN fails."""
    assert got.shape == right.shape
    error, allowed = relative_error(got, right), norm_bound(got.dtype, terms, roundings)
    assert error <= allowed, f"relative error {error:.3g}; {allowed:.3g} is allowed for {terms} terms in {got.dtype}"


def most_reads(*indices: Tensor) -> int:
    """How often the most frequent slot occurs: the number of terms of its row in the table's gradient."""
    counts = torch.cat([index.flatten() for index in indices]).unique(return_counts=True)[1]
    return int(counts.max()) if counts.numel() else 0
