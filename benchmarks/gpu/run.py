"""Measures everything on a GPU by one command: `python benchmarks/gpu`, no arguments, no network, under eight minutes.

Correctness of every kernel first, then what the device can do, then each kernel, the training step, the largest tables, the
layer and torch.compile; a table last, and JSON. `--rehearse` goes the same way on a CPU at tiny sizes and keeps no times.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import import_checkout

import_checkout.ensure()

import torch  # noqa: E402 - the package must be findable first

if TYPE_CHECKING:
    from harness import Bench, Case, Result


WARMING = 75.0  # seconds, at most


@dataclass(frozen=True)
class Section:
    """A part of the table, and the seconds it may take; what an earlier one leaves, later ones may use."""

    name: str
    seconds: float
    cases: Callable[[Bench], Iterable[Case]]


def sections() -> tuple[Section, ...]:
    """All of them, in order; 450 seconds together."""
    import correctness
    import large_tables
    import layers
    import lookup
    import peak_rates
    import steps

    return (
        Section("correctness", 95, correctness.cases),
        Section("ceilings", 5, peak_rates.cases),
        Section("forward", 50, lookup.forward_cases),
        Section("decode", 20, lookup.decode_cases),
        Section("backward", 60, lookup.backward_cases),
        Section("topk", 25, steps.topk_cases),
        Section("update", 25, steps.update_cases),
        Section("training step", 20, steps.step_cases),
        Section("memory size", 35, large_tables.cases),
        Section("layer", 85, layers.layer_cases),
        Section("compile", 30, layers.compile_cases),
    )


def measure(bench: Bench, say: Callable[[str], None]) -> list[Result]:
    """Every case of every section: its lines, or one that says why there are none."""
    from harness import Result, Stop

    results: list[Result] = []
    start, due = time.perf_counter(), 0.0
    stopped = ""
    if not bench.rehearse:
        warm(say)
    for section in sections():
        due += section.seconds
        for case in section.cases(bench):
            late = not bench.rehearse and time.perf_counter() - start > due
            if stopped or late:
                results.append(Result(section.name, case.name, f"not run ({stopped or 'time'})"))
                continue
            try:
                results += case.run(bench)
            except Stop as wrong:
                results.append(Result(section.name, case.name, f"WRONG: {wrong}"))
                stopped = "a kernel is wrong"
            except Exception as error:  # noqa: BLE001 - one broken case must not hide the others
                results.append(_broken(section.name, case.name, error))
                stopped = "a kernel cannot run" if section.name == "correctness" else stopped
            say(f"{time.perf_counter() - start:6.1f} s  {section.name}: {case.name}: {results[-1].status}")
            gc.collect()
            torch._dynamo.reset()
            bench.free()
    return results


def warm(say: Callable[[str], None]) -> None:
    """Compile for the device in several processes at once: this one then finds the kernels in Triton's cache.

    Each runs a share of the correctness cases and throws the outcome away; where that fails, this process compiles.
    """
    share = max(1, min(8, (os.cpu_count() or 2) // 2))
    if share < 2:
        return
    start = time.perf_counter()
    line = [sys.executable, str(Path(__file__).resolve().parent), "--warm"]
    quiet = subprocess.DEVNULL
    running = [subprocess.Popen([*line, f"{i}/{share}"], stdout=quiet, stderr=quiet) for i in range(share)]
    for process in running:
        _end(process, WARMING - (time.perf_counter() - start))
    say(f"{time.perf_counter() - start:6.1f} s  kernels compiled by {share} processes")


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def compile_share(share: str) -> int:
    """What one of those processes does: the cases i, i + n, i + 2n, ... of correctness."""
    import correctness
    from harness import Bench

    i, n = (int(number) for number in share.split("/"))
    bench = Bench(rehearse=False, triton=True)
    for case in list(correctness.cases(bench))[i::n]:
        with contextlib.suppress(Exception):  # what is wrong is said by the process that measures
            case.run(bench)
    return 0


def _broken(section: str, case: str, error: Exception) -> Result:
    """A case that could not run: not for want of a package that is not ours, or by our fault, with its trace on stderr."""
    from harness import Result, reason

    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("memrewrite"):
        return Result(section, case, f"not run ({reason(error)})")
    traceback.print_exception(error)
    return Result(section, case, f"FAILED: {reason(error)}")


def refusal(rehearse: bool) -> str | None:
    """Why nothing can be measured here, and what to try; None where it can."""
    if rehearse:
        return None
    if not torch.cuda.is_available():
        return (
            f"benchmarks/gpu: torch {torch.__version__} sees no CUDA GPU, so there is nothing to measure\n"
            "  try: a machine with an NVIDIA GPU and a CUDA build of torch; or --rehearse, which runs all this on the CPU"
        )
    if find_spec("triton") is None:
        return (
            "benchmarks/gpu: Triton is not installed, and the kernels are written in it\n"
            "  try: pip install triton, in the version that your torch names"
        )
    return None


def interpreted() -> bool:
    """Whether Triton's kernels can run on CPU tensors: it must be told before it is imported."""
    return find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def main(argv: list[str]) -> int:
    """Measure, write, print. 0: done; 1: a kernel is wrong, or a case failed; 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the figures go")
    parser.add_argument("--rehearse", action="store_true", help="run everything on the CPU at tiny sizes, without times")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    why = refusal(args.rehearse)
    if why is not None:
        print(why, file=sys.stderr)
        return 2
    if args.warm:
        return compile_share(args.warm)
    from harness import Bench
    from report import concluded, device, record, versions

    start = time.perf_counter()
    torch.manual_seed(0)
    bench = Bench(rehearse=args.rehearse, triton=not args.rehearse or interpreted())
    if args.rehearse:
        print(f"rehearsal on the CPU, kernels of {bench.kernels.NAME!r}: times mean nothing and are not kept")
    print(", ".join(f"{name} {value}" for name, value in {**device(args.rehearse), **versions()}.items()))
    results = measure(bench, lambda line: print(line, flush=True))
    seconds = time.perf_counter() - start
    outcome = record(bench, results, seconds)
    return concluded(args.json, outcome, results, lambda wrong: f"benchmarks/gpu: {wrong.section}, {wrong.case}")
