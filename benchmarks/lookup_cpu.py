"""Times the lookup and the top-k on the CPU and plain torch formulations of them, forward and with gradients.

Every round runs each implementation once, in the same process, so that load on the machine slows all of them equally. Medians
and minima over the rounds, the ratio of ours to the best formulation in plain torch, and whether it meets its target are
printed and written as JSON. Compare ratios, not milliseconds. "ours" uses the C++ kernels if `memrewrite build-op` has compiled
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from layer_cpu import machine, measure, native, verdict
from torch import Tensor
from torch.nn import functional as F

from memrewrite.kernels import ops

Formulation = Callable[[Tensor, Tensor, Tensor], Tensor]
Runs = dict[str, Callable[[], Any]]  # "ours" first
OURS = ("ours", "ours, in torch")

# The largest ratio of our time to another: comparison and whether it has few tokens -> compared with, ratio.
TARGETS = {
    ("lookup, forward", True): ("embedding_bag", 1.5),
    ("lookup, forward", False): ("best", 0.75),
    ("topk", False): ("best", 0.5),
}


def bag(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One embedding bag per token."""
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")


def sparse_bag(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The same with a row-sparse gradient, uncoalesced."""
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum", sparse=True)


def gather_bmm(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The [T, K, D] gather and a batched matrix product."""
    return torch.bmm(weights.unsqueeze(1), values[indices]).squeeze(1)


def gather_einsum(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The formula itself."""
    return torch.einsum("tk,tkd->td", weights, values[indices])


def gather_sum(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """A form that a compiler can fuse into one loop."""
    out: Tensor = (values[indices] * weights.unsqueeze(-1)).sum(1)
    return out


def ours_sparse(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Ours with a row-sparse gradient."""
    return ops.sparse_lookup(values, indices, weights, gradient="sparse")


def ours_in_torch(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Ours without the C++ kernels."""
    return ops.sparse_lookup(values, indices, weights, backend="torch")


def topk_chain(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of both halves, all k² sums, top-k of those, and two gathers."""
    (best1, slots1), (best2, slots2) = scores1.topk(k, dim=-1), scores2.topk(k, dim=-1)
    sums = (best1.float().unsqueeze(-1) + best2.float().unsqueeze(-2)).flatten(-2)  # [..., k²]
    scores, chosen = sums.topk(k, dim=-1)
    return scores, slots1.gather(-1, chosen // k) * scores2.shape[-1] + slots2.gather(-1, chosen % k)


def forward(formulation: Formulation, values: Tensor, indices: Tensor, weights: Tensor) -> Callable[[], Any]:
    """A forward without autograd."""

    def run() -> None:
        with torch.no_grad():
            formulation(values, indices, weights)

    return run


def with_gradients(
    formulation: Formulation, values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor
) -> Callable[[], Any]:
    """A forward, and the gradients of values and weights."""
    leaves = values.detach().requires_grad_(), weights.detach().requires_grad_()

    def run() -> None:
        torch.autograd.grad(formulation(leaves[0], indices, leaves[1]), leaves, grad)

    return run


def comparisons(args: argparse.Namespace, values: Tensor, tokens: int) -> dict[str, Runs]:
    """The comparisons for one number of tokens and one dtype."""
    torch._dynamo.reset()  # it compiles again for other shapes and numbers of threads, but only a few times
    reads, dtype = args.heads * args.topk, values.dtype
    indices = torch.randint(0, values.shape[0], (tokens, reads))
    weights = torch.randn(tokens, reads).softmax(-1).to(dtype)
    grad = torch.randn(tokens, values.shape[1]).to(dtype)
    compiled: Formulation = torch.compile(gather_sum, dynamic=False)
    formulations: dict[str, Formulation] = {
        "ours": ops.sparse_lookup,
        "ours, in torch": ours_in_torch,
        "embedding_bag": bag,
        "gather + bmm": gather_bmm,
        "gather + einsum": gather_einsum,
        "gather · w, compiled": compiled,
    }
    expected = ops.sparse_lookup(values, indices, weights).float()
    for formulation in formulations.values():
        torch.testing.assert_close(formulation(values, indices, weights).float(), expected, rtol=3e-2, atol=3e-2)
    sparse: dict[str, Formulation] = {"ours": ours_sparse, "embedding_bag": sparse_bag}
    one, two = (torch.randn(args.heads, tokens, args.keys).to(dtype) for _ in range(2))
    inputs = (values, indices, weights)
    return {
        "lookup, forward": {name: forward(f, *inputs) for name, f in formulations.items()},
        "lookup, both gradients": {name: with_gradients(f, *inputs, grad) for name, f in formulations.items()},
        "lookup, row-sparse gradient": {name: with_gradients(f, *inputs, grad) for name, f in sparse.items()},
        "topk": {
            "ours": lambda: ops.product_key_topk(one, two, args.topk),
            "ours, in torch": lambda: ops.product_key_topk(one, two, args.topk, backend="torch"),
            "chain, k² sums": lambda: topk_chain(one, two, args.topk),
        },
    }


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per dtype, tokens, comparison, threads and implementation; `of_best`: ours divided by the best in plain torch."""
    rows = []
    for name in args.dtype:
        values = torch.randn(args.keys**2, args.dim).to(getattr(torch, name)) * args.dim**-0.5
        for tokens in args.tokens:
            for comparison, runs in comparisons(args, values, tokens).items():
                repeat = 1 if tokens > 8 or "gradient" in comparison else args.repeat
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    times = measure({who: repeated(run, repeat) for who, run in runs.items()}, args.rounds)
                    what = {"dtype": name, "tokens": tokens, "contest": comparison, "threads": threads}
                    rows += lines(what, times, repeat)
    return rows


def repeated(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """Several runs in one: for runs so short that the clock's overhead would dominate."""

    def all_of_them() -> None:
        for _ in range(times):
            run()

    return all_of_them


def lines(what: dict[str, Any], times: dict[str, list[float]], repeat: int) -> list[dict[str, Any]]:
    """The rows of one comparison."""
    others = [taken for who, taken in times.items() if who not in OURS]
    best = {"median": min(median(t) for t in others), "min": min(min(t) for t in others)}
    rows = []
    for who, taken in times.items():
        row = {**what, "who": who, "median_ms": round(median(taken) / repeat, 4), "min_ms": round(min(taken) / repeat, 4)}
        if who == "ours":
            row["of_best"] = round(median(taken) / best["median"], 3)
            row["of_best_by_min"] = round(min(taken) / best["min"], 3)
            of, most = TARGETS.get((what["contest"], what["tokens"] <= 8), (None, None))
            if of is not None and what["dtype"] in ("float32", "bfloat16"):
                found = row["of_best_by_min"] if of == "best" else round(min(taken) / min(times[of]), 3)
                row |= {"target": f"<= {most} x {of}", "found": found, "met": found <= most}
        rows.append(row)
    return rows


def arguments(argv: list[str]) -> argparse.Namespace:
    """The sizes, the paper's heads and k by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=512, help="keys per half: the table has keys² slots")
    parser.add_argument("--dim", type=int, default=1024, help="width of a value")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32 bfloat16 measures both")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--repeat", type=int, default=50, help="calls that count as one, at few tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch threads; more than 1 needs an idle machine")
    parser.add_argument("--json", type=Path, default=Path("lookup_cpu.json"), help="output file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    torch.manual_seed(0)
    print(native())
    rows = benchmark(args)
    sizes = {name: value for name, value in vars(args).items() if name != "json"}
    print(", ".join(f"{name} {value}" for name, value in sizes.items()))
    head = f"{'dtype':<9} {'tokens':>6} {'threads':>7}  {'comparison':<28} {'implementation':<21}"
    print(f"{head} {'median ms':>10} {'min ms':>10} {'ours / best':>12} {'by minima':>10}  target")
    for row in rows:
        line = f"{row['dtype']:<9} {row['tokens']:>6} {row['threads']:>7}  {row['contest']:<28} {row['who']:<21}"
        ratios = f" {row['of_best']:>12.2f} {row['of_best_by_min']:>10.2f}  {verdict(row)}" if "of_best" in row else ""
        print(f"{line} {row['median_ms']:>10.3f} {row['min_ms']:>10.3f}{ratios}")
    result = {"benchmark": "lookup_cpu", "sizes": sizes, "machine": machine(), "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
