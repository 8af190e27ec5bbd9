"""Learning curves as a picture that is readable in grey and at half size."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from settings import Json
from tables import groups

STYLES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def curves(records: list[Json], path: Path) -> None:
    """Bits a fact against the step: the mean over the seeds, in a band from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, runs) in enumerate(groups(records).items()):
        steps = [point[0] for point in runs[0]["curve"]]
        bits = [[run["curve"][at][1] for run in runs] for at in range(len(steps))]
        grey = 0.75 * number / max(1, len(groups(records)) - 1)
        style: dict[str, Any] = {"linestyle": STYLES[number % 4], "marker": MARKS[number % 7], "color": str(grey)}
        axes.plot(steps, [mean(at) for at in bits], label=name, linewidth=2, markersize=7, **style)
        axes.fill_between(steps, [min(at) for at in bits], [max(at) for at in bits], color=str(grey), alpha=0.15, linewidth=0)
    axes.set_xlabel("training step", fontsize=14)
    axes.set_ylabel("knowledge (bits a fact)", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
