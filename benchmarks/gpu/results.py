"""The form of cases, targets and results. Without torch: the process that starts and ends the others uses them too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness import Bench


@dataclass(frozen=True)
class Target:
    """At least `least` times as fast as the baseline `of`; for "floor", at least this share of the floor."""

    of: str
    least: float

    def __str__(self) -> str:
        return f"≥ {self.least:.0%} of floor" if self.of == "floor" else f"≥ {self.least:g}× {self.of}"


@dataclass
class Result:
    """One line of the table. `ms` is our time; `rivals` are the baselines: their time, or the reason why one could not run."""

    section: str
    case: str
    status: str = "ok"
    ms: float | None = None
    min_ms: float | None = None
    gbps: float | None = None
    of_floor: float | None = None
    rivals: dict[str, float | str] = field(default_factory=dict)  # baseline → milliseconds, or why it could not run
    ratios: dict[str, float] = field(default_factory=dict)  # baseline → its time divided by ours
    targets: list[tuple[str, bool | None]] = field(default_factory=list)  # None: not decided
    note: str = ""
    moved: int | None = None  # bytes that must move
    extra: dict[str, Any] = field(default_factory=dict)  # further facts for the record, e.g. the plan of the kernel


@dataclass(frozen=True)
class Case:
    """One measurement; it may give several lines, and each is recorded as soon as `run` yields it."""

    name: str
    run: Callable[[Bench], Iterable[Result]]


class Stop(Exception):  # noqa: N818 - a finding, not an error of this program
    """A kernel is wrong."""


class Skip(Exception):  # noqa: N818 - a finding, not an error of this program
    """A section or a case cannot run on this machine, and why."""
