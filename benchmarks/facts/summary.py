"""Everything that a study found, as text and as plots."""

from __future__ import annotations

from pathlib import Path

from conclusions import baseline_wins, compared, compute_ratios, order, paper_order
from groups import Group, by_task, of_one_budget
from tables import cost, learned, usage
from tasks import FACTS


def summary(groups: list[Group]) -> str:
    """Tables and conclusions of every task, in Markdown."""
    return "\n\n".join(_of_task(task, mine) for task, mine in by_task(groups).items())


def _of_task(task: str, groups: list[Group]) -> str:
    tables = [learned(groups), cost(groups)]
    if any(group.pool is not None for group in groups):
        tables.append(usage(groups))
    comparable = of_one_budget(groups)
    said = [order(comparable), *compared(groups)]
    if task in FACTS:
        said += [*paper_order(comparable), *baseline_wins(comparable), *compute_ratios(groups)]
    first = groups[0]
    heading = f"## {task}: {first.runs[0]['tests']:,} questions of {first.runs[0]['entropy']:.1f} bits"
    return "\n\n".join([heading, *tables, "\n".join(f"* {sentence}" for sentence in said)])


def draw(groups: list[Group], out: Path, study: str) -> None:
    """Plots of every task: `STUDY-TASK-curves.png`, `-recall.png`, `-bits.png`; `-slots.png` for several tables."""
    from plots import against_flops, learning_curves, recall_against_slots

    for task, mine in by_task(groups).items():
        start = f"{study}-{task}"
        learning_curves(mine, out / f"{start}-curves.png")
        against_flops(mine, out / f"{start}-recall.png", "recall", "recall (%)")
        against_flops(mine, out / f"{start}-bits.png", "bits", "knowledge (bits of an answer)")
        if len({group.setting.model for group in mine if group.setting.model.startswith("memory-plus")}) > 1:
            recall_against_slots(mine, out / f"{start}-slots.png")
