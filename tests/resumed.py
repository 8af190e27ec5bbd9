"""Training that stops after three steps and goes on in another process: `python tests/resumed.py DIR` resumes every variant.

Each variant is saved as a user would: the model by `memrewrite.save`, everything else by one `torch.save`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from torch import nn

import memrewrite
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord

STEPS = 3


class Variant(NamedTuple):
    """How the table is trained: its gradient, its dtype, the rule of a fused one."""

    gradient: str
    dtype: str
    rule: Any = None


VARIANTS = {
    "dense": Variant("dense", "float32"),
    "dense bf16": Variant("dense", "bfloat16"),
    "sparse": Variant("sparse", "float32"),
    "fused Adagrad": Variant("fused", "float32", memrewrite.RowwiseAdagrad()),
    "fused Adagrad bf16": Variant("fused", "bfloat16", memrewrite.RowwiseAdagrad()),
    "fused Adagrad 8-bit": Variant("fused", "float8_e4m3fn", memrewrite.RowwiseAdagrad()),
    "fused Adam": Variant("fused", "float32", memrewrite.RowwiseAdam()),
    "fused Adam 8-bit": Variant("fused", "float8_e4m3fn", memrewrite.RowwiseAdam()),
    "fused lazy Adam": Variant("fused", "float32", memrewrite.LazyAdam()),
    "fused lazy Adam, 8-bit states": Variant("fused", "bfloat16", memrewrite.LazyAdam(states="float8_e4m3fn")),
    "fused lazy Adam, caught up": Variant("fused", "float32", memrewrite.LazyAdam(catch_up=True)),
}


class Run(NamedTuple):
    """A model in training with what moves it; `state` is everything but the model."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]

    def steps(self, count: int) -> Iterator[str]:
        """Train; the loss of each step, exactly. Batches and dropout use torch's global random numbers."""
        for _ in range(count):
            ids = torch.randint(0, tiny.VOCABULARY, (4, 7))
            logits = self.model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            for each in self.optimizers:
                each.zero_grad()
            loss.backward()
            if not any(p.grad is not None and p.grad.is_sparse for p in self.model.parameters()):
                memrewrite.clip_grad_norm_(self.model, 0.5, 0.01)
            for each in (*self.optimizers, *self.schedulers):
                each.step()
            yield loss.item().hex()

    @property
    def state(self) -> dict[str, Any]:
        parts = [each.state_dict() for each in (*self.optimizers, *self.schedulers)]
        return {"parts": parts, "rng": torch.get_rng_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        for each, saved in zip((*self.optimizers, *self.schedulers), state["parts"], strict=True):
            each.load_state_dict(saved)
        torch.set_rng_state(state["rng"])


def base() -> nn.Module:
    return tiny.modular(dropout=0.1)


@cache
def plan() -> Plan:
    """With dropout in the layers; computed once, since capturing takes most of the time."""
    options = {"heads": 2, "topk": 4, "dropout": 0.1, "query_dropout": 0.1, "qk_norm": True}
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "shared", "options": options}
    return memrewrite.plan(base(), tiny.recipe(replace=[rule]), {"ids": tiny.tokens()})


def rewritten(variant: Variant) -> nn.Module:
    how = {"gradient": variant.gradient, "dtype": variant.dtype}
    chosen = plan().model_copy(update={"pools": {"shared": plan().pools["shared"].model_copy(update=how)}})
    model = base()
    substitute(model, chosen).commit()
    pools_of(model).record = RewriteRecord(plan=chosen.model_dump_json())
    return model


def run_of(model: nn.Module, variant: Variant) -> Run:
    groups = memrewrite.param_groups(model.train(), 1e-2)
    if variant.gradient == "sparse":
        optimizers = [torch.optim.AdamW(groups[:1]), torch.optim.SparseAdam(groups[1]["params"], lr=groups[1]["lr"])]
        schedulers: list[Any] = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in optimizers]
    else:
        optimizers = [torch.optim.AdamW(groups)]
        if variant.rule is not None:
            memrewrite.fuse(optimizers[0], model, variant.rule)
        schedulers = [memrewrite.schedule(optimizers[0], lambda step: 0.5 ** (step // 2))]
    return Run(model, optimizers, schedulers)


def uninterrupted(variant: Variant) -> list[str]:
    torch.manual_seed(1)
    return list(run_of(rewritten(variant), variant).steps(2 * STEPS))


def first_half(variant: Variant, folder: Path) -> list[str]:
    """Three steps, then everything is saved."""
    torch.manual_seed(1)
    run = run_of(rewritten(variant), variant)
    losses = list(run.steps(STEPS))
    memrewrite.save(run.model, folder / "model")
    torch.save(run.state, folder / "training.pt")
    return losses


def second_half(variant: Variant, folder: Path) -> list[str]:
    run = run_of(memrewrite.load(folder / "model", base()), variant)
    run.load_state(torch.load(folder / "training.pt", weights_only=True))
    return list(run.steps(STEPS))


if __name__ == "__main__":
    print(json.dumps({name: second_half(variant, Path(sys.argv[1], name)) for name, variant in VARIANTS.items()}))
