"""8-bit tables: codes and scales are those of torch bit for bit; samples have the right distribution and depend on the seed."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch import Tensor

from memrewrite.kernels import quantize, rounding

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter's NaN and inf
]


@pytest.fixture(params=["torch", pytest.param("triton", marks=interpreted)])
def backend(request):
    if request.param == "torch":
        return quantize
    pytest.importorskip("triton")
    return importlib.import_module("memrewrite.kernels.triton_quantize")


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("width", [1, 20, 576, 1000, 4100])
def test_quantized_is_torch_bit_for_bit(backend, width):
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-30, 30, 7)[:, None]
    rows[3] = 0
    codes, scale = backend.quantized(rows)
    want = rounding.row_scale(rows)
    assert torch.equal(scale, want)
    assert torch.equal(bits(codes), bits((rows / want[:, None]).to(rounding.FP8)))


def test_ties_and_subnormal_codes(backend):
    """Every multiple of a quarter of the smallest code up to 2, with scale one: ties go to the even code."""
    rows = torch.arange(0, 4096).float()[None] * 2**-11
    rows[0, 0] = 448
    rows = torch.cat([rows, -rows])
    codes, scale = backend.quantized(rows)
    assert scale.tolist() == [1, 1]
    assert torch.equal(bits(codes), bits(rows.to(rounding.FP8)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(backend, bad):
    rows = torch.randn(3, 40)
    rows[1, 7] = bad
    codes, scale = backend.quantized(rows)
    want = rounding.row_scale(rows)
    torch.testing.assert_close(scale, want, rtol=0, atol=0, equal_nan=True)
    right = (rows / want[:, None]).to(rounding.FP8).float()
    torch.testing.assert_close(codes.float(), right, rtol=0, atol=0, equal_nan=True)


def filled(backend, n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    values, scale = torch.full((n, d), float("nan")).to(rounding.FP8), torch.full((n,), float("nan"))
    backend.sample_(values, scale, 0.5, seed)
    return values, scale


@pytest.mark.parametrize(("n", "d"), [(64, 1000), (3, 4100)])
def test_samples_are_normal(backend, n, d):
    values, scale = filled(backend, n, d, 3)
    rows = (values.float() * scale[:, None]).double()
    count = rows.numel()
    assert rows.mean().abs() <= 5 * 0.5 / count**0.5
    assert (rows.std() - 0.5).abs() <= 5 * 0.5 / (2 * count) ** 0.5 + 1e-3
    assert ((rows.abs() < 0.5).double().mean() - 0.6827).abs() <= 0.02
    assert ((rows.abs() > 1.0).double().mean() - 0.0455).abs() <= 0.01
    assert torch.equal(values.float().abs().amax(1), torch.full((n,), 448.0))
    correlation = torch.corrcoef(rows[:3]) - torch.eye(3)
    assert correlation.abs().max() <= 5 / d**0.5


def test_samples_depend_on_the_seed(backend):
    first, again = filled(backend, 5, 40, 7), filled(backend, 5, 40, 7)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))
    for other in (8, 7 + 2**40) if backend is not quantize else (8,):
        assert not torch.equal(bits(first[0]), bits(filled(backend, 5, 40, other)[0]))
    assert len(first[0].float().unique(dim=0)) == 5


def test_samples_do_not_depend_on_the_threads():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(filled(quantize, 200, 1000, 5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))
    assert len(found[0][0].float().unique(dim=0)) == 200


def test_a_program_with_several_rows(monkeypatch):
    """The same rows, whichever program has them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("run with TRITON_INTERPRET=1, as `make test` does")
    kernels = pytest.importorskip("memrewrite.kernels.triton_quantize")
    one = filled(kernels, 7, 20, 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, filled(kernels, 7, 20, 1), strict=True))


def test_an_empty_table():
    codes, scale = quantize.quantized(torch.empty(0, 4))
    assert codes.shape == (0, 4)
    assert scale.shape == (0,)
