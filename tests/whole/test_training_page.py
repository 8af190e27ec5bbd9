"""The scripts of the page on training run as printed: they learn, and what they save goes on where it stopped."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "training.md"
SCRIPTS = dict(
    re.findall(r"^```python title=\"([^\"]+)\"\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs a script of the page in a folder that contains all of them; returns its globals."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:  # one process has one state, with one kind of mixed precision
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        sys.modules.pop("model", None)

    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reset()
    yield lambda name: runpy.run_path(name, run_name="script")
    reset()


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(model: torch.nn.Module, other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, other[name])]


def test_every_script_is_run_here() -> None:
    assert set(SCRIPTS) == {"model.py", "train.py", "resume.py", "trainer.py", "accelerated.py"}


def test_the_loop_learns_and_goes_on(run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    trained = run("train.py")["model"]
    learned = losses(capsys.readouterr().out)
    assert len(learned) == 3
    assert learned[-1] < learned[0] - 0.5
    resumed = run("resume.py")
    assert not differing(resumed["model"], trained.state_dict())
    printed = capsys.readouterr().out
    assert printed.startswith("step 30: ")
    assert losses(printed)[0] < learned[-1] + 0.2


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_trainer_learns_and_resumes_bit_for_bit(run: Callable[[str], dict[str, Any]]) -> None:
    """Weights, state of the fused table, schedule, order of the data: after 20 steps all is as without the interruption."""
    make = run("trainer.py")["trainer"]
    straight = make()
    straight.train()
    logged = [entry for entry in straight.state.log_history if "train_loss" in entry]
    assert logged[0]["train_loss"] < 4.1  # log(64) = 4.16 at the start
    resumed = make()
    resumed.train(resume_from_checkpoint="run/checkpoint-10")
    assert resumed.state.global_step == 20
    assert not differing(resumed.model, straight.model.state_dict())
    states = [each.optimizer.state[each.model.memory.facts.values] for each in (straight, resumed)]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_accelerate_learns_and_its_state_is_restored(
    run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    script = run("accelerated.py")
    learned = losses(capsys.readouterr().out)
    assert learned[-1] < learned[0] - 0.3
    model, optimizer = script["accelerator"].unwrap_model(script["model"]), script["optimizer"]
    values = model.memory.facts.values
    before, states = bits(model), {key: value.clone() for key, value in optimizer.state[values].items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for value in optimizer.state[values].values():
        value.zero_()
    script["accelerator"].load_state("state")
    assert not differing(model, before)
    assert all(torch.equal(optimizer.state[values][key], value) for key, value in states.items())
