"""Runs the backend "native" on random inputs: each result must be that of the backend "torch".

`python native_backend_fuzz.py LIBRARY CASES SEED`, under AddressSanitizer.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

from memrewrite.kernels import native_backend, native_library, torch_backend
from memrewrite.kernels.rounding import by_column

LIBRARY, CASES, SEED = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SIZES = (1, 2, 3, 7, 16, 31, 33, 64, 65, 130, 300)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
chosen = random.Random(SEED)


def near(got: Tensor, right: Tensor) -> None:
    error = (got.double() - right.double()).norm()
    assert error <= 4e-2 * right.double().norm() + 1e-30, (error, right.norm())


def lookup_case() -> None:
    n, d, t, k = (chosen.choice(SIZES) for _ in range(4))
    dtype = chosen.choice(DTYPES)
    values, indices = torch.randn(n, d).to(dtype), torch.randint(0, n, (t, k)).to(chosen.choice([torch.int32, torch.int64]))
    weights, grad = torch.randn(t, k), torch.randn(t, d).to(dtype)
    right = torch_backend.forward(values.double(), indices, weights.double(), None, torch.float64)
    near(native_backend.forward(values, indices, weights, None, dtype), right)
    got = native_backend.backward(grad, values, indices, weights, None, True, True)
    want = torch_backend.backward(grad.double(), values.double(), indices, weights.double(), None, True, True)
    for one, exact in zip(got, want, strict=True):
        assert one is not None
        assert exact is not None
        near(one, exact)
    (read, sums), (other, exact) = (b.rows(grad, indices, weights, n) for b in (native_backend, torch_backend))
    assert torch.equal(read, other)
    near(sums, exact)
    wide, narrow = values.float(), values.clone()
    totals = torch.ones(n), torch.ones(n)
    reads = [grad, grad], [indices, indices], [weights, weights]
    numbers = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1, "seed": 5}
    torch_backend.adagrad_(
        wide, None, totals[0], *[[x.float() if x.is_floating_point() else x for x in p] for p in reads], **numbers
    )
    native_backend.adagrad_(narrow, None, totals[1], *reads, **numbers)
    near(narrow, wide)
    near(totals[1], totals[0])
    moment = torch.zeros(n, d, dtype=chosen.choice([torch.float32, torch.bfloat16]))
    rates = {"beta1": 0.9, "beta2": 0.99, "step": 3}
    native_backend.adam_(narrow, None, moment, totals[1], *reads, **numbers, **rates)
    lazy_adam_case(narrow, wide, reads, {**numbers, **rates})
    if t * k:
        indices.view(-1)[chosen.randrange(t * k)] = chosen.choice([n, -1, 2**31 - 1, -(2**31)])
        try:
            native_backend.adagrad_(narrow, None, totals[1], *reads, **numbers)
        except IndexError:
            return
        raise AssertionError("an index outside the table was accepted")


def lazy_adam_case(narrow: Tensor, wide: Tensor, reads: tuple[list[Tensor], ...], numbers: dict[str, float]) -> None:
    """Two updates; the second one reads what the first has stored."""
    n, d = narrow.shape
    kept = chosen.choice([torch.float32, torch.bfloat16, torch.float8_e4m3fn])
    runs = []
    for backend, dtype in ((native_backend, kept), (torch_backend, torch.float32)):
        scales = [torch.ones(n, (d + 127) // 128) if dtype == torch.float8_e4m3fn else None for _ in range(2)]
        first, second = (torch.zeros(n, d).to(dtype) for _ in range(2))
        table = (narrow if dtype == kept else wide).clone()
        for _ in range(2):
            backend.lazy_adam_(table, None, first, scales[0], second, scales[1], *reads, **numbers)
        assert table.isfinite().all()
        runs.append(first.float() if scales[0] is None else first.float() * by_column(scales[0], d))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 0.2}[kept]
    assert (runs[0] - runs[1]).norm() <= bound * runs[1].norm() + 1e-30


def eight_bits_case() -> None:
    n, d, t, k = (chosen.choice(SIZES) for _ in range(4))
    values, scale = torch.randn(n, d).to(torch.float8_e4m3fn), torch.rand(n) + 0.5
    indices, weights, grad = torch.randint(0, n, (t, k)), torch.randn(t, k), torch.randn(t, d)
    inputs = values, indices, weights, scale
    near(native_backend.forward(*inputs, torch.float32), torch_backend.forward(*inputs, torch.float32))
    native_backend.adagrad_(
        values, scale, torch.ones(n), [grad], [indices], [weights], lr=0.1, eps=1e-8, weight_decay=0.0, seed=1
    )
    assert values.float().isfinite().all()


def topk_case() -> None:
    k = chosen.choice([1, 2, 3, 8, 33])
    n1, n2, rows = k + chosen.choice(SIZES), k + chosen.choice(SIZES), chosen.choice(SIZES)
    scores1, scores2 = (torch.randn(rows, n).to(chosen.choice(DTYPES)).float() for n in (n1, n2))
    best, slots = native_backend.topk(scores1, scores2, k, False)
    near(best, torch_backend.topk(scores1, scores2, k, False)[0])
    for got, right in zip(*(b.topk_backward(best, slots, n1, n2) for b in (native_backend, torch_backend)), strict=True):
        near(got, right)


def main() -> None:
    native_library.built_library = lambda: LIBRARY
    torch.manual_seed(SEED)
    for number in range(CASES):
        case = (lookup_case, lookup_case, eight_bits_case, topk_case)[number % 4]
        try:
            case()
        except BaseException:
            print(f"case {number} of seed {SEED}: {case.__name__}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
