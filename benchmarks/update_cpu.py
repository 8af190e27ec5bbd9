"""Times one optimizer step of a value table on the CPU by every fused rule, and by torch's optimizers of its gradient.

A step goes from the gradients of a lookup's output to the updated table: the fused rules use the factors of the gradient,
"dense AdamW" computes the gradient of the whole table before, "SparseAdam" that of the rows that were read. Every round runs
each of them once in one process, in CPU time, so that load on the machine slows all equally. Printed and written as JSON:
medians, the ratio to the row-wise Adagrad of a table of the same dtype, and the bytes of table and state per slot. Compare
ratios, not milliseconds. The fused rules use the C++ kernels if `memrewrite build-op` has compiled them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from layer_cpu import machine, native
from torch import Tensor

from memrewrite.fused import LazyAdam, RowwiseAdagrad, RowwiseAdam, Rule
from memrewrite.kernels import ops  # noqa: F401 (registers the operators)
from memrewrite.kernels.pending import Factors
from memrewrite.layers.value_table import ValueTable

RULES: dict[str, Rule] = {
    "row-wise Adagrad": RowwiseAdagrad(),
    "row-wise Adam": RowwiseAdam(),
    **{f"lazy Adam, {states}": LazyAdam(states=states) for states in ("float32", "bfloat16", "float8_e4m3fn")},
}
Step = tuple[Callable[[], None], int]  # a step, and the bytes of table and state


def fused(rule: Rule, table: ValueTable, reads: Factors) -> Step:
    """A step of a fused rule."""
    state = rule.fresh(table.values)
    numbers = {"lr": 1e-3, "weight_decay": 0.01, "seed": 1, "backend": "auto"}

    @torch.no_grad()
    def run() -> None:
        rule.step(table, state, [reads], 1, numbers)

    scales = [] if table.scale is None else [table.scale]
    return run, sum(tensor.nbytes for tensor in (table.values, *scales, *state.values()))


def torch_step(name: str, table: ValueTable, reads: Factors) -> Step:
    """The gradient of the table, dense or of the rows that were read, and a step of torch's optimizer."""
    values = table.values
    dense = name == "dense AdamW"
    optimizer = torch.optim.AdamW([values], fused=True) if dense else torch.optim.SparseAdam([values])

    @torch.no_grad()
    def run() -> None:
        weights = reads.weights.to(values.dtype)
        if dense:
            backward = torch.ops.memrewrite.sparse_lookup_backward.default
            values.grad = backward(reads.grad, values, reads.indices, weights, True, False)[0]
        else:
            rows = torch.ops.memrewrite.sparse_lookup_rows.default
            values.grad = rows(reads.grad, reads.indices, weights, values.shape[0])
        optimizer.step()
        values.grad = None

    run()
    state = [x for x in optimizer.state[values].values() if isinstance(x, Tensor) and x.dim() > 0]
    return run, sum(tensor.nbytes for tensor in (values, *state))


def steps(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Step]:
    """Every step for one dtype of the table, each with its own table; 8-bit tables have no gradient for torch's optimizers."""
    slots, tokens, reads = args.keys**2, args.tokens, args.heads * args.topk
    grad = torch.randn(tokens, args.dim).to(torch.bfloat16 if dtype.itemsize == 1 else dtype)
    factors = Factors(grad, torch.randint(0, slots, (tokens, reads)), torch.randn(tokens, reads).softmax(-1))

    def table(gradient: str) -> ValueTable:
        made = ValueTable(slots, args.dim, dtype=dtype, gradient=gradient)
        made.reset_parameters()
        return made

    found = {name: fused(rule, table("fused"), factors) for name, rule in RULES.items()}
    if dtype.itemsize > 1:
        found |= {name: torch_step(name, table("dense"), factors) for name in ("dense AdamW", "SparseAdam")}
    return found


def measured(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU of every step in every round, after one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) * 1e3)
    return times


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per dtype of the table and step."""
    rows = []
    for name in args.dtype:
        found = steps(args, getattr(torch, name))
        times = measured({who: run for who, (run, _) in found.items()}, args.rounds)
        base = median(times["row-wise Adagrad"])
        for who, (_, size) in found.items():
            taken = median(times[who])
            bytes_per_slot = round(size / args.keys**2, 1)
            row = {"table": name, "rule": who, "cpu_ms": round(taken, 3), "of_adagrad": round(taken / base, 3)}
            rows.append(row | {"bytes_per_slot": bytes_per_slot})
    return rows


def arguments(argv: list[str]) -> argparse.Namespace:
    """The sizes, the paper's heads and k by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=128, help="keys per half: the table has keys² slots")
    parser.add_argument("--dim", type=int, default=1024, help="width of a value")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float8_e4m3fn"], help="of the table")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--json", type=Path, default=Path("update_cpu.json"), help="output file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(native())
    rows = benchmark(args)
    sizes = {name: value for name, value in vars(args).items() if name != "json"}
    print(", ".join(f"{name} {value}" for name, value in sizes.items()))
    print(f"{'table':<14} {'rule':<25} {'CPU ms':>10} {'of Adagrad':>11} {'bytes a slot':>13}")
    for row in rows:
        numbers = f"{row['cpu_ms']:>10.2f} {row['of_adagrad']:>11.2f} {row['bytes_per_slot']:>13.1f}"
        print(f"{row['table']:<14} {row['rule']:<25} {numbers}")
    result = {"benchmark": "update_cpu", "sizes": sizes, "machine": machine(), "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
