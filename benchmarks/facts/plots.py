"""Pictures that are readable in grey and at half size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from groups import TERA, Group, Spread, named
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIZE, DPI = (8, 5), 120


def learning_curves(groups: list[Group], path: Path) -> None:
    """Bits of an answer against exposures: the mean over the seeds, in a band from the lowest to the highest seed."""
    figure, axes = _axes("exposures of each training sequence", "knowledge (bits of an answer)")
    for at, (name, group) in enumerate(named(groups)):
        shown = [point[0] * group.setting.batch / group.setting.facts for point in group.runs[0]["curve"]]
        bits = [[run["curve"][step][1] for run in group.runs] for step in range(len(shown))]
        style = _style(at, len(groups))
        axes.plot(shown, [mean(b) for b in bits], label=name, **style)
        axes.fill_between(shown, [min(b) for b in bits], [max(b) for b in bits], color=style["color"], alpha=0.15, linewidth=0)
    _save(figure, axes, path)


def against_flops(groups: list[Group], path: Path, number: str, label: str) -> None:
    """A number of the runs against the arithmetic of the training: a line for each model with several budgets, else a point."""
    figure, axes = _axes("arithmetic of the training (TFLOP, logarithmic)", label)
    models = list(dict.fromkeys(group.setting.model for group in groups))
    for at, model in enumerate(models):
        mine = sorted((g for g in groups if g.setting.model == model), key=lambda group: group.training_flops)
        flops = [group.training_flops / TERA for group in mine]
        _error_bars(axes, flops, [group.spread(number) for group in mine], label=model, **_style(at, len(models)))
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def recall_against_slots(groups: list[Group], path: Path) -> None:
    """Recall against the slots of the table, with the models without a table as horizontal lines."""
    figure, axes = _axes("slots of the table (logarithmic)", "recall (%)")
    tables = [group for group in groups if group.pool is not None]
    families = list(dict.fromkeys(_family(group) for group in tables))
    without = [(name, group) for name, group in named(groups) if group.pool is None]
    count = len(without) + len(families)
    for at, (name, group) in enumerate(without):
        axes.axhline(group.recall.mean, label=name, **_style(at, count) | {"marker": ""})
    for at, family in enumerate(families, len(without)):
        mine = [group for group in tables if _family(group) == family]
        spreads = [group.recall for group in mine]
        _error_bars(axes, [group.slots for group in mine], spreads, label=family, **_style(at, count))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({group.slots for group in tables}), minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def _error_bars(axes: Axes, places: Sequence[float], spreads: list[Spread], **style: Any) -> None:
    means, deviations = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
    axes.errorbar(places, means, yerr=deviations, capsize=5, **style)


def _family(group: Group) -> str:
    """Memory+ of all sizes is one family."""
    return group.setting.model.removesuffix("-small").removesuffix("-large")


def _style(number: int, count: int) -> dict[str, Any]:
    """The look of one model: the last one, the largest Memory+, is black, the first one light grey."""
    grey, line, mark = str(0.7 * (1 - (number + 1) / count)), LINES[number % len(LINES)], MARKS[number % len(MARKS)]
    return {"color": grey, "linestyle": line, "linewidth": 2, "marker": mark, "markersize": 8}


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=15)
    axes.set_ylabel(y, fontsize=15)
    axes.tick_params(which="both", labelsize=13)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(fontsize=13)
    figure.savefig(path, dpi=DPI)
