"""Checks and times the CUDA kernels of the memory operators in ONNX Runtime: `python benchmarks/gpu/onnx_cuda.py`, no network.

First correctness, with every dtype, odd sizes and unaligned rows; then the times of each kernel, of its function of standard
operators on the same provider, and of torch; finally a table, and JSON. `--rehearse` runs all this on the CPU with tiny sizes
and stores no times.

The machine needs torch with CUDA, onnx, onnxruntime-gpu, and either nvcc and a C++ compiler, or a library built elsewhere
(`memrewrite build-op --cuda`). If it has no network, copy wheels: `pip download --no-deps --only-binary=:all: -d wheels
onnxruntime-gpu onnx ml_dtypes protobuf flatbuffers` for its Python version, then on the machine `pip install --no-index
--no-deps wheels/*`. If 260 MB are too much, overwrite with zeros the machine code of all other architectures in
`libonnxruntime_providers_cuda.so` (`cuobjdump -lelf` lists it) and compress: 60 MB remain. CUDA's libraries are those of torch,
of the same major version.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import import_checkout

import_checkout.ensure()

import data as data  # noqa: E402 - the package must be findable first
import torch  # noqa: E402 - before onnxruntime, which needs CUDA's libraries to be loaded
from harness import Bench, Case, Result, Run, Stop, reason  # noqa: E402
from onnx_correctness import DTYPES, checks, lookup_inputs  # noqa: E402
from onnx_operators import Operators, missing  # noqa: E402
from peak_rates import copy  # noqa: E402
from report import concluded, device, record, versions  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from memrewrite.errors import MemrewriteError, UserError  # noqa: E402
from memrewrite.kernels import torch_backend  # noqa: E402

TOKENS, READS, DIM, KEYS, HEADS, TOPK = (4096, 64, 1), 128, 1024, 1024, 4, 32  # sizes of the timed cases; KEYS² slots


def timed(bench: Bench, operators: Operators, seconds: float) -> Iterator[Case]:
    """The device's copy rate, then both operators with many and with few tokens."""
    yield Case("copy", copy)
    for tokens in (3, 1) if bench.rehearse else TOKENS:
        for dtype in DTYPES:
            name = f"T={tokens} {str(dtype)[6:]}"
            yield Case(name, partial(time_lookup, operators=operators, tokens=tokens, dtype=dtype, seconds=seconds))
            yield Case(name, partial(time_topk, operators=operators, tokens=tokens, dtype=dtype, seconds=seconds))


def later(make: Callable[[], Run]) -> Run:
    """A run that is created by its first call: a baseline that cannot be created then counts as one that cannot run."""
    made: list[Run] = []

    def run() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return run


def time_lookup(bench: Bench, operators: Operators, tokens: int, dtype: torch.dtype, seconds: float) -> list[Result]:
    """The kernel, its function, and an embedding bag per token."""
    dim, reads = (32, 4) if bench.rehearse else (DIM, READS)
    keys = bench.keys_within(8 if bench.rehearse else KEYS, dim, dtype.itemsize, 0.25)
    inputs = lookup_inputs(bench, (keys * keys, dim, tokens, reads), dtype)
    values, indices, weights = inputs.values()
    runs: dict[str, Run] = {
        "ours": operators.call("native", "SparseLookup", inputs),
        "function": later(lambda: operators.call("standard", "SparseLookup", inputs)),
        "embedding_bag": lambda: F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum"),
    }
    case = f"T={tokens} K={reads} D={dim} N={keys}² {str(dtype)[6:]}"
    times, moved = bench.race(runs, seconds=seconds), data.forward_bytes(values, indices, weights)
    return [bench.result("SparseLookup", case, times, moved=moved)]


def time_topk(bench: Bench, operators: Operators, tokens: int, dtype: torch.dtype, seconds: float) -> list[Result]:
    """The kernel, its function, and the operator in plain torch, with softmax, for every head of the tokens."""
    rows, n, k = tokens * HEADS, *((16, 4) if bench.rehearse else (KEYS, TOPK))
    one, two = (data.normal(rows, n, dtype=dtype, device=bench.device, seed=seed) for seed in (3, 4))
    inputs = {"scores1": one, "scores2": two}
    runs: dict[str, Run] = {
        "ours": operators.call("native", "ProductKeyTopk", inputs, k=k, softmax=1),
        "function": later(lambda: operators.call("standard", "ProductKeyTopk", inputs, k=k, softmax=1)),
        "torch": lambda: torch_backend.topk(one, two, k, True),
    }
    times, moved = bench.race(runs, seconds=seconds), data.size_of(one, two) + rows * k * (4 + 8)
    return [bench.result("ProductKeyTopk", f"rows={rows} n={n} k={k} {str(dtype)[6:]}", times, moved=moved)]


# ------------------------------------------------------------------------------------------------------------- command


def measure(bench: Bench, operators: Operators, cases: Iterable[Case], log: Callable[[str], None]) -> list[Result]:
    """The lines of every case, or why there are none; after each case, the library's call counts must match the calls made.

    A wrong result ends the run: later results would be meaningless.
    """
    results: list[Result] = []
    start, before = time.perf_counter(), operators.counters()
    for case in cases:
        try:
            results += case.run(bench)
            found = {op: count - before[op] for op, count in operators.counters().items()}
            if found != operators.calls:
                raise Stop(f"the native kernels ran {found} times in {operators.calls} calls")
        except Stop as wrong:
            results += [Result("", case.name, f"WRONG: {wrong}"), Result("", "later cases", "not run (a kernel is wrong)")]
            break
        except MemrewriteError:  # no session can be created, so no other case would run
            raise
        except Exception as error:  # noqa: BLE001 - one broken case must not hide the others
            traceback.print_exception(error)
            results.append(Result("", case.name, f"FAILED: {reason(error)}"))
        log(f"{time.perf_counter() - start:6.1f} s  {results[-1].section} {case.name}: {results[-1].status}")
    return results


def usable_library(given: Path | None, rehearse: bool) -> Path:
    """The library to test: `given`, else the built one, else built now. Raises UserError if there is none for CUDA."""
    from memrewrite.kernels.native_library import built_library
    from memrewrite.passes.onnx.native_library import build_op, default_library

    if given is not None and not given.is_file():
        raise UserError(
            f"there is no library {str(given)!r}", hint="memrewrite build-op --cuda -o FILE, on a machine with nvcc"
        )
    if given is not None:
        return given.resolve()
    if rehearse:
        return built_library() or build_op()
    there = default_library(cuda=True)
    return there if there.is_file() else build_op(cuda=True)


def require_cuda() -> None:
    """Raise UserError if the CUDA provider cannot run."""
    if not torch.cuda.is_available():
        what = f"torch {torch.__version__} sees no CUDA GPU, so there is nothing to measure"
        hint = "a machine with an NVIDIA GPU and a CUDA build of torch; or --rehearse, which runs all this on the CPU"
        raise UserError(what, hint=hint)
    import onnxruntime

    from memrewrite.passes.onnx.session import CUDA

    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        onnxruntime.preload_dlls()
    if CUDA not in onnxruntime.get_available_providers():
        what = f"this onnxruntime {onnxruntime.__version__} has no {CUDA}"
        raise UserError(what, hint="pip install onnxruntime-gpu instead of onnxruntime; `--help` describes how without network")


def main(argv: list[str]) -> int:
    """Measure, write JSON, print. Returns 0: done; 1: a kernel is wrong, or a case failed; 2: a requirement is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("onnx_cuda.json"), help="output file")
    parser.add_argument("--library", type=Path, metavar="FILE", help="the native library; default: built here with nvcc")
    parser.add_argument("--seconds", type=float, default=0.5, help="time limit per implementation and case")
    parser.add_argument("--rehearse", action="store_true", help="run everything on the CPU with tiny sizes, without times")
    args = parser.parse_args(argv)
    try:
        if why := missing():
            raise UserError(why)
        if not args.rehearse:
            require_cuda()
            torch.cuda.set_stream(torch.cuda.Stream())  # ONNX Runtime does not accept the default stream
        library = usable_library(args.library, args.rehearse)
        with tempfile.TemporaryDirectory() as folder:
            return run(args, Operators(args.rehearse, library, Path(folder)))
    except MemrewriteError as error:
        print(f"onnx_cuda: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace, operators: Operators) -> int:
    """Run the measurement; returns the exit code."""
    import onnxruntime

    start = time.perf_counter()
    bench = Bench(rehearse=args.rehearse, triton=False)
    packages = {**versions(), "onnxruntime": onnxruntime.__version__}
    print(", ".join(f"{name} {value}" for name, value in {**device(args.rehearse), **packages}.items()))
    cases = chain(checks(bench, operators), timed(bench, operators, args.seconds))
    results = measure(bench, operators, cases, lambda line: print(line, flush=True))
    outcome = {**record(bench, results, time.perf_counter() - start), "benchmark": "onnx_cuda", "versions": packages}
    return concluded(args.json, outcome, results, lambda wrong: f"onnx_cuda: {wrong.case}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
