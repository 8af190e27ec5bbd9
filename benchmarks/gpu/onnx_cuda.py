"""The section "onnx": checks and times the CUDA kernels of the memory operators in ONNX Runtime, without network.

First correctness, with every dtype, odd sizes and unaligned rows; then the times of each kernel, of its function of standard
operators on the same provider, and of torch.

The machine needs torch with CUDA, onnx, onnxruntime-gpu, and either nvcc and a C++ compiler, or a library built elsewhere
(`memrewrite build-op --cuda`, then `--library FILE`). If it has no network, copy wheels: `pip download --no-deps
--only-binary=:all: -d wheels onnxruntime-gpu onnx ml_dtypes protobuf flatbuffers` for its Python version, then
`run.sh --wheels wheels`. If 260 MB are too much, overwrite with zeros the machine code of all other architectures in
`libonnxruntime_providers_cuda.so` (`cuobjdump -lelf` lists it) and compress: 60 MB remain. CUDA's libraries are those of torch,
of the same major version.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import data as data
import torch  # before onnxruntime, which needs CUDA's libraries to be loaded
from harness import Bench, Case, Result, Run, Skip, Stop
from onnx_correctness import DTYPES, checks, lookup_inputs
from onnx_operators import Operators, missing
from torch.nn import functional as F

from memrewrite.errors import MemrewriteError, UserError
from memrewrite.kernels import torch_backend

SECTION = "onnx"
TOKENS, READS, DIM, KEYS, HEADS, TOPK = (4096, 64, 1), 128, 1024, 1024, 4, 32  # sizes of the timed cases; KEYS² slots
SECONDS = 0.1  # per implementation and case


def cases(bench: Bench) -> Iterator[Case]:
    """The checks, then the timed cases. Raises Skip if ONNX Runtime cannot run the kernels here."""
    if why := missing():
        raise Skip(why.splitlines()[0])
    if not bench.rehearse:
        require_cuda()
        torch.cuda.set_stream(torch.cuda.Stream())  # ONNX Runtime does not accept the default stream
    try:
        library = usable_library(bench.library, bench.rehearse)
    except MemrewriteError as error:
        raise Skip(str(error).splitlines()[0]) from error
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)  # the cases need the files as long as the process runs
    operators = Operators(bench.rehearse, library, Path(folder.name))
    for case in (*checks(bench, operators), *timed(bench, operators)):
        yield Case(case.name, partial(counted, case=case, operators=operators))


def counted(bench: Bench, case: Case, operators: Operators) -> Iterator[Result]:
    """The case; then the library's own count of calls must match the calls made. Raises Stop if it does not."""
    before, calls = operators.counters(), dict(operators.calls)
    yield from case.run(bench)
    found = {op: count - before[op] for op, count in operators.counters().items()}
    made = {op: count - calls[op] for op, count in operators.calls.items()}
    if found != made:
        raise Stop(f"the native kernels ran {found} times in {made} calls")


def timed(bench: Bench, operators: Operators) -> Iterator[Case]:
    """Both operators with many and with few tokens."""
    for tokens in (3, 1) if bench.rehearse else TOKENS:
        for dtype in DTYPES:
            for op, run in (("SparseLookup", time_lookup), ("ProductKeyTopk", time_topk)):
                yield Case(f"{op} T={tokens} {str(dtype)[6:]}", partial(run, operators=operators, tokens=tokens, dtype=dtype))


def later(make: Callable[[], Run]) -> Run:
    """A run that is created by its first call: a baseline that cannot be created then counts as one that cannot run."""
    made: list[Run] = []

    def run() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return run


def time_lookup(bench: Bench, operators: Operators, tokens: int, dtype: torch.dtype) -> list[Result]:
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
    times, moved = bench.race(runs, seconds=SECONDS), data.forward_bytes(values, indices, weights)
    return [bench.result(SECTION, f"SparseLookup {case}", times, moved=moved)]


def time_topk(bench: Bench, operators: Operators, tokens: int, dtype: torch.dtype) -> list[Result]:
    """The kernel, its function, and the operator in plain torch, with softmax, for every head of the tokens."""
    rows, n, k = tokens * HEADS, *((16, 4) if bench.rehearse else (KEYS, TOPK))
    one, two = (data.normal(rows, n, dtype=dtype, device=bench.device, seed=seed) for seed in (3, 4))
    inputs = {"scores1": one, "scores2": two}
    runs: dict[str, Run] = {
        "ours": operators.call("native", "ProductKeyTopk", inputs, k=k, softmax=1),
        "function": later(lambda: operators.call("standard", "ProductKeyTopk", inputs, k=k, softmax=1)),
        "torch": lambda: torch_backend.topk(one, two, k, True),
    }
    times, moved = bench.race(runs, seconds=SECONDS), data.size_of(one, two) + rows * k * (4 + 8)
    case = f"ProductKeyTopk rows={rows} n={n} k={k} {str(dtype)[6:]}"
    return [bench.result(SECTION, case, times, moved=moved)]


# -------------------------------------------------------------------------------------------------------- requirements


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
    """Raise Skip if the CUDA provider cannot run."""
    import onnxruntime

    from memrewrite.passes.onnx.session import CUDA

    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        onnxruntime.preload_dlls()
    if CUDA not in onnxruntime.get_available_providers():
        raise Skip(f"this onnxruntime {onnxruntime.__version__} has no {CUDA}: onnxruntime-gpu is needed")
