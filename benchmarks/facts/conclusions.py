"""What the numbers say, in sentences: the order found, and where a baseline wins."""

from __future__ import annotations

from itertools import pairwise

from groups import Group, Spread, named

OURS = "memory-plus"


CLAIMS = (
    ("dense", "<", "pkm"),
    ("pkm", "≈", "peer"),
    ("pkm", "<", OURS),
    ("peer", "<", OURS),
    (f"{OURS}-small", "<", OURS),
    (OURS, "<", f"{OURS}-large"),
)  # the paper's order of its layers, and of its table sizes (Table 1)


def order(groups: list[Group]) -> str:
    """The groups by recall, the lowest first: `<` before a difference of more than twice its standard error, else `≈`."""
    if not groups:
        return "No budget was trained with every model."
    ordered = sorted(named(groups), key=lambda pair: pair[1].recall.mean)
    said = [ordered[0][0]]
    for (_, lower), (name, higher) in pairwise(ordered):
        said.append(f"{_relation(lower.recall, higher.recall)} {name}")
    chance = "" if all(group.recall.count > 1 for group in groups) else " With one seed a difference may be chance."
    return "Order of recall: " + " ".join(said) + "." + chance


def paper_order(groups: list[Group]) -> list[str]:
    """For each claim of the paper about two of the models: whether it holds here."""
    recalls = {group.setting.model: group.recall for group in reversed(groups)}
    said = []
    for lower, sign, higher in CLAIMS:
        if lower in recalls and higher in recalls:
            found = _relation(recalls[lower], recalls[higher])
            verdict = "holds" if found == sign else f"does not hold: {lower} {found} {higher}"
            said.append(f"The paper's {lower} {sign} {higher} {verdict}.")
    return said


def _relation(first: Spread, second: Spread) -> str:
    """`<`, `>` or `≈`: by twice the standard error of the difference; with one seed by the numbers alone."""
    if min(first.count, second.count) < 2:
        return "<" if first.mean < second.mean else ">" if first.mean > second.mean else "≈"
    return "<" if second.clearly_above(first) else ">" if first.clearly_above(second) else "≈"


def baseline_wins(groups: list[Group]) -> list[str]:
    """One sentence for each measure by which a baseline is better than every Memory+."""
    ours = {name: group for name, group in named(groups) if group.setting.model.startswith(OURS)}
    others = {name: group for name, group in named(groups) if name not in ours}
    if not ours or not others:
        return []
    measures = {"recall %": {name: group.recall.mean for name, group in (ours | others).items()}}
    for measure in groups[0].efficiency:
        measures[measure] = {name: group.efficiency[measure] for name, group in (ours | others).items()}
    said = []
    for measure, values in measures.items():
        best, mine = max(others, key=values.__getitem__), max(ours, key=values.__getitem__)
        if values[best] > values[mine]:
            said.append(f"A baseline wins by {measure}: {best} {values[best]:.3g}, {mine} {values[mine]:.3g}.")
    return said or ["No baseline wins by any of these measures."]


def compared(groups: list[Group]) -> list[str]:
    """Memory+ against each other group of its budget: the difference of recall, and whether the seeds tell it from none."""
    pairs = named(groups)
    ours = {group.setting.steps: (name, group) for name, group in reversed(pairs) if group.setting.model == OURS}
    said = []
    for name, group in pairs:
        mine, our_group = ours.get(group.setting.steps, (name, group))
        if our_group is not group:
            said.append(f"{mine} against {name}: {_difference(our_group.recall, group.recall)}.")
    return said


def _difference(ours: Spread, other: Spread) -> str:
    points = f"{ours.mean - other.mean:+.1f} points of recall"
    if min(ours.count, other.count) < 2:
        return f"{points}, one seed"
    clear = ours.clearly_above(other) or other.clearly_above(ours)
    return f"{points}, {'more than' if clear else 'within'} twice the standard error"


def compute_ratios(groups: list[Group]) -> list[str]:
    """How much training arithmetic the dense model needs for the recall, and the bits, of each other group, as a multiple."""
    dense = sorted((group for group in groups if group.setting.model == "dense"), key=lambda group: group.training_flops)
    if len({group.setting.steps for group in dense}) < 2:
        return []
    said = []
    for name, group in named(groups):
        if group.setting.model != "dense":
            needed = " and ".join(f"{_ratio(group, dense, number)} for its {number}" for number in ("recall", "bits"))
            said.append(f"Of the arithmetic of {name}, dense needs {needed}.")
    return said


def _ratio(group: Group, dense: list[Group], number: str) -> str:
    """The arithmetic at which the dense model of several budgets reaches a group's number, as a multiple of the group's.

    Between two budgets linear in the logarithm of the arithmetic; outside of them a bound.
    """
    flops = [budget.training_flops for budget in dense]
    reached, wanted = [budget.spread(number).mean for budget in dense], group.spread(number).mean
    if wanted < reached[0]:
        return f"less than {flops[0] / group.training_flops:.2f} ×"
    for at, (low, high) in enumerate(pairwise(reached)):
        if low <= wanted <= high:
            share = (wanted - low) / (high - low) if high > low else 0.0
            needed = flops[at] * (flops[at + 1] / flops[at]) ** share
            return f"{needed / group.training_flops:.2f} ×"
    return f"more than {flops[-1] / group.training_flops:.2f} ×"
