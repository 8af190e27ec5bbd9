"""The studies: each answers one question by comparing settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from compared_models import MAIN, MODELS
from rules import RULES
from runs import Runs
from settings import Json, Setting

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # every model is tuned over these
TUNING_SEED = 1000  # with this seed, which nothing else uses
OTHER_SEEDS = 3  # at most, of all but the main models
SMOKE_BITS, SMOKE_READ = 6.0, 0.5  # what a dense model learns at least, and the share of the slots that is read
MEMORY = Setting()
DENSE = Setting(model="dense")


def no_problem(records: list[Json]) -> str:
    """A study that only reports."""
    return ""


class Study(NamedTuple):
    """One study.

    Attributes:
        question: What it answers.
        settings: Makes its settings of the runs and the number of seeds. It may train some first, to choose rates.
        problem: What is wrong with its records; empty if nothing is.
        seeds: Seeds if the command line names no number.
    """

    question: str
    settings: Callable[[Runs, int], list[Setting]]
    problem: Callable[[list[Json]], str] = no_problem
    seeds: int = 3


def tuned(run: Runs, models: Sequence[str], seeds: int) -> dict[str, Setting]:
    """Each model with the rate of the grid at which its run with the tuning seed learned most bits."""
    grid = [MEMORY.but(model=model, seed=TUNING_SEED, lr=rate) for model in models for rate in RATES]
    later = repeated(seeds, *(setting for setting in grid if setting.lr == RATES[0]))
    records = run(grid, then=later)
    if len(records) < len(grid):
        sys.exit("there was no time to try all rates; the same command goes on")
    bits = {setting: record["bits"] for setting, record in zip(grid, records, strict=True)}
    best = {model: max((s for s in grid if s.model == model), key=bits.__getitem__) for model in models}
    return {model: setting.but(seed=0) for model, setting in best.items()}


def repeated(seeds: int, *settings: Setting) -> list[Setting]:
    """Every setting with each seed; all settings of one seed come first, so that an interrupted study compares pairs."""
    return [setting.but(seed=seed) for seed in range(seeds) for setting in settings]


def models(run: Runs, seeds: int) -> list[Setting]:
    """All models on facts, and the main ones on rules, at the rates that suit them on facts.

    The main ones have more seeds than the others if `seeds` is larger than `OTHER_SEEDS`.
    """
    best = tuned(run, list(MODELS), seeds)
    main = [best[model] for model in MAIN]
    few = min(seeds, OTHER_SEEDS)
    facts = list(dict.fromkeys(repeated(few, *best.values()) + repeated(seeds, *main)))
    exercises = ({"task": "countries", "steps": 150}, {"task": "addition", "steps": 320, "batch": 512})
    rules = [setting.but(**exercise) for exercise in exercises for setting in main]  # type: ignore[arg-type]
    return facts + repeated(few, *rules)


def quick(run: Runs, seeds: int) -> list[Setting]:
    """The main models, all at one rate."""
    return repeated(seeds, *(Setting(model=model) for model in MAIN))


def smoke(run: Runs, seeds: int) -> list[Setting]:
    """Dense and Memory+ in a minute."""
    small = {"facts": 4000, "batch": 512, "steps": 150}
    return repeated(seeds, DENSE.but(**small), MEMORY.but(**small))


def learning_broke(records: list[Json]) -> str:
    """Why the records of `smoke` are not those of models that learn."""
    for dense, memory in zip(records[::2], records[1::2], strict=True):
        if dense["bits"] < SMOKE_BITS:
            return f"the dense model learned {dense['bits']:.2f} bits of an answer, not {SMOKE_BITS}"
        if memory["bits"] <= dense["bits"]:
            return f"Memory+ learned {memory['bits']:.2f} bits of an answer, the dense model {dense['bits']:.2f}"
        read = memory["usage"]["pools"][0]["share_read"]
        if read <= SMOKE_READ:
            return f"Memory+ reads {100 * read:.0f} % of its slots"
    return ""


def gpu(run: Runs, seeds: int) -> list[Setting]:
    """All models on the cities, on a CUDA device, at one rate; the main ones first."""
    common = {"device": "cuda", "scale": "d128", "task": "cities", "facts": 100_000, "batch": 8192, "steps": 300, "lr": 2e-3}
    ordered = dict.fromkeys([*MAIN, "memory-plus-large", "dense-2x", "memory-plus-small", "moe"])
    return repeated(seeds, *(Setting(**common, model=model, heads=4, topk=16) for model in ordered))  # type: ignore[arg-type]


def transfer(run: Runs, seeds: int) -> list[Setting]:
    """The main models, twice as wide and with half as many blocks more, at three budgets.

    The rate of each is half of the one that suits it at half the width. Dense has a fourth budget, which is compared with none:
    the arithmetic that it needs for what the others know is read from its curve.
    """
    best = tuned(run, list(MODELS), seeds)
    larger = {"scale": "d64", "task": "airports-in-detail", "facts": 10_000, "batch": 256}
    wide = [best[model].but(**larger, lr=best[model].lr / 2) for model in MAIN]
    budgets = [setting.but(steps=steps) for setting in repeated(seeds, *wide) for steps in (260, 520, 1040)]
    return budgets + repeated(seeds, wide[0].but(steps=2080))


def base(run: Runs, seeds: int) -> list[Setting]:
    """The scale at which the base's weights start, with and without memory; 0.02 is the default of transformers."""
    best = tuned(run, list(MODELS), seeds)
    compared = (best["dense"], best["memory-plus"])
    return repeated(seeds, *(s.but(initializer_range=scale) for scale in (0.02, 0.06, 0.0) for s in compared))


def ablations(run: Runs, seeds: int) -> list[Setting]:
    """One change of Memory+ at a time, at its tuned rate."""
    best = tuned(run, list(MODELS), seeds)["memory-plus"]
    changes: list[Json] = [
        {},
        {"separate": True, "keys": 74},  # three tables with as many slots together
        {"separate": True},
        {"heads": 1, "topk": 16},
        {"heads": 4, "topk": 4},
        {"value_factor": 1.0},
        {"value_factor": 2.5},
        {"value_factor": 10.0},
        {"fixed_values": False},
        {"value_decay": 0.1},
        {"qk_norm": False},
        {"qk_norm": False, "scores": 1.41},  # scores that start as they do with it
        *({"rule": rule} for rule in RULES if rule != best.rule),
        {"dtype": "bfloat16"},
        {"dtype": "float8_e4m3fn"},
        {"output": "paper"},
        {"output": "zero"},
        {"weight_decay": 0.0},
        {"clip": 1.0},
    ]
    return repeated(seeds, *(best.but(**change) for change in changes))


STUDIES = {
    "models": Study("Does memory learn more facts at equal arithmetic? And where nothing has to be remembered?", models),
    "quick": Study("The same in ten minutes: the main models, one seed, untuned.", quick, seeds=1),
    "smoke": Study("Does a memory layer learn at all? One minute; fails if not.", smoke, learning_broke, seeds=1),
    "gpu": Study("Does memory learn more facts at equal arithmetic? On a GPU, within eight minutes.", gpu, seeds=1),
    "transfer": Study(
        "Does the order hold at twice the width, and how much arithmetic does dense need for the same?", transfer
    ),
    "ablations": Study("Which options of Memory+ matter?", ablations),
    "base": Study("At which scale should the base's weights start?", base),
}
