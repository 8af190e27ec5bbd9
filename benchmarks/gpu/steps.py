"""Selecting slots, updating tables in place, and the training step that uses both: 1M × 1024, with the optimizer.

Each case creates its inputs, times its implementations in turn, and yields a line per size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import baseline_updates
import data as data
import element_updates
import torch
from calls import forward
from harness import Bench, Case, Result, Run, Target
from lookup import DTYPE, baselines, hot_keys, unless_missing
from models import memory_layer, optimizer_step
from torch import Tensor

from memrewrite.kernels import ops, torch_backend

RATES = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}


# ---------------------------------------------------------------------------------------------------------------- topk


def topk_cases(bench: Bench) -> Iterator[Case]:
    """Both numbers of keys, in bf16 and fp32."""
    for n in bench.sizes.topk_keys:
        for dtype in (DTYPE, torch.float32):
            yield Case(f"n={n} {str(dtype)[6:]}", partial(topk, n=n, dtype=dtype))
    yield Case("backward", partial(topk_backward, n=bench.sizes.topk_keys[0]))


def _scores(bench: Bench, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = bench.sizes.topk_rows
    return data.normal(rows, n, dtype=dtype, device=bench.device), data.normal(
        rows, n, dtype=dtype, device=bench.device, seed=4
    )


def topk(bench: Bench, n: int, dtype: torch.dtype) -> Iterator[Result]:
    """Ours with fused softmax; baselines are chains of torch.topk with all k² sums, and with only the candidate sums."""
    one, two = _scores(bench, n, dtype)
    k = bench.sizes.topk

    def chain(one: Tensor, two: Tensor) -> Any:
        scores, slots = baselines().torch_topk(one, two, k)
        return scores.softmax(-1), slots

    runs: dict[str, Run] = {
        "ours": lambda: bench.kernels.topk(one, two, k, True),
        "torch": lambda: chain(one, two),
        "torch, compiled": unless_missing(lambda: partial(bench.compile(chain), one, two)),
        "torch, candidates": lambda: torch_backend.topk(one, two, k, True),
    }
    moved = data.size_of(one, two) + one.shape[0] * k * (4 + 8)
    case = f"rows={one.shape[0]} n={n} k={k} {str(dtype)[6:]}"
    yield bench.result("topk", case, bench.race(runs), moved=moved, targets=[Target("torch", 5)])


def topk_backward(bench: Bench, n: int) -> Iterator[Result]:
    """Gradients of both halves' scores; the baseline is scatter_add."""
    slots = torch_backend.topk(*_scores(bench, n, DTYPE), bench.sizes.topk, False)[1]
    grad = data.normal(*slots.shape, dtype=torch.float32, device=bench.device)
    runs: dict[str, Run] = {
        "ours": lambda: bench.kernels.topk_backward(grad, slots, n, n),
        "torch": lambda: torch_backend.topk_backward(grad, slots, n, n),
    }
    moved = data.size_of(slots, grad) + 2 * slots.shape[0] * n * 4
    case = f"backward rows={slots.shape[0]} n={n} k={slots.shape[1]}"
    yield bench.result("topk", case, bench.race(runs), moved=moved, targets=[Target("torch", 1)])


# -------------------------------------------------------------------------------------------------------------- update


def update_cases(bench: Bench) -> Iterator[Case]:
    """The row-wise rules with the narrowest and the widest table; skewed reads; a table in the L2; fp32 weights; fp8.

    Then the rule with a second moment per element.
    """
    first, last = bench.sizes.dims[0], bench.sizes.dims[-1]
    for dim in dict.fromkeys((first, last)):
        for rule in ("adagrad", "adam"):
            yield Case(f"{rule} D={dim}", partial(update, rule=rule, dim=dim, pattern="uniform"))
    for pattern in ("zipf", "hot"):
        yield Case(f"adagrad D={first} {pattern}", partial(update, rule="adagrad", dim=first, pattern=pattern))
    yield Case(f"adagrad D={first} table in L2", partial(update, rule="adagrad", dim=first, pattern="uniform", cold=False))
    part = partial(update, rule="adagrad", dim=first, pattern="uniform", kind=torch.float32)
    yield Case(f"adagrad D={first}, weights float32", part)
    yield Case(
        f"adagrad D={last} fp8", partial(update, rule="adagrad", dim=last, pattern="uniform", fp8=True, kind=torch.float32)
    )
    yield from element_updates.cases(bench)


def update(
    bench: Bench,
    rule: str,
    dim: int,
    pattern: str,
    fp8: bool = False,
    kind: torch.dtype = DTYPE,
    cold: bool = True,
) -> Iterator[Result]:
    """Only the fused update: the gradient of the table is summed and applied, but never stored.

    Not `cold`: the table fits in the L2 cache and caches are not flushed. `kind` is the dtype of the weights.
    """
    device, sizes = bench.device, bench.sizes
    keys = bench.keys_within(sizes.train_keys, dim, 8, 0.5) if cold else hot_keys(bench, dim, DTYPE.itemsize)
    scale: Tensor | None = None
    if fp8:
        values, scale = data.fp8_table(keys * keys, dim, device)
    else:
        values = data.table(keys * keys, dim, DTYPE, device)
    indices = data.slots_read(pattern, sizes.tokens, sizes.reads, keys * keys, device)
    weights = data.weights_like(indices, kind)
    grad = data.normal(sizes.tokens, dim, dtype=DTYPE, device=device)
    rowwise = torch.zeros(keys * keys, device=device)
    reads = ([grad], [indices], [weights])
    state: tuple[Tensor, ...] = (rowwise,)
    numbers: dict[str, Any] = dict(RATES)
    if rule == "adam":
        state = (data.table(keys * keys, dim, DTYPE, device, seed=9), rowwise)
        numbers = {**RATES, "beta1": 0.9, "beta2": 0.99, "step": 10}

    def step(module: Any) -> Run:
        return lambda: getattr(module, f"{rule}_")(values, scale, *state, *reads, **numbers, seed=1)

    runs = {"ours": step(bench.kernels), "torch": step(baseline_updates)}
    if rule == "adagrad" and not fp8:
        fbgemm = unless_missing(lambda: partial(baselines().Fbgemm(values, RATES["lr"]).step, grad, indices, weights))
        runs["fbgemm, forward too"] = fbgemm
    moved = data.update_bytes(values, indices, weights, *state, *([] if scale is None else [scale])) if cold else 0
    case = f"{rule} T={sizes.tokens} K={sizes.reads} D={dim} N={keys}² {'fp8' if fp8 else 'bfloat16'} {pattern}"
    case += ("" if kind == DTYPE else f", weights {str(kind)[6:]}") + ("" if cold else ", table in L2")
    yield bench.result("update", case, bench.race(runs, flush=cold), moved=moved, targets=[Target("torch", 1)])


# ---------------------------------------------------------------------------------------------------------------- step


def step_cases(bench: Bench) -> Iterator[Case]:
    """The whole step of a Memory+ layer with a 1M × 1024 table, and of only the lookup."""
    dim = bench.sizes.dims[0]
    yield Case(f"layer D={dim}", partial(layer_step, dim=dim))
    yield Case(f"lookup D={dim}", partial(lookup_step, dim=dim))


def layer_step(bench: Bench, dim: int) -> Iterator[Result]:
    """Forward, backward and optimizer of a layer: fused updates; the baseline is dense gradients with AdamW(fused=True)."""
    keys = bench.keys_within(bench.sizes.train_keys, dim, 16, 0.6)
    x = data.normal(bench.sizes.tokens, dim, dtype=DTYPE, device=bench.device)
    runs: dict[str, Run] = {}
    for name, rule in (("ours", "adagrad"), ("fused adam", "adam"), ("dense + AdamW", None)):
        runs[name] = unless_missing(partial(_layer_run, bench, keys, x, rule))
    times = bench.race(runs)
    case = f"layer, row-wise Adagrad T={x.shape[0]} D={dim} N={keys}²"
    yield bench.result("training step", case, times, targets=[Target("dense + AdamW", 3)])


def _layer_run(bench: Bench, keys: int, x: Tensor, rule: str | None) -> Run:
    model = memory_layer(bench, x.shape[1], keys, gradient="dense" if rule is None else "fused")
    return optimizer_step(bench, model, x, rule)


def lookup_step(bench: Bench, dim: int) -> Iterator[Result]:
    """Only the memory: forward, gradient of weights, table update; baselines: dense gradients with AdamW, and FBGEMM."""
    device, sizes = bench.device, bench.sizes
    keys = bench.keys_within(sizes.train_keys, dim, 32, 0.5)
    values = data.table(keys * keys, dim, DTYPE, device)
    indices = data.slots_read("uniform", sizes.tokens, sizes.reads, keys * keys, device)
    weights = data.weights_like(indices, DTYPE)
    grad = data.normal(sizes.tokens, dim, dtype=DTYPE, device=device)
    total = torch.zeros(keys * keys, device=device)

    def ours() -> None:
        forward(bench.kernels, values, indices, weights)
        bench.kernels.backward(grad, values, indices, weights, None, False, True)
        bench.kernels.adagrad_(values, None, total, [grad], [indices], [weights], **RATES, seed=1)

    runs: dict[str, Run] = {"ours": ours}
    forwards = {"dense": ops.sparse_lookup, "embedding_bag": baselines().bag_forward, "torch": baselines().torch_forward}
    for name, rival in forwards.items():
        runs[f"{name} + AdamW"] = unless_missing(partial(_dense_step, rival, values, indices, weights, grad))
    runs["fbgemm"] = unless_missing(lambda: partial(baselines().Fbgemm(values, 1e-3).step, grad, indices, weights))
    case = f"memory alone, row-wise Adagrad T={sizes.tokens} K={sizes.reads} D={dim} N={keys}²"
    yield bench.result("training step", case, bench.race(runs), targets=[Target("dense + AdamW", 3)])


def _dense_step(call: Any, values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor) -> Run:
    """Forward, both gradients, and AdamW over the whole table."""
    table, leaf = values.clone().requires_grad_(), weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=1e-3, weight_decay=0.0, fused=True)

    def run() -> None:
        call(table, indices, leaf).backward(grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        leaf.grad = None

    return run
