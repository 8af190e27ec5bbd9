"""The benchmark of facts: its tasks, models, costs and tables; runs repeat, are kept, and go on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FACTS = Path(__file__).parents[2] / "benchmarks" / "facts"
SMALL: dict[str, Any] = {"facts": 60, "batch": 16, "steps": 4}


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the benchmark can be imported."""
    monkeypatch.syspath_prepend(str(FACTS))


def record(model: str = "dense", seed: int = 0, recall: float = 50.0, **changes: Any) -> dict[str, Any]:
    """A run as it is kept, with made-up numbers: 10 operations a token, 100 parameters, one table of 4 slots with memory."""
    from settings import Setting

    setting = Setting(model=model, seed=seed, facts=100, batch=10, steps=changes.pop("steps", 20)).but(**changes)
    pool = {"slots": 4, "share_read": 0.75, "kl_reads": 0.5, "top_reads": 0.25}
    return {
        "setting": setting.to_json(),
        "recall": recall,
        "bits": recall / 10,
        "entropy": 14.0,
        "tests": 100,
        "tokens": 5,
        "curve": [[10, 2.0, recall / 2], [20, recall / 10, recall]],
        "norms": [],
        "costs": {"parameters": 100, "flops": 10.0, "modelled_flops": 10.0, "training_flops": 30.0, "bytes_read": 400},
        "state_bytes": 64,
        "ms": 2.0,
        "usage": {"pools": [pool]} if model.startswith("memory") else None,
    }


@pytest.mark.parametrize("rule", ["adamw", "sparse-adam", "lazy-adam", "rowwise-adagrad"])
def test_a_run_repeats_in_every_bit(rule: str) -> None:
    from settings import Setting
    from train import run

    first, second = (run(Setting(rule=rule, **SMALL)) for _ in range(2))
    timed = {"ms": 0.0}
    assert first | timed == second | timed
    assert [point[0] for point in first["curve"]] == [1, 2, 3, 4]
    assert first["state_bytes"] > 0
    assert first["usage"]["pools"][0]["reads"] == 3 * 60 * 5 * 16  # layers, facts, tokens, heads × topk
    assert all(rest > 0 and tables > 0 for _, rest, tables in first["norms"])


@pytest.mark.parametrize("model", ["dense-2x", "moe", "pkm", "peer", "memory-plus-small"])
def test_every_model_is_trained(model: str) -> None:
    from settings import Setting
    from train import run

    done = run(Setting(model=model, facts=60, batch=60, steps=12))
    assert done["curve"][0][1] < done["bits"]


def test_what_is_learned() -> None:
    """Sixty facts fit in every model."""
    from settings import Setting
    from train import run

    done = run(Setting(facts=60, batch=60, steps=100))
    assert done["recall"] > 90
    assert done["curve"][0][1] < done["bits"] < 12  # the entropy of the answers of sixty facts


def test_airports_are_those_of_the_package() -> None:
    import airportsdata
    from tasks import TASKS
    from tasks.airports import CHARACTERS

    known = airportsdata.load("ICAO")
    rough, fine = TASKS["airports"](50), TASKS["airports-in-detail"](50)
    lowest = rough.train.min(0).values
    for tokens, detail in zip(rough.train.tolist(), fine.train.tolist(), strict=True):
        row = known["".join(CHARACTERS[token] for token in tokens[:4])]
        assert tokens[:4] == detail[:4]
        other = next(t for t in rough.train.tolist() if t[4] == int(lowest[4]))
        south = known["".join(CHARACTERS[token] for token in other[:4])]
        assert tokens[4] - other[4] == math.floor(row["lat"]) - math.floor(south["lat"])
    assert fine.answers == 5
    assert rough.entropy <= 2 * math.log2(50)
    assert fine.entropy > rough.entropy


def test_rules_are_asked_for_what_was_not_trained() -> None:
    from tasks import TASKS

    for name in ("countries", "addition"):
        task = TASKS[name](200)
        seen = {tuple(tokens) for tokens in task.train[:, : -task.answers].tolist()}
        assert len(task.train) == 200
        assert not seen & {tuple(tokens) for tokens in task.test[:, : -task.answers].tolist()}


def test_sums_are_right() -> None:
    from tasks import TASKS

    task = TASKS["addition"](100)
    places = torch.tensor([1, 10, 100, 1000])
    first, second, total = task.train.split([3, 3, 4], 1)
    assert torch.equal((first * places[:3]).sum(1) + (second * places[:3]).sum(1), (total * places).sum(1))


def test_cities_have_names_of_their_own() -> None:
    from tasks import TASKS

    task = TASKS["cities"](500)
    assert task.train.shape == (500, 16)
    assert len({tuple(tokens[:12]) for tokens in task.train.tolist()}) == 500
    assert int(task.train.max()) < task.vocabulary


def test_too_many_facts_are_refused() -> None:
    from tasks import TASKS

    with pytest.raises(ValueError, match="airports are more than the"):
        TASKS["airports"](10**6)


def test_costs_of_the_models() -> None:
    """Counted and modelled operations agree, and the models are as large as the comparison says."""
    from compared_models import MODELS, built
    from costs import costs
    from settings import Setting
    from tasks import TASKS

    task = TASKS["airports"](100)
    known = {}
    for model in MODELS:
        setting = Setting(model=model)
        known[model] = costs(setting, task, built(setting, task, "fused")[1])
    for name, cost in known.items():
        assert cost["modelled_flops"] == pytest.approx(cost["flops"], rel=0.02), name
    dense, memory = known["dense"], known["memory-plus"]
    assert dense["training_flops"] == pytest.approx(3 * dense["flops"])
    assert memory["flops"] < dense["flops"]
    assert 1.8 < known["dense-2x"]["flops"] / dense["flops"] < 2
    assert 1 < known["peer"]["parameters"] / memory["parameters"] < 1.15


@pytest.mark.parametrize("scale", ["d32", "d64"])
def test_the_mixture_has_the_fewest_experts_that_exceed_memory(scale: str) -> None:
    from compared_models import built, recipe
    from settings import Setting
    from tasks import TASKS

    def size(model: str) -> int:
        return sum(p.numel() for p in built(Setting(model=model, scale=scale), task, "dense")[0].parameters())

    task = TASKS["airports"](100)
    dense, mixture, memory = size("dense"), size("moe"), size("memory-plus")
    rule = recipe(Setting(model="moe", scale=scale), "dense")
    assert rule is not None
    one = (mixture - dense) / (rule["replace"][0]["options"]["experts"] - 1)  # an expert of every block, and of the routers
    assert mixture > memory > mixture - one


def test_every_study_has_valid_recipes() -> None:
    """Those of all its settings; studies that choose a rate get records with made-up numbers."""
    from compared_models import recipe
    from rules import RULES
    from settings import Setting
    from studies import STUDIES

    from memrewrite.recipes.schema import Recipe

    def made(settings: list[Setting], then: list[Setting] | None = None) -> list[dict[str, Any]]:
        return [{"bits": -abs(math.log(s.lr / 8e-3))} for s in settings]

    for name, study in STUDIES.items():
        settings = study.settings(made, 2)  # type: ignore[arg-type]
        assert {setting.seed for setting in settings} == {0, 1}, name
        for setting in settings:
            wanted = recipe(setting, RULES[setting.rule].gradient)
            if wanted is not None:
                Recipe.model_validate(wanted)


def test_the_rate_with_most_bits_is_chosen() -> None:
    from settings import Setting
    from studies import RATES, TUNING_SEED, tuned

    asked: list[Setting] = []

    def made(settings: list[Setting], then: list[Setting] | None = None) -> list[dict[str, Any]]:
        asked.extend(settings)
        best = {"dense": RATES[2], "pkm": RATES[0]}
        return [{"bits": float(s.lr == best[s.model])} for s in settings]

    chosen = tuned(made, ["dense", "pkm"], 3)  # type: ignore[arg-type]
    assert [chosen[model].lr for model in ("dense", "pkm")] == [RATES[2], RATES[0]]
    assert len(asked) == 2 * len(RATES)
    assert {setting.seed for setting in asked} == {TUNING_SEED}
    assert {setting.seed for setting in chosen.values()} == {0}


@pytest.mark.parametrize("fixed", [True, False])
def test_the_rate_of_tables_stays_after_the_warmup_or_decays_with_the_others(fixed: bool) -> None:
    from compared_models import built
    from rules import RULES, optimizers
    from settings import Setting
    from tasks import TASKS
    from train import _backward

    setting = Setting(**{**SMALL, "warmup": 2, "steps": 8, "fixed_values": fixed})
    task = TASKS[setting.task](setting.facts)
    model, _ = built(setting, task, RULES[setting.rule].gradient)
    optims = optimizers(setting, model)
    rates: dict[int, dict[str, float]] = {}
    for step in (1, 3, 7):
        _backward(model, optims, task.train[:4], task.answers, setting, step)
        rates[step] = {group["name"]: group["lr"] for optimizer in optims for group in optimizer.param_groups}
    course = {1: 0.5, 3: (1 + math.cos(math.pi / 4)) / 2, 7: (1 + math.cos(3 * math.pi / 4)) / 2}
    for step, factor in course.items():
        assert rates[step]["rest"] == pytest.approx(setting.lr * factor)
        tables = min(1, step / setting.warmup) if fixed else factor
        assert rates[step]["values"] == pytest.approx(setting.lr * setting.value_factor * tables)


def test_names_say_what_differs() -> None:
    from groups import grouped, named

    def names(*records: dict[str, Any]) -> list[str]:
        return [name for name, _ in named(grouped(list(records)))]

    assert names(record("dense"), record("dense", 1), record("memory-plus")) == ["dense", "memory-plus"]
    assert names(*(record("memory-plus", heads=heads) for heads in (2, 4))) == ["memory-plus", "memory-plus heads=4"]


def test_a_setting_has_a_file_of_its_own() -> None:
    """A finished run is taken for no other setting, whatever field differs."""
    from dataclasses import fields

    from settings import Setting

    plain = Setting()
    others = [plain.but(**{f.name: "other" if isinstance(f.default, str) else f.default + 1}) for f in fields(Setting)]
    assert len({setting.key for setting in [plain, *others]}) == 1 + len(fields(Setting))


def test_exposures_are_interpolated() -> None:
    from groups import Group

    # 25 % at step 10, 50 % at step 20; a step shows a tenth of the facts
    group = Group([record(recall=50.0), record(recall=20.0, seed=1)])
    assert group.exposures_to(50) == [2.0, None]
    assert group.exposures_to(40)[0] == pytest.approx(1.6)


def test_order_and_who_wins() -> None:
    from conclusions import baseline_wins, compared, order
    from groups import grouped

    records = [record("dense", seed, 10.0 + seed) for seed in range(3)]
    records += [record("pkm", seed, 11.0 + seed) for seed in range(3)]
    records += [record("memory-plus", seed, 30.0 + seed) for seed in range(3)]
    assert order(grouped(records)) == "Order of recall: dense ≈ pkm < memory-plus."
    assert "+20.0 points of recall, more than twice the standard error" in compared(grouped(records))[0]
    assert baseline_wins(grouped(records)) == ["No baseline wins by any of these measures."]
    worse = [record("dense", 0, 40.0), record("memory-plus", 0, 30.0)]
    assert baseline_wins(grouped(worse))[0] == "A baseline wins by recall %: dense 40, memory-plus 30."
    assert "one seed" in compared(grouped(worse))[0]


def test_models_are_compared_at_a_budget_that_all_have() -> None:
    from groups import grouped, of_one_budget
    from summary import summary

    records = [record(model, steps=steps) for model in ("dense", "pkm") for steps in (20, 40)] + [record("dense", steps=80)]
    assert [(g.setting.model, g.setting.steps) for g in of_one_budget(grouped(records))] == [("dense", 40), ("pkm", 40)]
    unfinished = [record("dense", steps=20), record("pkm", steps=40)]
    assert of_one_budget(grouped(unfinished)) == []
    assert "No budget" in summary(grouped(unfinished))


def test_the_order_of_the_paper() -> None:
    from conclusions import order, paper_order
    from groups import grouped

    def runs(model: str, recall: float) -> list[dict[str, Any]]:
        return [record(model, seed, recall + seed) for seed in range(3)]

    groups = grouped(runs("dense", 10.0) + runs("pkm", 20.0) + runs("peer", 30.0) + runs("memory-plus", 40.0))
    assert paper_order(groups) == [
        "The paper's dense < pkm holds.",
        "The paper's pkm ≈ peer does not hold: pkm < peer.",
        "The paper's pkm < memory-plus holds.",
        "The paper's peer < memory-plus holds.",
    ]
    one = grouped([record("dense", 0, 20.0), record("pkm", 0, 10.0)])
    assert order(one) == "Order of recall: pkm < dense. With one seed a difference may be chance."
    assert paper_order(one) == ["The paper's dense < pkm does not hold: dense > pkm."]


def test_the_arithmetic_that_dense_needs() -> None:
    """Recall grows by 10 for each doubling of dense; 32.5 is a quarter of the way from two to four times, on a log scale."""
    from conclusions import compute_ratios
    from groups import grouped

    dense = [record("dense", 0, recall, steps=steps) for steps, recall in ((20, 20.0), (40, 30.0), (80, 40.0))]
    memory = [record("memory-plus", 0, recall, steps=20) for recall in (32.5,)]
    times = f"{2 * 2**0.25:.2f} ×"
    assert compute_ratios(grouped(dense + memory)) == [
        f"Of the arithmetic of memory-plus steps=20, dense needs {times} for its recall and {times} for its bits."
    ]
    beyond = [record("memory-plus", 0, 90.0, steps=20)]
    assert "more than 4.00 × for its recall" in compute_ratios(grouped(dense + beyond))[0]
    below = [record("memory-plus", 0, 5.0, steps=40)]
    assert "less than 0.50 × for its recall" in compute_ratios(grouped(dense + below))[0]


def test_the_smoke_study_fails_if_learning_breaks() -> None:
    from studies import learning_broke

    dense, memory = record("dense", 0, 70.0), record("memory-plus", 0, 90.0)
    assert learning_broke([dense, memory]) == ""
    assert "the dense model learned 1.00" in learning_broke([record("dense", 0, 10.0), memory])
    assert "Memory+ learned 6.50" in learning_broke([dense, record("memory-plus", 0, 65.0)])
    unused = json.loads(json.dumps(memory))
    unused["usage"]["pools"][0]["share_read"] = 0.1
    assert "reads 10 % of its slots" in learning_broke([dense, unused])


def test_memory_learns_in_a_minute(tmp_path: Path) -> None:
    """The smoke study itself: it fails if training, initialization or the selection of slots breaks."""
    command = [sys.executable, str(FACTS), "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory-plus against dense: +" in done.stdout
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert [run["setting"]["model"] for run in found["runs"]] == ["dense", "memory-plus"]
    for plot in ("curves", "recall", "bits"):
        assert (tmp_path / f"smoke-airports-{plot}.png").stat().st_size > 10_000


def program(out: Path, *, kill_after: int | None = None) -> list[dict[str, Any]]:
    """Three small runs, one at a time, in a process group of their own; killed when that many are finished."""
    text = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from runs import Runs; "
        "from settings import Setting; settings = [Setting(seed=n, **json.loads(sys.argv[3])) for n in range(3)]; "
        "print(json.dumps(Runs(Path(sys.argv[2]), 1)(settings)))"
    )
    command = [sys.executable, "-c", text, str(FACTS), str(out), json.dumps(SMALL)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        if kill_after is None:
            said, errors = running.communicate()
            assert running.returncode == 0, errors
            return json.loads(said)  # type: ignore[no-any-return]
        while len(list(out.glob("*.run.json"))) < kill_after:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
    return []


def test_a_killed_study_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    program(killed, kill_after=1)
    kept = {file: file.stat().st_mtime_ns for file in killed.glob("*.run.json")}
    assert 1 <= len(kept) < 3
    again, expected = program(killed), program(whole)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    timed = {"ms": 0.0, "processor_seconds": 0.0}
    assert [run | timed for run in again] == [run | timed for run in expected]


def test_an_unfinished_study_does_not_pass(tmp_path: Path) -> None:
    command = [sys.executable, str(FACTS), "smoke", "--minutes", "0", "--no-plots", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "0 of 2 runs are finished; the same command goes on" in done.stderr


def test_no_run_begins_when_the_time_is_over(tmp_path: Path) -> None:
    from runs import Runs
    from settings import Setting

    assert Runs(tmp_path, 1, minutes=0)([Setting(**SMALL)]) == []
    assert not list(tmp_path.iterdir())


def test_after_an_interruption_no_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runs
    from settings import Setting

    begun: list[Setting] = []

    def trained(setting: Setting) -> str:
        begun.append(setting)
        time.sleep(0.1)
        return "{}"

    def interrupted(self: runs.Runs, settings: list[Setting]) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_in_its_own", trained)
    monkeypatch.setattr(runs.Runs, "_left", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.Runs(tmp_path, 1)([Setting(seed=seed) for seed in range(9)])
    assert len(begun) <= 2  # one was finished when the interruption came, and the next may have begun


def test_a_failed_run_is_named_and_ends_the_study(tmp_path: Path) -> None:
    from runs import Runs
    from settings import Setting

    broken, others = Setting(seed=7, rule="no such rule", **SMALL), [Setting(seed=seed, **SMALL) for seed in range(4)]
    with pytest.raises(SystemExit, match="seed=7"):
        Runs(tmp_path, 1)([broken, *others])
    assert len(list(tmp_path.glob("*.run.json"))) <= 1  # the one that had begun


def test_tables_have_a_row_for_each_model() -> None:
    from groups import grouped
    from tables import cost, learned, tuning, usage

    groups = grouped([record(model, seed) for seed in (0, 1) for model in ("dense", "memory-plus")])
    rows = learned(groups).splitlines()
    assert len(rows) == 4
    assert rows[3].startswith("| memory-plus | 4 |")
    assert all("±" in row for row in rows[2:])
    assert len(cost(groups).splitlines()) == 4
    assert usage(groups).splitlines()[2] == "| memory-plus | 75 | 0.50 | 25 | 16 |"
    tried = [record(lr=rate, recall=recall) for rate, recall in ((4e-3, 10.0), (8e-3, 20.0))]
    assert tuning(tried).splitlines()[-1] == "| dense | 1.00 | 2.00 |"
