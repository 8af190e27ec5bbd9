"""Shared by the sections of `benchmarks/gpu`: the sizes, the kernels under test, and the timer.

Flow: a case creates implementations → `Bench.race` times them in interleaved rounds → `Bench.result` compares the times with
floor and targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import Case as Case  # the sections import everything from here
from results import Result, Target
from results import Skip as Skip
from results import Stop as Stop

from memrewrite.kernels import torch_backend, triton_backend

Run = Callable[[], Any]
ROUNDS = 25  # maximum; slow implementations have fewer


@dataclass(frozen=True)
class Sizes:
    """All sizes; the defaults are for the device, `rehearsal` for the CPU."""

    tokens: int = 16384
    heads: int = 4
    topk: int = 32
    dims: tuple[int, ...] = (1024, 2048, 4096)
    keys: int = 2048  # per half: 4 M slots, so that half of the rows read are read once, and far larger than any L2
    train_keys: int = 1024
    decode: tuple[int, ...] = (1, 8, 64)
    sets: int = 16  # index sets in decoding, so that no row is in a cache when it is read
    topk_rows: int = 65536
    topk_keys: tuple[int, ...] = (1024, 4096)
    hidden: int = 7  # hidden width of the dense MLP in units of d_model / 2: 3.5 × d_model, as in Llama 3 8B
    copy_bytes: int = 8 << 30
    matmul: int = 8192

    @classmethod
    def rehearsal(cls) -> Sizes:
        """Small enough for Triton's interpreter."""
        return cls(
            tokens=3, heads=2, topk=2, dims=(32,), keys=8, train_keys=8, decode=(1, 3), sets=2, topk_rows=3, topk_keys=(32,),
            copy_bytes=1 << 16, matmul=32,
        )  # fmt: skip

    @property
    def reads(self) -> int:
        """K: slots per token."""
        return self.heads * self.topk


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds."""

    ms: float
    min_ms: float
    rounds: int


class Bench:
    """A device (the CPU in a rehearsal), its measured peak rates, and the timer."""

    def __init__(self, *, rehearse: bool, triton: bool, library: Path | None = None, end: float = math.inf) -> None:
        self.rehearse = rehearse
        self.end = end  # Unix time at which the section is stopped
        self.library = library  # the native library under test; None: the section that needs one builds it
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.sizes = Sizes.rehearsal() if rehearse else Sizes()
        self.kernels: Any = triton_backend if triton else torch_backend  # both modules have the same functions
        self.copy = math.nan  # bytes per second, read and written
        self.matmul = math.nan  # bf16 operations per second
        self.kept: dict[str, float] = {}  # rates that the record does not have yet
        l2 = 0 if rehearse else torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(0 if rehearse else max(4 * l2, 256 << 20), dtype=torch.uint8, device=self.device)

    def keep(self, rate: str, value: float) -> None:
        """Set the attribute `rate` here and, by way of the record, in the processes of later sections."""
        setattr(self, rate, value)
        self.kept[rate] = value

    def free(self) -> int:
        """Bytes that can still be allocated; a fixed number in a rehearsal."""
        if self.rehearse:
            return 1 << 30
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info()[0]
        return free

    def keys_within(self, keys: int, dim: int, itemsize: int, share: float) -> int:
        """The largest `keys`, halved as often as needed, whose table takes at most `share` of the free memory."""
        room = self.free() * share
        while keys > 1 and keys * keys * dim * itemsize > room:
            keys //= 2
        return keys

    def sync(self) -> None:
        """Wait for the device."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`torch.compile`; a rehearsal captures in the same way but without code generation."""
        if self.rehearse:
            options.pop("mode", None)
            options["backend"] = "aot_eager"
        compiled: Callable[..., Any] = torch.compile(function, **options)
        return compiled

    def graphed(self, run: Run) -> Run:
        """`run` captured once as a CUDA graph, so that launches take no host time."""
        if self.rehearse:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay(_: Any = kept) -> None:  # keeps the outputs alive as long as the graph that writes them
            graph.replay()

        return replay

    def race(self, runs: dict[str, Run], *, seconds: float = 0.5, per: int = 1, flush: bool = True) -> dict[str, Timing | str]:
        """Times of all implementations in interleaved rounds; `per` calls count as one run.

        Caches are flushed before each run; without `flush`, a run before it that is not timed fills them. `seconds` is the
        time limit of each. A baseline that cannot run gets the reason; "ours" must run.
        """
        plan: dict[str, int] = {}
        times: dict[str, list[float]] = {}
        out: dict[str, Timing | str] = {}
        for name, run in runs.items():
            try:
                run()
                estimate = 0.0 if self.rehearse else self._once(run, flush)
            except Exception as error:  # a baseline may fail in any way; the line reports how
                if name == "ours":
                    raise
                out[name] = reason(error)
                self.free()
                continue
            fewest = 3 if estimate < 1e3 else 1
            plan[name] = 0 if self.rehearse else max(fewest, min(ROUNDS, int(seconds * 1e3 / max(estimate, 1e-3))))
            times[name] = [0.0] if self.rehearse else []
        for turn in range(max(plan.values(), default=0)):
            for name, rounds in plan.items():
                if turn < rounds:
                    times[name].append(self._once(runs[name], flush) / per)
        out |= {name: Timing(median(taken), min(taken), len(taken)) for name, taken in times.items()}
        return {name: out[name] for name in runs}

    def _once(self, run: Run, flush: bool = True) -> float:
        """Milliseconds of one run. What precedes it keeps the device busy while the host prepares the launch."""
        if flush:
            self._flush.zero_()
        else:
            run()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed

    def result(
        self,
        section: str,
        case: str,
        times: dict[str, Timing | str],
        *,
        moved: int = 0,
        targets: Iterable[Target] = (),
        note: str = "",
        extra: dict[str, Any] | None = None,
    ) -> Result:
        """The line of a race: `moved` is the number of bytes that must move; the floor is their time at the copy rate.

        Without a copy rate there is no share of the floor, and its target is not decided.
        """
        ours = times["ours"]
        assert isinstance(ours, Timing)
        if self.rehearse:  # times of a rehearsal are meaningless and not stored
            line = Result(section, case, "rehearsed", note=note, moved=moved or None, extra=extra or {})
            line.rivals = {name: t if isinstance(t, str) else "rehearsed" for name, t in times.items() if name != "ours"}
            line.targets = [(str(t), None) for t in targets]
            return line
        line = Result(section, case, "ok", ours.ms, ours.min_ms, note=note, moved=moved or None, extra=extra or {})
        line.rivals = {name: t.ms if isinstance(t, Timing) else t for name, t in times.items() if name != "ours"}
        ratios = {name: ms / ours.ms for name, ms in line.rivals.items() if isinstance(ms, float)}
        line.ratios = ratios
        if moved:
            line.gbps = moved / ours.ms / 1e6
            line.of_floor = None if math.isnan(self.copy) else moved / self.copy * 1e3 / ours.ms
        reached = ratios if line.of_floor is None else {**ratios, "floor": line.of_floor}
        line.targets = [(str(t), reached[t.of] >= t.least if t.of in reached else None) for t in targets]
        return line


def reason(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"
