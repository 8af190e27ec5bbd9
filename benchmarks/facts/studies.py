"""The studies: each a list of settings that answers one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rules import RULES
from settings import Setting

VALUE_RATES = (2e-2, 4e-2, 8e-2)
START = Setting()
DENSE = Setting(model="dense")


def start(seeds: int) -> list[Setting]:
    """At which scale should a layer start?"""
    outputs: tuple[str | float, ...] = ("paper", "match", "zero")
    return _repeated(seeds, DENSE, *(replace(START, output=output) for output in outputs))


def rates(seeds: int) -> list[Setting]:
    """Which rate of the tables suits each update rule? Every rule gets the same grid."""
    return _repeated(seeds, *(replace(START, rule=rule, value_lr=rate) for rule in RULES for rate in VALUE_RATES))


def rules(seeds: int) -> list[Setting]:
    """Which update rule learns most?"""
    return _repeated(seeds, DENSE, *(replace(START, rule=rule) for rule in RULES))


def training(seeds: int) -> list[Setting]:
    """Do lower rates, a longer warm-up, clipping, fixed rates of the values or no norm of queries and keys help?"""
    changes = (
        replace(START, lr=4e-3, value_lr=2e-2),
        replace(START, warmup=60),
        replace(START, clip=1.0),
        replace(START, fixed_values=True),
        replace(START, qk_norm=False),
        replace(START, weight_decay=0.0),
    )
    return _repeated(seeds, START, *changes)


def models(seeds: int) -> list[Setting]:
    """Dense, PKM, PEER and Memory+: does memory learn more facts at equal FLOPs?"""
    return _repeated(seeds, DENSE, replace(START, model="pkm"), replace(START, model="peer"), START)


def smoke(seeds: int) -> list[Setting]:
    """A minute: does a memory layer learn at all?"""
    small = {"facts": 2000, "batch": 512, "steps": 120}
    return _repeated(min(seeds, 1), replace(DENSE, **small), replace(START, **small))


STUDIES: dict[str, Callable[[int], list[Setting]]] = {
    study.__name__: study for study in (start, rates, rules, training, models, smoke)
}


def _repeated(seeds: int, *settings: Setting) -> list[Setting]:
    """Every setting with each seed; all settings of one seed come first, so that an interrupted study compares pairs."""
    return [replace(setting, seed=seed) for seed in range(seeds) for setting in settings]
