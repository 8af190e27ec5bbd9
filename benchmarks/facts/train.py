"""Trains one model on facts and measures what it knows: one setting in, one record of plain data out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from compared_models import built
from costs import costs
from rules import RULES, optimizers, state_bytes
from settings import Json, Setting
from tasks import TASKS
from tasks.sequences import Sequences, loss_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import memrewrite
from memrewrite.layers.pool import Pool
from memrewrite.training import VALUES

POINTS = 9  # of a learning curve
PIECE = 2500  # sequences per evaluation call
SAMPLE = 4000  # sequences at most that are asked for at a point of the curve; at the end all are


def run(setting: Setting) -> Json:
    """Train and evaluate one model; deterministic on the CPU for one number of threads.

    Returns:
        `setting`; `recall`: percent of the test sequences whose answers are all the most probable ones; `bits` per test
        sequence: the entropy of the answers minus the model's negative log-likelihood; that `entropy`; the number of `tests`;
        `tokens` that the model computes for a sequence; `curve`: [step, bits, recall]; `norms`: gradient norms [step, rest,
        tables]; `costs`: see there; `state_bytes` of the tables' optimizer; `ms` per step without evaluation: processor time on
        CPUs, else time; `usage` of the tables, or None.
    """
    task = TASKS[setting.task](setting.facts)
    model, plan = built(setting, task, RULES[setting.rule].gradient)
    known = costs(setting, task, plan)
    model, task = model.to(setting.device), task.to(setting.device)
    optims = optimizers(setting, model)
    torch.manual_seed(setting.seed)
    curve: list[list[float]] = []
    norms: list[list[float]] = []
    seconds = 0.0
    every = max(1, setting.steps // POINTS)
    sample = task.test[:: max(1, len(task.test) // SAMPLE)]
    model.train()
    for step, batch in enumerate(_batches(task, setting), 1):
        begun = _now(setting.device)
        _backward(model, optims, batch, task.answers, setting, step)
        shown = step % every == 0 or step == setting.steps
        if setting.clip or shown:
            norm = memrewrite.clip_grad_norm_(model, setting.clip or math.inf)
        for optimizer in optims:
            optimizer.step()
        seconds += _now(setting.device) - begun
        if shown:
            norms.append([step, *map(float, norm)])
        if shown and step < setting.steps:
            curve.append([step, *evaluate(model, task, sample)])
    usage, last = _at_the_end(model, task)
    curve.append([setting.steps, *last])
    _, bits, recall = curve[-1]
    return {
        "setting": setting.to_json(),
        "recall": recall,
        "bits": bits,
        "entropy": task.entropy,
        "tests": len(task.test),
        "tokens": task.train.shape[1] - 1,
        "curve": curve,
        "norms": norms,
        "costs": known,
        "state_bytes": state_bytes(optims),
        "ms": 1000 * seconds / setting.steps,
        "usage": usage,
    }


def _now(device: str) -> float:
    """Seconds of the work that was asked for so far."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _batches(task: Sequences, setting: Setting) -> Iterator[Tensor]:
    """`steps` batches of tokens; every sequence is seen once before one is seen again."""
    generator = torch.Generator().manual_seed(setting.seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(setting.steps):
        while len(waiting) < setting.batch:
            waiting = torch.cat([waiting, torch.randperm(len(task.train), generator=generator)])
        chosen, waiting = waiting[: setting.batch], waiting[setting.batch :]
        yield task.train[chosen.to(setting.device)]


def _backward(model: nn.Module, optims: list[Optimizer], tokens: Tensor, answers: int, setting: Setting, step: int) -> None:
    """One step of training, up to the optimizers' own."""
    for optimizer in optims:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial * _factor(step, setting, fixed=setting.fixed_values and group["name"] == VALUES)
    with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device == "cuda"):
        loss = loss_of(model, tokens, answers)
    loss.backward()


def _factor(step: int, setting: Setting, *, fixed: bool) -> float:
    """What the rates are multiplied by at a step, counted from 1: warm-up, then cosine to zero."""
    warm = min(1.0, step / setting.warmup)
    return warm if fixed else warm * (1 + math.cos(math.pi * (step - 1) / setting.steps)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, task: Sequences, asked: Tensor) -> tuple[float, float]:
    """Bits per sequence of `asked` [G, L], and recall in percent."""
    was, right, nats = model.training, 0, 0.0
    model.eval()
    for tokens in asked.split(PIECE):
        logits, answers = model(input_ids=tokens[:, :-1], logits_to_keep=task.answers).logits, tokens[:, -task.answers :]
        nats += float(F.cross_entropy(logits.flatten(0, 1).double(), answers.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == answers).all(-1).sum())
    model.train(was)
    return task.entropy - nats / len(asked) / math.log(2), 100 * right / len(asked)


def _at_the_end(model: nn.Module, task: Sequences) -> tuple[Json | None, tuple[float, float]]:
    """How the layers read their tables while they answer all test sequences, None without tables; and `evaluate` of these."""
    if not any(isinstance(module, Pool) for module in model.modules()):
        return None, evaluate(model, task, task.test)
    with memrewrite.watch(model) as usage:
        last = evaluate(model, task, task.test)
    return usage.statistics().model_dump(mode="json"), last
