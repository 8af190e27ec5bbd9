"""Times a Memory+ layer on the CPU, the SwiGLU MLP that it replaces, and gather-and-einsum in plain torch.

A training step (forward, backward, AdamW) is timed with a dense gradient of the table, and with the fused update.

Every round runs each implementation once, in the same process, so that load on the machine slows all of them equally.
Medians and minima over the rounds are printed and written as JSON (`--json FILE`). Compare ratios, not milliseconds. The layers
use the C++ kernels if `memrewrite build-op` has compiled them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.kernels import native_interface
from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
from memrewrite.layers.pool import Gradient, Pool, PoolSpec


class SwiGLU(nn.Module):
    """The dense MLP of a Llama block: `W_down(silu(W_gate x) ⊙ W_up x)`, no biases."""

    def __init__(self, d_model: int, d_hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False, dtype=dtype)
        self.up = nn.Linear(d_model, d_hidden, bias=False, dtype=dtype)
        self.down = nn.Linear(d_hidden, d_model, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> [T, d_model]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class PlainMemoryPlus(nn.Module):
    """The same Memory+ layer with the same parameters, written directly: k² sums, a [T, K, D] gather, an einsum."""

    def __init__(self, layer: MemoryPlus) -> None:
        super().__init__()
        self.layer, self.values = layer, layer._pool[0].values

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> [T, d_out]."""
        keys, k = self.layer.product_keys, self.layer.product_keys.topk
        q = keys.query(x).unflatten(-1, (keys.heads, 2, keys.half_dim))
        scores, slots = torch.einsum("thcd,hcnd->thcn", q, keys.keys).topk(k, dim=-1)  # [T, h, 2, k]
        sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(-2)  # [T, h, k²]
        best, pairs = sums.topk(k, dim=-1)
        first, second = slots[:, :, 0].gather(-1, pairs // k), slots[:, :, 1].gather(-1, pairs % k)
        slot = (first * keys.keys.shape[2] + second).flatten(1)
        s = best.float().softmax(-1).to(x.dtype).flatten(1)  # [T, h·k]
        y = torch.einsum("tk,tkd->td", s, self.values[slot])
        out: Tensor = self.layer.value_proj(y * F.silu(self.layer.gate(x)))
        return out


class WithPool(nn.Module):
    """A Memory+ layer and the pool that it reads, as children of one module."""

    def __init__(self, args: argparse.Namespace, gradient: Gradient) -> None:
        super().__init__()
        dtype = getattr(torch, args.dtype)
        self.pool = Pool(PoolSpec(keys=args.keys, value_dim=args.d_model, gradient=gradient), dtype=dtype)
        self.pool.reset_parameters()
        options = MemoryPlusOptions(heads=args.heads, topk=args.topk)
        self.layer = MemoryPlus(args.d_model, args.d_model, options, self.pool, dtype=dtype)
        self.layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> [T, d_out]."""
        out: Tensor = self.layer(x)
        return out


def implementations(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The modules to compare; `dense` is the baseline."""
    memory = WithPool(args, "dense")
    return {
        "dense": SwiGLU(args.d_model, args.d_hidden, getattr(torch, args.dtype)),
        "memory_plus": memory,
        "plain": PlainMemoryPlus(memory.layer),
    }


def forward_only(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward without autograd."""

    def run() -> None:
        with torch.inference_mode():
            module(x)

    return run


def forward_backward(module: nn.Module, parameters: list[Tensor], x: Tensor) -> Callable[[], None]:
    """A forward and the gradients of every parameter (the table's is dense) and of x."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(module(leaf).sum(), [leaf, *parameters])

    return run


def training_step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward, a backward, and a step of AdamW; a fused table is updated by `memrewrite.fuse`."""
    optimizer = torch.optim.AdamW(memrewrite.param_groups(module, lr=1e-4))
    if any(isinstance(m, Pool) and m.pending is not None for m in module.modules()):
        memrewrite.fuse(optimizer, module, memrewrite.RowwiseAdagrad())

    def run() -> None:
        optimizer.zero_grad()
        module(x).sum().backward()
        optimizer.step()

    return run


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every implementation in every round, after one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of tokens, pass and implementation."""
    rows = []
    modules = implementations(args)
    trained = {"dense": modules["dense"], "memory_plus": modules["memory_plus"], "memory_fused": WithPool(args, "fused")}
    for tokens in args.tokens:
        x = torch.randn(tokens, args.d_model).to(getattr(torch, args.dtype))
        torch.testing.assert_close(modules["memory_plus"](x), modules["plain"](x), rtol=2e-2, atol=2e-2)
        passes = {
            "forward": {name: forward_only(m, x) for name, m in modules.items()},
            "forward+backward": {name: forward_backward(m, list(m.parameters()), x) for name, m in modules.items()},
            "training step": {name: training_step(m, x) for name, m in trained.items()},
        }
        for what, runs in passes.items():
            for threads in args.threads:
                torch.set_num_threads(threads)
                rows += lines({"tokens": tokens, "pass": what, "threads": threads}, measure(runs, args.rounds))
        for m in trained.values():  # the next optimizer must be able to update the fused table
            release(m)
    return rows


def lines(what: dict[str, Any], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The rows of one comparison. A fused training step of many tokens should take no longer than the dense MLP's."""
    rows = []
    for name, taken in times.items():
        row = {**what, "layer": name, "median_ms": round(median(taken), 3), "min_ms": round(min(taken), 3)}
        row["times_dense"] = round(median(taken) / median(times["dense"]), 3)
        if name == "memory_fused" and what["tokens"] > 8:
            found = round(min(taken) / min(times["dense"]), 3)
            row |= {"target": "<= 1.0 x dense", "found": found, "met": found <= 1.0}
        rows.append(row)
    return rows


def verdict(row: dict[str, Any]) -> str:
    """The target of a row, the ratio of minima, and whether it is met; "" without a target."""
    return f"{row['target']}: {row['found']:.2f}, {'met' if row['met'] else 'missed'}" if "target" in row else ""


def native() -> str:
    """Whether the C++ kernels are used."""
    why = native_interface.loaded()[1]
    return f"C++ kernels: {why}" if why else "C++ kernels: used"


def release(module: nn.Module) -> None:
    """Detach the module's pools from the optimizer that updates them."""
    for m in module.modules():
        if isinstance(m, Pool) and m.pending is not None:
            m.pending.taker = None


def machine() -> dict[str, Any]:
    """The CPU, threads and versions on which the numbers depend; no host name."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "system": platform.system(),
        "native": native_interface.loaded()[1] is None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "memrewrite": version("memrewrite"),
        },
    }


def arguments(argv: list[str]) -> argparse.Namespace:
    """The default sizes are those of a block of a 373m model, with a table of 65,536 slots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--d-model", type=int, default=1024, help="width of the block")
    parser.add_argument("--d-hidden", type=int, default=2816, help="hidden width of the dense MLP")
    parser.add_argument("--keys", type=int, default=256, help="keys per half; the table has keys² slots")
    parser.add_argument("--heads", type=int, default=4, help="heads of the memory layer")
    parser.add_argument("--topk", type=int, default=32, help="slots read per head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="tokens per call")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of all tensors")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch threads; more than 1 needs an idle machine")
    parser.add_argument("--json", type=Path, default=Path("layer_cpu.json"), help="output file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    args = arguments(argv)
    torch.manual_seed(0)
    print(native())
    rows = benchmark(args)
    sizes = {name: value for name, value in vars(args).items() if name != "json"}
    print(", ".join(f"{name} {value}" for name, value in sizes.items()))
    print(f"{'tokens':>6} {'threads':>7}  {'pass':<17} {'layer':<12} {'median ms':>10} {'min ms':>10} {'× dense':>8}  target")
    for row in rows:
        print(
            f"{row['tokens']:>6} {row['threads']:>7}  {row['pass']:<17} {row['layer']:<12} "
            f"{row['median_ms']:>10.2f} {row['min_ms']:>10.2f} {row['times_dense']:>8.2f}  {verdict(row)}"
        )
    result = {"benchmark": "layer_cpu", "sizes": sizes, "machine": machine(), "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
