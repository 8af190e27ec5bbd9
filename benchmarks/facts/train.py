"""Trains one model on facts and measures what it knows: one setting in, one record of plain data out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from compared_models import built
from rules import RULES, optimizers, state_bytes
from settings import Json, Setting
from task import ANSWERS, Facts, airports
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import memrewrite
from memrewrite.layers.pool import Pool
from memrewrite.training import VALUES

POINTS = 9  # of a learning curve
PIECE = 2500  # facts per evaluation call


def run(setting: Setting) -> Json:
    """Train and evaluate one model; deterministic on the CPU for one number of threads.

    Returns:
        `setting`; `recall` (percent of facts whose two answers are both the most probable ones), `bits` (per fact: the entropy
        of the answers minus the model's negative log-likelihood); `curve`: [step, bits, recall]; `norms`: gradient norms
        [step, rest, tables]; `parameters`; `state_bytes` of the tables' optimizer; `cpu_ms` per step, evaluation not counted;
        `usage` of the tables, or None.
    """
    facts = airports(setting.facts)
    model = built(setting, facts, RULES[setting.rule].gradient)
    optims = optimizers(setting, model)
    torch.manual_seed(setting.seed)
    curve: list[list[float]] = []
    norms: list[list[float]] = []
    seconds = 0.0
    every = max(1, setting.steps // POINTS)
    model.train()
    for step, batch in enumerate(_batches(facts, setting), 1):
        begun = time.process_time()
        _step(model, optims, batch, setting, step)
        shown = step % every == 0 or step == setting.steps
        if setting.clip or shown:
            norm = memrewrite.clip_grad_norm_(model, setting.clip or math.inf)
        for optimizer in optims:
            optimizer.step()
        seconds += time.process_time() - begun
        if shown:
            norms.append([step, *map(float, norm)])
            curve.append([step, *evaluate(model, facts)])
    _, bits, recall = curve[-1]
    return {
        "setting": setting.to_json(),
        "recall": recall,
        "bits": bits,
        "curve": curve,
        "norms": norms,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": state_bytes(optims),
        "cpu_ms": 1000 * seconds / setting.steps,
        "usage": _usage(model, facts),
    }


def _batches(facts: Facts, setting: Setting) -> Iterator[Tensor]:
    """`steps` batches of tokens; every fact is seen once before one is seen again."""
    generator = torch.Generator().manual_seed(setting.seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(setting.steps):
        while len(waiting) < setting.batch:
            waiting = torch.cat([waiting, torch.randperm(len(facts.tokens), generator=generator)])
        chosen, waiting = waiting[: setting.batch], waiting[setting.batch :]
        yield facts.tokens[chosen]


def _step(model: nn.Module, optims: list[Optimizer], tokens: Tensor, setting: Setting, step: int) -> None:
    """One step of training, up to the optimizers' own."""
    for optimizer in optims:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial * _factor(step, setting, fixed=setting.fixed_values and group["name"] == VALUES)
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=ANSWERS).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, -ANSWERS:].flatten()).backward()


def _factor(step: int, setting: Setting, *, fixed: bool) -> float:
    """What the rates are multiplied by at a step, counted from 1: warm-up, then cosine to zero."""
    warm = min(1.0, step / setting.warmup)
    return warm if fixed else warm * (1 + math.cos(math.pi * (step - 1) / setting.steps)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, facts: Facts) -> tuple[float, float]:
    """Bits per fact, and recall in percent."""
    was, right, nats = model.training, 0, 0.0
    model.eval()
    for inputs, answers in zip(facts.inputs.split(PIECE), facts.answers.split(PIECE), strict=True):
        logits = model(input_ids=inputs, logits_to_keep=ANSWERS).logits
        nats += float(F.cross_entropy(logits.flatten(0, 1).double(), answers.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == answers).all(-1).sum())
    model.train(was)
    return facts.entropy - nats / len(facts.tokens) / math.log(2), 100 * right / len(facts.tokens)


def _usage(model: nn.Module, facts: Facts) -> Json | None:
    """How the layers read their tables while they answer all facts."""
    if not any(isinstance(module, Pool) for module in model.modules()):
        return None
    with memrewrite.watch(model) as usage:
        evaluate(model, facts)
    return usage.statistics().model_dump(mode="json")
