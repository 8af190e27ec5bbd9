"""Runs that differ in their seeds only, and the numbers that are computed from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any, NamedTuple

from settings import Json, Setting

TERA = 1e12
UNNAMED = ("task", "seed", "lr")  # groups that are shown together have one task; seeds and rates are columns of tables


class Spread(NamedTuple):
    """Mean and standard deviation over the seeds (0 for one seed), and their number."""

    mean: float
    deviation: float
    count: int

    def text(self, digits: int) -> str:
        """`12.6 ± 1.8`."""
        around = f" ± {self.deviation:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{around}"

    def clearly_above(self, other: Spread) -> bool:
        """Whether the difference is positive and more than twice its standard error. Never with one seed."""
        if min(self.count, other.count) < 2:
            return False
        error = math.sqrt(self.deviation**2 / self.count + other.deviation**2 / other.count)
        return self.mean - other.mean > 2 * error


class Group:
    """Runs of one setting with different seeds."""

    def __init__(self, runs: list[Json]) -> None:
        self.runs = sorted(runs, key=lambda run: int(run["setting"]["seed"]))
        self.setting = Setting(**self.runs[0]["setting"]).but(seed=0)
        self.costs: Json = self.runs[0]["costs"]

    @property
    def pool(self) -> Json | None:
        """Usage of the first pool, of the first run; None without memory."""
        usage = self.runs[0]["usage"]
        return usage["pools"][0] if usage else None

    def spread(self, number: str | Callable[[Json], float]) -> Spread:
        """A number of each run, over the seeds."""
        numbers: list[float] = [number(run) if callable(number) else run[number] for run in self.runs]
        return Spread(mean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0, len(numbers))

    def of_pool(self, name: str) -> float | None:
        """A number of the first pool's usage, the mean over the seeds."""
        return mean(run["usage"]["pools"][0][name] for run in self.runs) if self.pool else None

    @property
    def slots(self) -> int:
        """Slots of all pools together; 0 without memory."""
        usage = self.runs[0]["usage"]
        return sum(pool["slots"] for pool in usage["pools"]) if usage else 0

    @property
    def recall(self) -> Spread:
        """Percent."""
        return self.spread("recall")

    @property
    def knowledge(self) -> float:
        """Bits of all test sequences together, the mean over the seeds."""
        return self.spread(lambda run: run["bits"] * run["tests"]).mean

    @property
    def tokens(self) -> int:
        """Tokens that the model computes for one sequence."""
        return int(self.runs[0]["tokens"])

    @property
    def training_flops(self) -> float:
        """Operations of the whole training, counted."""
        return float(self.costs["training_flops"]) * self.tokens * self.setting.batch * self.setting.steps

    @property
    def efficiency(self) -> dict[str, float]:
        """Bits of knowledge for what they cost; more is better."""
        return {
            "bits per parameter": self.knowledge / self.costs["parameters"],
            "kbit per training TFLOP": self.knowledge / 1000 / (self.training_flops / TERA),
            "bits per byte read": self.knowledge / self.costs["bytes_read"],
            "kbit per second of training": self.knowledge / self.spread("ms").mean / self.setting.steps,
        }

    def exposures_to(self, recall: float) -> list[float | None]:
        """How often each run had seen each sequence when it first recalled that many percent; None: never."""
        return [_first_at(run["curve"], recall, self.setting.batch / self.setting.facts) for run in self.runs]


def _first_at(curve: list[list[float]], recall: float, exposures_a_step: float) -> float | None:
    """Interpolated between the points of a learning curve."""
    before: tuple[float, float] = (0.0, 0.0)
    for step, _, here in curve:
        if here >= recall:
            share = (recall - before[1]) / (here - before[1])
            return exposures_a_step * (before[0] + share * (step - before[0]))
        before = (step, here)
    return None


def grouped(records: list[Json]) -> list[Group]:
    """Groups in the order of their first record."""
    found: dict[Any, list[Json]] = defaultdict(list)
    for record in records:
        found[Setting(**record["setting"]).but(seed=0)].append(record)
    return [Group(runs) for runs in found.values()]


def named(groups: list[Group]) -> list[tuple[str, Group]]:
    """Each group after its name: the model, with its settings that are not the default and that differ among the groups."""
    changes = [{k: v for k, v in group.setting.changed.items() if k not in UNNAMED} for group in groups]
    fields = {name for change in changes for name in change if any(other.get(name) != change[name] for other in changes)}
    said = [[f"{k}={v}" for k, v in change.items() if k in fields - {"model"}] for change in changes]
    return [(" ".join([group.setting.model, *others]), group) for group, others in zip(groups, said, strict=True)]


def by_task(groups: list[Group]) -> dict[str, list[Group]]:
    """Groups of each task, in order."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        found[group.setting.task].append(group)
    return dict(found)


def of_one_budget(groups: list[Group]) -> list[Group]:
    """The groups that were trained for the largest number of steps that every model has; none if there is no such number."""
    steps: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        steps[group.setting.model].add(group.setting.steps)
    largest = max(set.intersection(*steps.values()), default=None)
    return [group for group in groups if group.setting.steps == largest]
