"""How far outputs are from each other: against norms in float64, and what no norm can tell."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from memrewrite.errors import CaptureError
from memrewrite.passes.models.distance import distance, refuse_inexact

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_it_is_the_relative_norm_and_rounding_is_told_by_the_dtype(dtype: torch.dtype) -> None:
    wanted = torch.randn(50, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    eps = torch.finfo(dtype).eps
    for size in (4 * eps, 0.5):
        found = (wanted * (1 + size)).to(dtype)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = float((found.to(wide) - wanted.to(wide)).norm() / wanted.to(wide).norm())
        far = distance({"x": (found,)}, {"x": (wanted,)})
        assert far.relative == pytest.approx(expected, rel=1e-9)
        assert far.rounding == (size < 0.5)
        assert not far.exact


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, NAN, INF, -INF]),
        torch.tensor([1, 2]),
        torch.tensor([True, False]),
        torch.eye(3).to_sparse(),
        torch.empty(0),
    ],
    ids=lambda value: str(value.dtype),
)
def test_equal_outputs_are_exact(value: torch.Tensor) -> None:
    far = distance([value, "text", None], (value.clone(), "other", 3))
    assert far.exact
    assert far.rounding
    assert str(far) == "bit-equal"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, INF], [1.0, 2.0]),
        ([1.0, -INF], [1.0, INF]),
        ([1.0, 2.0, 3.0], [1.0, 2.0]),
        ([3], [4]),
        ([True], [False]),
        ([1.0], [1]),
        ([1e-30], [0.0]),
    ],
    ids=str,
)
def test_other_forms_integers_and_infinities_are_infinitely_far(found: Any, wanted: Any) -> None:
    far = distance(torch.tensor(found), torch.tensor(wanted))
    assert far.relative == INF
    assert not far.rounding
    assert "of another form" in str(far)


def test_of_several_outputs_the_furthest_counts() -> None:
    one = torch.ones(4)
    assert distance((one, one * 1.5), (one, one)).relative == pytest.approx(0.5)
    assert not distance((one * 1.5, one), (one, one)).rounding
    assert distance((one,), (one, one)).relative == INF


def test_what_is_not_compared_and_what_is_rounding_is_accepted() -> None:
    one = torch.ones(4)
    refuse_inexact(None, CaptureError, "here")
    refuse_inexact(distance(one * (1 + 1e-6), one), CaptureError, "here")
    with pytest.raises(CaptureError, match="something else than the model"):
        refuse_inexact(distance(one * 1.1, one), CaptureError, "here")
