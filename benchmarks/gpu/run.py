"""Measures everything on a GPU with one command: `python benchmarks/gpu`, no arguments, no network, less than eight minutes.

First the correctness of every kernel, then the peak rates of the device, each kernel, the training step, the largest tables,
the layer and torch.compile; finally a table, and JSON. `--rehearse` runs all this on a CPU with tiny sizes and stores no times.
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

import torch  # noqa: E402 - the package must be importable first

if TYPE_CHECKING:
    from harness import Bench, Case, Result


WARMING = 75.0  # maximum, in seconds


@dataclass(frozen=True)
class Section:
    """A part of the table and its time limit in seconds; unused time of earlier sections is available to later ones."""

    name: str
    seconds: float
    cases: Callable[[Bench], Iterable[Case]]


def sections() -> tuple[Section, ...]:
    """All sections in order; 450 seconds in total."""
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


def measure(bench: Bench, log: Callable[[str], None]) -> list[Result]:
    """The lines of every case of every section, or one line with the reason why there are none."""
    from harness import Result, Stop

    results: list[Result] = []
    start, due = time.perf_counter(), 0.0
    stopped = ""
    if not bench.rehearse:
        warm(log)
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
            log(f"{time.perf_counter() - start:6.1f} s  {section.name}: {case.name}: {results[-1].status}")
            gc.collect()
            torch._dynamo.reset()
            bench.free()
    return results


def warm(log: Callable[[str], None]) -> None:
    """Compile kernels in several processes in parallel: this process then finds them in Triton's cache.

    Each process runs a share of the correctness cases and discards the results; kernels it misses are compiled here.
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
    log(f"{time.perf_counter() - start:6.1f} s  kernels compiled by {share} processes")


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def compile_share(share: str) -> int:
    """The work of one of these processes: the correctness cases i, i + n, i + 2n, ..."""
    import correctness
    from harness import Bench

    i, n = (int(number) for number in share.split("/"))
    bench = Bench(rehearse=False, triton=True)
    for case in list(correctness.cases(bench))[i::n]:
        with contextlib.suppress(Exception):  # errors are reported by the measuring process
            case.run(bench)
    return 0


def _broken(section: str, case: str, error: Exception) -> Result:
    """The line of a case that could not run: "not run" if a third-party package is missing, else "FAILED" and a traceback."""
    from harness import Result, reason

    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("memrewrite"):
        return Result(section, case, f"not run ({reason(error)})")
    traceback.print_exception(error)
    return Result(section, case, f"FAILED: {reason(error)}")


def refusal(rehearse: bool) -> str | None:
    """Why nothing can be measured on this machine, and what to try; None if it can."""
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
    """True if Triton's kernels can run on CPU tensors; the variable must be set before Triton is imported."""
    return find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def main(argv: list[str]) -> int:
    """Measure, write JSON, print. Returns 0: done; 1: a kernel is wrong, or a case failed; 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="output file")
    parser.add_argument("--rehearse", action="store_true", help="run everything on the CPU with tiny sizes, without times")
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
        print(f"rehearsal on the CPU, kernels of {bench.kernels.NAME!r}: times are meaningless and not stored")
    print(", ".join(f"{name} {value}" for name, value in {**device(args.rehearse), **versions()}.items()))
    results = measure(bench, lambda line: print(line, flush=True))
    seconds = time.perf_counter() - start
    outcome = record(bench, results, seconds)
    return concluded(args.json, outcome, results, lambda wrong: f"benchmarks/gpu: {wrong.section}, {wrong.case}")
