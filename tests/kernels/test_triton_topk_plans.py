"""The computed plans of the Triton top-k: all of them are known, and no kernel with one of them spills registers."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch

CACHE = Path(__file__).parents[2] / "build" / "triton-cache"  # an unchanged kernel is not compiled again
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from memrewrite.kernels import triton_topk

    return triton_topk


def test_the_kernels_of_all_sizes_are_known(kernels):
    """For any sizes, also those between the powers of two from which the variants are made."""
    known = {kernels.identity(variant) for variant in kernels.half_variants()}
    random = Random(5)
    for _ in range(5000):
        n = round(2 ** random.uniform(0, 30))
        k = min(n, kernels.MOST_K, round(2 ** random.uniform(0, 11)))
        dtype = random.choice((torch.float32, torch.bfloat16))
        full = 16 // dtype.itemsize
        vec = 1 if n % full else random.choice((1, full))
        variant = kernels.half_variant(n, k, dtype, random.choice((False, True)), vec)
        assert kernels.identity(variant) in known, variant
    assert len(known) < 300  # the slow test compiles all of them


@pytest.mark.slow
@pytest.mark.parametrize("which", ["half", "pair"])
def test_no_plan_spills(kernels, monkeypatch, which):
    """On sm_90, with the installed Triton."""
    import compile_gate
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE / triton.__version__))
    variants = list(getattr(kernels, f"{which}_variants")())
    assert len(variants) > 30
    wrong = []
    for variant in variants:
        code = compile_gate.compiled(variant, 90)
        found = compile_gate.findings(variant, code, None, recorded=False)
        wrong += [f"{variant.name} {variant.constants}: {finding}" for finding in found]
    assert not wrong, "\n".join(wrong)
