"""The benchmark of facts: a run repeats bit for bit, a finished run is kept, and its tables and curves are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FACTS = Path(__file__).parents[2] / "benchmarks" / "facts"
SMALL = {"facts": 60, "batch": 16, "steps": 4}


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the benchmark can be imported."""
    monkeypatch.syspath_prepend(str(FACTS))


@pytest.mark.usefixtures("facts")
@pytest.mark.parametrize("rule", ["adamw", "sparse-adam", "lazy-adam", "rowwise-adagrad"])
def test_a_run_repeats_in_every_bit(rule: str) -> None:
    from settings import Setting
    from train import run

    first, second = (run(Setting(rule=rule, **SMALL)) for _ in range(2))
    timed = {"cpu_ms": 0.0}
    assert first | timed == second | timed
    assert [point[0] for point in first["curve"]] == [1, 2, 3, 4]
    assert first["state_bytes"] > 0
    assert first["usage"]["pools"][0]["reads"] == 3 * 60 * 5 * 16  # layers, facts, tokens, heads × topk
    assert all(rest > 0 and tables > 0 for _, rest, tables in first["norms"])


@pytest.mark.usefixtures("facts")
def test_what_is_learned() -> None:
    """Sixty facts fit in every model."""
    from settings import Setting
    from train import run

    done = run(Setting(facts=60, batch=60, steps=150, lr=1e-2))
    assert done["recall"] > 90
    assert done["curve"][0][1] < done["bits"] < 12  # the entropy of the answers of sixty facts


@pytest.mark.usefixtures("facts")
def test_entropy_of_the_answers() -> None:
    from task import airports

    facts = airports(4)
    assert facts.entropy <= 4  # at most log2(4) bits for each answer
    assert facts.tokens.shape == (4, 6)
    assert int(facts.tokens.max()) < facts.vocabulary


@pytest.mark.usefixtures("facts")
def test_the_table_has_a_row_for_each_setting() -> None:
    from settings import Setting
    from tables import table
    from train import run

    records = [run(Setting(seed=seed, model=model, **SMALL)) for model in ("dense", "peer") for seed in (0, 1)]
    lines = table(records).splitlines()
    assert len(lines) == 4
    assert [line.split()[1] for line in lines[2:]] == ["dense,", "peer,"]
    assert all("±" in line for line in lines[2:])


def test_finished_runs_are_kept(tmp_path: Path) -> None:
    """A study whose runs are all in the folder prints them and runs none."""
    sys.path.insert(0, str(FACTS))
    try:
        from studies import smoke
        from train import run
    finally:
        sys.path.remove(str(FACTS))
    for setting in smoke(1):
        record = run(type(setting)(**setting.to_json() | SMALL)) | {"setting": setting.to_json()}
        (tmp_path / f"{setting.key.replace(' ', '_')}.run.json").write_text(json.dumps(record))
    command = [sys.executable, str(FACTS), "smoke", "--seeds", "1", "--out", str(tmp_path), "--plot"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 4
    assert json.loads((tmp_path / "smoke.json").read_text())["runs"]
    assert (tmp_path / "smoke.png").stat().st_size > 10_000
