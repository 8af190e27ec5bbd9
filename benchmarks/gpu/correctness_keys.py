"""Correctness of the operator from queries to slots and weights, at the size of training, against float64."""

from __future__ import annotations

import data as data
import torch
from correctness_update import Check, close
from harness import Bench, Stop
from torch import Tensor

from memrewrite.kernels import ops

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative; of scores, whose dtype is that of the queries
WIDTH = 256  # of a half of a query
CHUNK = 2048  # tokens compared at once


def product_keys(bench: Bench, dtype: torch.dtype) -> Check:
    """The slots are the best ones within the rounding of scores, the weights their softmax; gradients of queries and keys.

    The gradients are those of the softmax of the chosen sums, at the operator's own weights: no rounding of scores enters.
    """
    sizes, device = bench.sizes, bench.device
    n, width = (8, 16) if bench.rehearse else (sizes.topk_keys[0], WIDTH)
    tokens, heads, k = sizes.tokens, sizes.heads, sizes.topk
    queries = data.normal(tokens, 2 * heads, width, dtype=dtype, device=device).requires_grad_()
    keys = (
        (data.normal(2 * heads, n, width, dtype=torch.float32, device=device, seed=4) * width**-0.5).to(dtype).requires_grad_()
    )
    backend = "auto" if bench.rehearse else bench.kernels.NAME  # the operator runs Triton's kernels on CUDA devices only
    weights, slots = ops.product_keys(queries, keys, k, backend=backend)
    grad = data.normal(heads, tokens, k, dtype=weights.dtype, device=device, seed=5)
    got = torch.autograd.grad(weights, (queries, keys), grad)
    yield
    exact_q, exact_k = queries.detach().double(), keys.detach().double()
    if int(slots.min()) < 0 or int(slots.max()) >= n * n or (slots.sort(-1).values.diff(dim=-1) == 0).any():
        raise Stop("a slot is outside the table, or was chosen twice")
    errors = []
    pushed_q, pushed_k = torch.zeros_like(exact_q), torch.zeros_like(exact_k)
    for head in range(heads):
        for begin in range(0, tokens, CHUNK):
            part = slice(begin, begin + CHUNK)
            chosen, p, g = slots[head, part], weights[head, part].detach().double(), grad[head, part].double()
            halves = [(2 * head, chosen // n), (2 * head + 1, chosen % n)]
            scores = [exact_q[part, half] @ exact_k[half].T for half, _ in halves]
            sums = scores[0].gather(1, halves[0][1]) + scores[1].gather(1, halves[1][1])
            errors += [check_best(scores, sums, ALLOWED[dtype]), close("weights", p, sums.softmax(-1), ALLOWED[dtype])]
            push = p * (g - (p * g).sum(-1, keepdim=True))
            for half, at in halves:
                pushed_q[part, half] = torch.einsum("tk,tkd->td", push, exact_k[half][at])
                shares = torch.zeros_like(scores[0]).scatter_add_(1, at, push)  # [T, n]
                pushed_k[half] += shares.T @ exact_q[part, half]
    errors.append(close("gradient of queries", got[0], pushed_q, ALLOWED[dtype]))
    errors.append(close("gradient of keys", got[1], pushed_k, ALLOWED[dtype]))
    return max(errors)


def check_best(scores: list[Tensor], sums: Tensor, allowed: float) -> float:
    """Stop unless the chosen sums [T, k] are the largest, in order, up to a share of their token's largest score. The error."""
    k = sums.shape[1]
    best = [half.topk(k, dim=-1).values for half in scores]
    largest = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(1).topk(k, dim=-1).values
    size = torch.stack([half.abs().amax(-1) for half in scores]).sum(0).unsqueeze(-1)
    error = float(((largest - sums).abs() / size).max())
    if not error <= allowed:
        raise Stop(f"slots: a chosen sum differs from the largest by {error:.1e} of the largest scores, allowed {allowed:.0e}")
    return error
