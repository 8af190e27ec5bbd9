"""Some architectures of the zoo, if it is available, with all checks; and the zoo command, on a small zoo defined here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "benchmarks" / "zoo.py"
EVERY = 10  # architectures: under three minutes on two cores


def benchmark() -> ModuleType:
    """The command as a module; not imported by name, since the zoo has a file with the same name."""
    sys.path.insert(0, str(COMMAND.parent))
    try:
        spec = importlib.util.spec_from_file_location("benchmarks_zoo", COMMAND)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(COMMAND.parent))
    return module


BENCHMARK = benchmark()
THERE = (BENCHMARK.ZOO / "zoo.py").is_file()
NAMES = list(BENCHMARK.load(BENCHMARK.ZOO)[0].CASES)[::EVERY] if THERE and importlib.util.find_spec("transformers") else []


@pytest.mark.zoo
@pytest.mark.skipif(not NAMES, reason=f"no zoo in {BENCHMARK.ZOO}: set MEMREWRITE_ZOO to its folder, and install [hf]")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_every_mlp_is_found_and_every_check_passes(name: str) -> None:
    torch.set_num_threads(1)
    row = BENCHMARK.measure(*BENCHMARK.load(BENCHMARK.ZOO), name)
    assert not BENCHMARK.flaws(row)


# ------------------------------------------------------------------------------------------------ the command itself

MADE_UP = """
import os, time
from types import SimpleNamespace
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
    def forward(self, x):
        return x + self.mlp(self.norm(x))

def build():
    print("models may print")
    return nn.Sequential(Block(), Block()).eval(), (torch.randn(2, 3, 8),), {}

def raises():
    raise ValueError("no such config")

CASES = {name: SimpleNamespace(build=does, live=[1, 2]) for name, does in {
    "good": build, "dies": lambda: os._exit(3), "hangs": lambda: time.sleep(1000), "raises": raises, "missed": build,
}.items()}
"""
SCORE = """
RECIPE = {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [{"where": {"all": True}, "with": "memory_plus", "pool": "w",
          "placement": "parallel", "options": {"heads": 2, "topk": 4}}]}

def locate(case, memrewrite):
    model, args, kwargs = case.build()
    found = len(memrewrite.inspect(model, (args, kwargs)).sites)
    import zoo
    missed = ["1.mlp"] if case is zoo.CASES["missed"] else []
    return dict(found=found - len(missed), missed=missed, partial=[], invented=[], truth=2)

def surgery(case, memrewrite):
    model, args, kwargs = case.build()
    memrewrite.inspect(model, (args, kwargs))
    memrewrite.apply(model, RECIPE, (args, kwargs))
    return "bit-equal"
"""


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    folder = tmp_path / "made up"
    folder.mkdir()
    (folder / "zoo.py").write_text(MADE_UP)
    (folder / "score.py").write_text(SCORE)
    return folder


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MEMREWRITE_ZOO"}
    command = [sys.executable, str(COMMAND), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_results_are_shown_and_written(made_up: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "zoo.md"
    done = run("good", "--zoo", made_up, "--json", out, "--table", page)
    assert done.returncode == 0, done.stderr
    assert "good" in done.stdout
    written = json.loads(out.read_text())
    (row,) = written["rows"]
    assert (row["found"], row["truth"], row["bindings"], row["surgery"]) == (2, 2, {"module": 2}, "bit-equal")
    assert {name: outcome for name, (outcome, _) in row["checks"].items()}["null_train"] == "passed"
    assert written["total"]["recall"] == written["total"]["precision"] == 1
    assert "| good | whole | 2 / 2 | 2 module | bit-equal | bit-equal |" in page.read_text()
    assert "not to be edited by hand" in page.read_text()
    assert torch.__version__ in page.read_text()


def test_an_architecture_that_dies_hangs_or_raises_is_one_failed_row(made_up: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--zoo", made_up, "--json", out, "--jobs", 1, "--timeout", 30)
    assert done.returncode == 1
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["good", "dies", "hangs", "raises", "missed"]
    assert "died with exit code 3" in rows["dies"]["error"]
    assert "more than 30 s" in rows["hangs"]["error"]
    assert "ValueError: no such config" in rows["raises"]["error"]
    assert rows["missed"]["missed"] == ["1.mlp"]
    assert json.loads(out.read_text())["total"]["wrong"] == ["dies", "hangs", "raises", "missed"]
    assert "error" not in rows["good"]


def test_every_nth_is_measured(made_up: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run("--names", "good", "raises", "raises", "--every", 2, "--zoo", made_up, "--json", out)
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["good", "raises"]


def test_a_missing_zoo_and_unknown_names_are_reported(made_up: Path, tmp_path: Path) -> None:
    done = run("--zoo", tmp_path / "nowhere")
    assert done.returncode != 0
    assert "no zoo" in done.stderr
    assert "--zoo" in done.stderr
    done = run("unknown_name", "--zoo", made_up)
    assert done.returncode != 0
    assert "unknown_name" in done.stderr
