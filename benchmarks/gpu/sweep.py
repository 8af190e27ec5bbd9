"""Which plan of each Triton kernel is fastest on this device: every candidate is compiled, compared, and timed.

Flow: processes compile the candidates in parallel into Triton's cache, with tiny inputs of the same specialization → in rounds,
for each kernel and size, the launcher's own plan is timed, then the next PART candidates, the most promising first, until
the section has no time left. A candidate that spills is not timed; one whose results differ is an error.
`python benchmarks/gpu/sweep.py RESULTS.jsonl` writes the winners into kernels/plans.json.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import import_checkout

import_checkout.ensure()

import torch  # noqa: E402 - the package must be importable first
from harness import Bench, reason  # noqa: E402
from results import Case, Result, Skip  # noqa: E402
from sections import chosen  # noqa: E402

from memrewrite.kernels import triton_plans  # noqa: E402

if TYPE_CHECKING:  # it imports Triton, which a machine without a GPU need not have
    from sweep_subjects import Subject

COMPILING = 0.4 * chosen("sweep")[0].share  # seconds at most; what is not compiled then is compiled when it is timed
STARTING = 2.0  # seconds before the section's end after which no candidate is run
PART = 8  # candidates of a kernel and size in one round
REHEARSED = 2  # candidates of a kernel in a rehearsal: the interpreter is slow
EACH = 0.04  # seconds of timing for a candidate


def cases(bench: Bench) -> Iterator[Case]:
    """Compilation, then for each round one case for each kernel, dtype and size."""
    if bench.kernels.NAME != "triton":
        yield Case("plans", _nothing)
        return
    from sweep_subjects import subjects

    if not bench.rehearse:
        yield Case("compile", _compile)
    for number, subject, plans in rounds(list(subjects(bench.rehearse)), REHEARSED if bench.rehearse else None):
        yield Case(f"{subject.name}, round {number}", partial(_sweep, subject=subject, plans=plans))


def rounds(every: list[Subject], most: int | None = None) -> Iterator[tuple[int, Subject, list[dict[str, Any]]]]:
    """Round 1 of all subjects, then round 2: subject and candidates; `most`: the candidates of a subject."""
    parts = []
    for subject in every:
        plans = subject.candidates[:most]
        parts.append([(subject, plans[first : first + PART]) for first in range(0, len(plans), PART)])
    for number, turn in enumerate(zip_longest(*parts), start=1):
        yield from ((number, *part) for part in turn if part is not None)


def _nothing(bench: Bench) -> list[Result]:
    return [Result("sweep", "plans", "not run (the kernels of torch have no plans)")]


def _compile(bench: Bench) -> list[Result]:
    """Processes that share the candidates and run each on tiny inputs; what they do not finish is compiled when it is timed."""
    start, count = time.monotonic(), max(1, min(12, (os.cpu_count() or 2) - 2))
    line = [sys.executable, str(Path(__file__).resolve()), "--compile"]
    running = [subprocess.Popen([*line, f"{i}/{count}"], stdout=subprocess.DEVNULL) for i in range(count)]
    unfinished = 0
    while any(process.poll() is None for process in running) and time.monotonic() - start < COMPILING:
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            unfinished += 1
            process.kill()
            process.wait()
    seconds = time.monotonic() - start
    note = f"{count} processes, {seconds:.0f} s" + (f", {unfinished} not finished" if unfinished else "")
    return [Result("sweep", "compile", note=note, extra={"seconds": round(seconds, 1)})]


def compile_share(share: str) -> int:
    """The candidates i, i + n, i + 2n, ... of all subjects, each run once on tiny inputs."""
    from sweep_subjects import subjects

    i, n = (int(number) for number in share.split("/"))
    every = list(subjects(False))
    own = ((subject, None) for subject in every)
    work = [*own, *chain.from_iterable(((subject, plan) for plan in plans) for _, subject, plans in rounds(every))]
    for subject, plan in work[i::n]:
        with contextlib.suppress(Exception), _using(subject, plan):  # errors are reported when the candidate is timed
            subject.inputs(torch.device("cuda"), "tiny").outputs()
    torch.cuda.synchronize()
    return 0


def _using(subject: Subject, plan: dict[str, Any] | None) -> contextlib.AbstractContextManager[None]:
    """The launcher's own plan for None, whatever the table says."""
    return contextlib.nullcontext() if plan is None else triton_plans.use(subject.kernel, plan)


def _sweep(bench: Bench, subject: Subject, plans: list[dict[str, Any]]) -> Iterator[Result]:
    """The own plan, then the candidates; one line each."""
    from sweep_subjects import error

    check_time(bench)
    patterns = ("uniform",) if subject.patterns == 1 or bench.rehearse else ("uniform", "zipf")
    inputs = {pattern: subject.inputs(bench.device, "rehearsal" if bench.rehearse else pattern) for pattern in patterns}
    right = {pattern: given.outputs() for pattern, given in inputs.items()}
    own = {pattern: _time(bench, given.run) for pattern, given in inputs.items()}
    yield _line(bench, subject, None, own, own)
    for plan in plans:
        check_time(bench)
        try:
            with triton_plans.use(subject.kernel, plan):
                before = subject.compiled()
                got = {pattern: given.outputs() for pattern, given in inputs.items()}
                if spills := subject.spills(before):
                    yield _failed(subject, plan, f"not run ({spills} spilled registers)")
                    continue
                wrong = max(error(got[pattern], right[pattern]) for pattern in patterns)
                if not wrong <= subject.tolerance:
                    yield _failed(subject, plan, f"WRONG: relative error {wrong:.2g}, {subject.tolerance:.2g} is allowed")
                    continue
                times = {pattern: _time(bench, given.run) for pattern, given in inputs.items()}
        except Exception as failure:  # noqa: BLE001 - a plan that needs too much shared memory, for example
            yield _failed(subject, plan, f"not run ({reason(failure)})")
            continue
        yield _line(bench, subject, plan, times, own, same=wrong == 0)


def check_time(bench: Bench) -> None:
    """Raises Skip where the runner would soon end this process."""
    if time.time() > bench.end - STARTING:
        raise Skip("no time left")


def _time(bench: Bench, run: Callable[[], Any]) -> float | None:
    """Milliseconds, caches flushed before each run; None in a rehearsal."""
    timing = bench.race({"ours": run}, seconds=EACH)["ours"]
    return None if bench.rehearse or isinstance(timing, str) else timing.ms


def _relative(times: dict[str, float | None], own: dict[str, float | None]) -> float:
    """Time in units of the own plan's, averaged over the patterns."""
    ratios = [ms / base for ms, base in zip(times.values(), own.values(), strict=True) if ms is not None and base]
    return sum(ratios) / len(ratios)


def _line(
    bench: Bench,
    subject: Subject,
    plan: dict[str, Any] | None,
    times: dict[str, float | None],
    own: dict[str, float | None],
    same: bool = True,
) -> Result:
    facts = {**_key(subject), "plan": plan, "times": times, "own": own, "same_bits": same}
    case = f"{subject.name}: {_words(plan)}"
    if bench.rehearse:
        return Result("sweep", case, "rehearsed", extra=facts)
    note = ", ".join(f"{pattern} {ms:.3f} ms" for pattern, ms in times.items() if ms is not None)
    ms = next(iter(times.values()))
    ratios = {"own plan": 1 / _relative(times, own)} if plan else {}
    return Result(
        "sweep", case, "ok", ms, ratios=ratios, note=note if same else f"{note}, other order of additions", extra=facts
    )


def _failed(subject: Subject, plan: dict[str, Any], status: str) -> Result:
    return Result("sweep", f"{subject.name}: {_words(plan)}", status, extra={**_key(subject), "plan": plan})


def _key(subject: Subject) -> dict[str, Any]:
    dtype = str(subject.dtype).removeprefix("torch.")
    return {"kernel": subject.kernel, "dtype": dtype, "size": list(subject.size)}


def _words(plan: dict[str, Any] | None) -> str:
    return "own plan" if plan is None else " ".join(f"{name}={value}" for name, value in plan.items() if value is not None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        sys.exit(compile_share(sys.argv[2]))
    import sweep_plans

    sys.exit(sweep_plans.main(sys.argv[1:]))
