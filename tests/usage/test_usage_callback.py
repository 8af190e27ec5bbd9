"""`memrewrite.UsageCallback` in real runs of the Trainer: what is counted, what is logged, and what TensorBoard reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

import memrewrite
from memrewrite.errors import ModelError, UserError
from memrewrite.layers.contract import MemoryLayer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
TOKENS, BATCH = 6, 2  # of an example; of a micro-batch
NAME = "memory/model.layers.1.mlp/share_read"


def examples(count: int) -> list[dict[str, Any]]:
    ids = tiny.tokens(count, TOKENS)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, model: Any, **options: Any) -> Any:
    given = {"max_steps": 6, "logging_steps": 2, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, **options}
    arguments = transformers.TrainingArguments(folder, use_cpu=True, per_device_train_batch_size=BATCH, seed=0, **given)
    return transformers.Trainer(model, arguments, train_dataset=examples(12), eval_dataset=examples(4))


def logged(run: Any) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if NAME in entry]


def test_what_is_logged_is_what_the_steps_read(tmp_path: Path) -> None:
    """Against a count of the same run by `watch`, which counts everything from begin to end."""
    model, _ = tiny.rewritten("llama")
    run = trainer(tmp_path, model)
    callback = memrewrite.UsageCallback(run.log, every=6)
    run.add_callback(callback)
    run.train()
    again, _ = tiny.rewritten("llama")
    with memrewrite.watch(again) as usage:
        trainer(tmp_path, again).train()
    (entry,) = logged(run)
    assert entry["step"] == 6
    assert usage.statistics().layers[0].tokens == 6 * BATCH * TOKENS
    assert {name: value for name, value in entry.items() if name.startswith("memory/")} == usage.scalars()


def test_losses_are_still_logged_at_every_step_that_is_due(tmp_path: Path) -> None:
    model, _ = tiny.rewritten("llama")
    run = trainer(tmp_path, model)
    run.add_callback(memrewrite.UsageCallback(run.log, every=2))
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in logged(run)] == [2, 4, 6]


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"eval_strategy": "steps", "eval_steps": 1}], ids=str)
def test_micro_batches_count_and_evaluation_does_not(tmp_path: Path, options: dict[str, Any]) -> None:
    model, _ = tiny.rewritten("llama")
    run, tokens = trainer(tmp_path, model, **options), []
    run.add_callback(
        memrewrite.UsageCallback(lambda scalars: tokens.append(scalars["memory/model.layers.1.mlp/tokens"]), every=2)
    )
    run.train()
    assert tokens == [2 * BATCH * TOKENS * options.get("gradient_accumulation_steps", 1)] * 3


def test_nothing_is_left_after_training_and_after_an_error(tmp_path: Path) -> None:
    model, _ = tiny.rewritten("llama")
    run = trainer(tmp_path, model)
    run.add_callback(memrewrite.UsageCallback(run.log, every=100))
    run.train()
    assert all(m.counter is None for m in model.modules() if isinstance(m, MemoryLayer))
    handle = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    handle.remove()
    run.train()
    assert all(m.counter is None for m in model.modules() if isinstance(m, MemoryLayer))


def test_tensorboard_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, _ = tiny.rewritten("llama")
    run = trainer(tmp_path, model, report_to=["tensorboard"])
    run.add_callback(memrewrite.UsageCallback(run.log, every=3))
    run.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    read = [(event.step, event.value) for event in events.Scalars(f"train/{NAME}")]
    assert [step for step, _ in read] == [3, 6]
    assert [value for _, value in read] == pytest.approx([entry[NAME] for entry in logged(run)])
    assert "train/memory/shared/overlap" in events.Tags()["scalars"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every=0"):
        memrewrite.UsageCallback(print, every=0)
    run = trainer(tmp_path, tiny.llama())
    run.add_callback(memrewrite.UsageCallback(run.log))
    with pytest.raises(ModelError, match="no memory layers"):
        run.train()
