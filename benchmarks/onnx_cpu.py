"""Times the memory operators in ONNX Runtime on the CPU: native kernels, their functions of standard operators, and torch.

The results of every implementation are checked; then all run in turn in one process, so that load on the machine slows them
equally. Medians and minima over the rounds are printed and written as JSON. Compare ratios, not milliseconds. The memory of
one call, without its inputs, is the growth of the peak memory of a new process. `--model FILE.onnx` also times a whole exported
model by both routes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from layer_cpu import machine
from onnx_comparisons import TOLERANCE, Comparison, lookup, lookup_inputs, lookup_size, model, table, topk
from onnx_operators import OPS, missing

from memrewrite.errors import MemrewriteError

PAUSE = 0.02  # seconds before each run: the threads of the previous run stop spinning and free their cores
TARGETS = {"native / torch": 0.85, "native / function": 1 / 2.5}  # for the lookup with the most tokens, in fp32
EXTRA_MB = 10  # maximum memory of the same native lookup
NOT_PRINTED = ("json", "folder", "library", "memory_of")


def race(args: argparse.Namespace, comparison: Comparison) -> dict[str, list[float]]:
    """Milliseconds per call of each implementation in every round; results are checked first."""
    from memrewrite.passes.onnx.session import calls_of

    calls = {who: [make(given) for given in comparison.draws] for who, make in comparison.makers.items()}
    before, alone = calls_of(args.library, comparison.name), comparison.name in OPS
    for who, (first, *others) in calls.items():
        comparison.check(comparison.draws[0], who, first())
        if who == "native" and calls_of(args.library, comparison.name) - before != alone:
            raise MemrewriteError(f"the native kernel of {comparison.name} did not run")
        for call in others:
            call()
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(args.rounds):
        for who, turn in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for call in turn:
                call()
            times[who].append((time.perf_counter() - start) * 1e3 / len(turn))
    return times


def row(comparison: Comparison, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """A row: milliseconds per implementation; ratios of native to each other one (median over the rounds, and of minima)."""
    others = {f"native / {who}": taken for who, taken in times.items() if who != "native"}
    over = [(name, list(zip(times["native"], taken, strict=True))) for name, taken in others.items()]
    return {
        "contest": comparison.name,
        "size": comparison.size,
        "median_ms": {who: round(median(taken), 4) for who, taken in times.items()},
        "min_ms": {who: round(min(taken), 4) for who, taken in times.items()},
        "ratio": {name: round(median(a / b for a, b in pairs), 3) for name, pairs in over},
        "ratio_of_minima": {name: round(min(a for a, _ in pairs) / min(b for _, b in pairs), 3) for name, pairs in over},
    }


def extra_memory(args: argparse.Namespace, who: str) -> int:
    """Growth in bytes of this process's peak memory in a lookup with the most tokens (output included), after a small one."""
    values = table(args, args.dtype[0])
    comparison, given = lookup(args, values, 1), lookup_inputs(args, values, max(args.tokens))
    comparison.makers[who](comparison.draws[0])()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    before = _peak()
    comparison.makers[who](given)()
    return _peak() - before


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found, "Linux reports the peak memory of a process as VmHWM"
    return int(found.group(1)) << 10


def memory(argv: list[str], who: str) -> float:
    """The same in MB (10^6 bytes), measured in a new process."""
    line = [sys.executable, str(Path(__file__).resolve()), *argv, "--memory-of", who]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) / 1e6


def targets(args: argparse.Namespace, rows: list[dict[str, Any]], extra: Mapping[str, float]) -> list[dict[str, Any]]:
    """The project's targets for the lookup with the most tokens in fp32, and the measured numbers."""
    lookups = [line["ratio"] for line in rows if line["size"] == lookup_size(args, max(args.tokens), "float32")]
    reached = [(name, most, ratio[name]) for ratio in lookups for name, most in TARGETS.items()]
    reached += [("MB that a call takes, native", EXTRA_MB, extra["native"])] if extra else []
    return [{"target": f"{name} ≤ {most:g}", "reached": got, "met": got <= most} for name, most, got in reached]


# ----------------------------------------------------------------------------------------------------------------- command


def arguments(argv: list[str]) -> argparse.Namespace:
    """The default sizes are those of a block of a 373m model, with a table of 65,536 slots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--reads", type=int, default=128, help="slots that a token reads")
    parser.add_argument("--dim", type=int, default=1024, help="width of a value")
    parser.add_argument("--slots", type=int, default=65536, help="rows of the table")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--keys", type=int, nargs="+", default=[256, 1024], help="keys per half")
    parser.add_argument("--topk", type=int, default=32, help="slots chosen per head")
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=["float32"])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of ONNX Runtime")
    parser.add_argument("--library", type=Path, help="the native library; default: the built one, or build it")
    parser.add_argument("--model", type=Path, metavar="FILE.onnx", help="also time this exported model")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="its inputs by name; default: sampled, of --tokens")
    parser.add_argument("--json", type=Path, default=Path("onnx_cpu.json"), help="output file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # implementation to measure in the process that `memory` starts
    return parser.parse_args(argv)


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every comparison; print each when it ends."""
    rows = []

    def add(comparison: Comparison) -> None:
        rows.append(row(comparison, race(args, comparison)))
        print(shown(rows[-1]), flush=True)

    for dtype in args.dtype:
        values = table(args, dtype)
        for tokens in args.tokens:
            add(lookup(args, values, tokens))
            for keys in args.keys:
                add(topk(args, keys, dtype, tokens))
    if args.model:
        add(model(args))
    return rows


def shown(line: Mapping[str, Any]) -> str:
    """A row as text: medians (minima) in milliseconds, then ratios in the same form."""
    pairs = [("median_ms", "min_ms", ".3f"), ("ratio", "ratio_of_minima", ".2f")]
    texts = [[f"{name} {v:{form}} ({line[low][name]:{form}})" for name, v in line[mid].items()] for mid, low, form in pairs]
    return f"{line['contest']:<14} {line['size']:<36} " + "  ".join(f"{text:<28}" for part in texts for text in part).rstrip()


def main(argv: list[str]) -> int:
    """Measure, print, write JSON. Returns 0: done; 1: a result is wrong; 2: a package or tool is missing."""
    args = arguments(argv)
    if why := missing():
        print(f"onnx_cpu: {why}", file=sys.stderr)
        return 2
    from memrewrite.kernels.native_library import built_library
    from memrewrite.passes.onnx.native_library import build_op

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        try:
            args.library = (args.library or built_library() or build_op()).resolve()
            if args.memory_of:
                print(extra_memory(args, args.memory_of))
                return 0
            sizes = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name not in NOT_PRINTED}
            print(", ".join(f"{name} {value}" for name, value in sizes.items()))
            print("milliseconds per call: median (minimum); then ratios")
            rows = benchmark(args)
        except MemrewriteError as error:
            print(f"onnx_cpu: {error}", file=sys.stderr)
            return error.exit_code
    extra = {who: memory(argv, who) for who in ("native", "function", "torch")} if sys.platform == "linux" else {}
    print(f"memory of a lookup of {max(args.tokens)} tokens, MB:", ", ".join(f"{who} {mb:.1f}" for who, mb in extra.items()))
    met = targets(args, rows, extra)
    for line in met:
        print(f"{line['target']}: {line['reached']:.2f}, {'met' if line['met'] else 'MISSED'}")
    environment = {**machine(), "onnxruntime": version("onnxruntime")}
    result = {"benchmark": "onnx_cpu", "sizes": sizes, "machine": environment, "rows": rows, "extra_mb": extra, "targets": met}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
