"""The sections of a run, in order. Time limits and dependencies are changed here."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL = 420.0  # seconds of a whole run
COVERAGE = "every timed kernel is checked"
LOOKUP, TOPK = ("lookup", COVERAGE), ("topk", COVERAGE)
UPDATE = ("adagrad", "adam", "stochastic rounding", "lookup and updates", COVERAGE)


@dataclass(frozen=True)
class Section:
    """A part of the table, measured by a process of its own.

    Attributes:
        name: Its name in the table and in `--sections`.
        share: Its share of the time. What a section leaves is shared by those after it.
        module: The module that has its cases, imported in the process of the section.
        function: The function of this module that returns the cases.
        checks: How the names of those correctness cases begin whose kernels the section times.
        processes: Maximum number of processes that share the cases. More than one only where nothing is timed.
    """

    name: str
    share: float
    module: str
    function: str = "cases"
    checks: tuple[str, ...] = ()
    processes: int = 1


SECTIONS = (
    Section("correctness", 80, "correctness", processes=8),  # its processes compile the kernels in parallel
    Section("ceilings", 15, "peak_rates"),
    Section("forward", 45, "lookup", "forward_cases", LOOKUP),
    Section("decode", 20, "lookup", "decode_cases", LOOKUP),
    Section("backward", 50, "lookup", "backward_cases", LOOKUP),
    Section("topk", 25, "steps", "topk_cases", TOPK),
    Section("update", 35, "steps", "update_cases", (*UPDATE, "lazy_adam")),
    Section("training step", 25, "steps", "step_cases", (*LOOKUP, *TOPK, *UPDATE)),
    Section("memory size", 30, "large_tables", "cases", (*LOOKUP, *TOPK, *UPDATE)),
    Section("layer", 55, "layers", "layer_cases", (*LOOKUP, *TOPK, *UPDATE)),
    Section("compile", 25, "layers", "compile_cases", (*LOOKUP, *TOPK, *UPDATE)),
    Section("onnx", 25, "onnx_cuda"),
    # last: it gets the time that the others leave
    Section("sweep", 60, "sweep", checks=(*LOOKUP, *TOPK, *UPDATE, "lazy_adam")),
)
NAMES = tuple(section.name for section in SECTIONS)
RATES = "ceilings"  # the section that measures the rates which the others are compared to


def chosen(names: str) -> tuple[Section, ...]:
    """The sections named in a list with commas, in the order of the run; all for "". Raises ValueError for unknown names."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise ValueError(f"there is no section {unknown[0]!r}; the sections are: {', '.join(NAMES)}")
    return tuple(section for section in SECTIONS if not wanted or section.name in wanted)
