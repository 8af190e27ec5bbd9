"""Correctness of the top-k on the device: against all sums for few rows, and in chunks of rows at the size of training."""

from __future__ import annotations

from collections.abc import Iterator

import data as data
import torch
from correctness_update import Check, close, same
from harness import Bench, Stop
from torch import Tensor

from memrewrite.kernels import reference

Size = tuple[int, int, int, int, torch.dtype]  # rows, n1, n2, k, dtype
FEW = 1024  # rows; the kernels have different plans for up to this many rows, and for more
CHUNK = 1 << 26  # sums in float64 that exist at once


def sizes(bench: Bench) -> Iterator[Size]:
    """Odd sizes first; then both plans at their border, and the rows of training, with every timed number of keys."""
    small, dtypes = bench.rehearse, (torch.bfloat16, torch.float32)
    if small:
        yield from ((5, 9, 6, 3, torch.float32), (3, 16, 16, 4, torch.bfloat16))
    else:
        yield from ((7, 63, 60, 7, torch.float32), (65, 200, 128, 32, torch.float16))
    most = bench.sizes.topk_rows
    for n in bench.sizes.topk_keys:
        for dtype in dtypes:
            for rows in (most,) if small else (FEW, FEW + 1, most):
                yield rows, n, n, bench.sizes.topk, dtype
            yield 3 if small else most, n, n, 2 * bench.sizes.topk, dtype


def topk(bench: Bench, size: Size) -> Check:
    """The scores are bit for bit the largest sums, each slot gives its sum, no slot occurs twice; softmax; backward."""
    rows, n1, n2, k, dtype = size
    kernels, device = bench.kernels, bench.device
    one = data.normal(rows, n1, dtype=dtype, device=device)
    two = data.normal(rows, n2, dtype=dtype, device=device, seed=4)
    grad = data.normal(rows, k, dtype=torch.float32, device=device, seed=5)
    scores, slots = kernels.topk(one, two, k, False)
    weights, again = kernels.topk(one, two, k, True)
    found = kernels.topk_backward(grad, slots, n1, n2)
    part = slice(rows // 2, rows // 2 + FEW)
    repeated = kernels.topk_backward(grad[part], slots[part], n1, n2)
    yield
    check_chosen(one, two, scores, slots)
    same("slots, with softmax", slots, again)
    errors = [close("softmax", weights, scores.double().softmax(-1), 1e-5)]
    halves = (("first", slots // n2, n1), ("second", slots % n2, n2))
    for (name, at, n), got, other in zip(halves, found, repeated, strict=True):
        same(f"gradient of the {name} half, of a part", got[part], other)
        errors.append(check_scattered(f"gradient of the {name} half", got, at, grad, n))
    return max(errors)


def check_chosen(one: Tensor, two: Tensor, scores: Tensor, slots: Tensor) -> None:
    """Stop unless the scores are the k largest sums, and each slot, of which none occurs twice, gives its score."""
    if scores.shape != slots.shape or scores.shape[0] != one.shape[0]:
        raise Stop(f"scores: the shapes are {tuple(scores.shape)} and {tuple(slots.shape)}")
    n1, n2, k = one.shape[1], two.shape[1], scores.shape[1]
    if int(slots.min()) < 0 or int(slots.max()) >= n1 * n2:
        raise Stop(f"a slot is outside the {n1 * n2} slots")
    for part in _chunks(scores, max(k * k, n1, n2)):
        a, b = one[part].double(), two[part].double()
        want, wanted, unique = largest(a, b, k)
        same("scores", scores[part], want.float())
        same("sums of the slots", want.float(), (a.gather(1, slots[part] // n2) + b.gather(1, slots[part] % n2)).float())
        same("slots, where only one has the score", slots[part][unique], wanted[unique])
    if (slots.sort(-1).values.diff(dim=-1) == 0).any():
        raise Stop("a slot was chosen twice")


def largest(one: Tensor, two: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of all sums [R, k] in float64, their slots, and where no other sum rounds to the same fp32 number.

    With few keys of all n1·n2 sums. With many of the k² sums of the k largest of each half, by `torch.topk`: a sum with a
    smaller entry has k sums that are at least as large.
    """
    (rows, n1), n2 = one.shape, two.shape[1]
    if rows * n1 * n2 <= CHUNK:
        best, slots = reference.product_key_topk(one, two, min(k + 1, n1 * n2))
    else:
        (best1, at1), (best2, at2) = one.topk(min(k + 1, n1), dim=-1), two.topk(min(k + 1, n2), dim=-1)
        best, chosen = reference.product_key_topk(best1, best2, k + 1)
        slots = at1.gather(1, chosen // best2.shape[1]) * n2 + at2.gather(1, chosen % best2.shape[1])
    rounded = best.float()
    equal = rounded[:, 1:] == rounded[:, :-1]
    unique = torch.ones_like(rounded, dtype=torch.bool)
    unique[:, 1:] &= ~equal
    unique[:, :-1] &= ~equal
    return best[:, :k], slots[:, :k], unique[:, :k]


def check_scattered(name: str, got: Tensor, at: Tensor, grad: Tensor, n: int) -> float:
    """The relative error of the gradient of one half, by chunks of rows."""
    if got.shape != (at.shape[0], n):
        raise Stop(f"{name}: the shape is {tuple(got.shape)}, not {(at.shape[0], n)}")
    worst = 0.0
    for part in _chunks(at, n):
        want = torch.zeros(at[part].shape[0], n, dtype=torch.float64, device=got.device)
        worst = max(worst, close(name, got[part], want.scatter_add_(1, at[part], grad[part].double()), 1e-5))
    return worst


def _chunks(rows: Tensor, width: int) -> Iterator[slice]:
    """Slices of rows with at most `CHUNK` entries of this width."""
    step = max(1, CHUNK // width)
    for begin in range(0, rows.shape[0], step):
        yield slice(begin, begin + step)
