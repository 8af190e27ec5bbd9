"""What a model costs: parameters, floating-point operations (by torch's counter, and by our cost model) and bytes read."""

from __future__ import annotations

from compared_models import base, built
from settings import Json, Setting
from tasks.sequences import Sequences, loss_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memrewrite.plans import Plan

SEQUENCES = 64  # that the counter runs


def costs(setting: Setting, task: Sequences, plan: Plan | None) -> Json:
    """Costs per token of a sequence without its last token; a multiply-add counts as two operations.

    `plan` is that of the setting's recipe; None for the base itself.

    Returns:
        `parameters`; `flops`: of a forward, counted; `modelled_flops`: the same, by the cost model of a plan for the layers
        that a recipe substitutes; `training_flops`: of a forward and backward, counted (torch counts no lookups); `bytes_read`:
        of weights and table rows for one token that is decoded alone, by the cost model.
    """
    plain = base(setting, task.vocabulary)
    model, _ = built(setting.but(dtype=""), task, "dense")  # a gradient that is counted without an optimizer
    (modelled, _), (forward, training) = _counted(plain, task), _counted(model, task)
    read = sum(p.numel() * p.element_size() for p in plain.parameters())
    if plan is not None:
        before, after = plan.before(), plan.after()
        modelled += after.flops - before.flops
        read += after.bytes_read - before.bytes_read
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": forward,
        "modelled_flops": modelled,
        "training_flops": training,
        "bytes_read": read,
    }


def _counted(model: nn.Module, task: Sequences) -> tuple[float, float]:
    """Operations per token, in train mode: of a forward, and of a forward and backward."""
    tokens = task.train[:SEQUENCES]
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it has no formula for CPUs' fused attention
        loss = loss_of(model, tokens, task.answers)
        forward = counter.get_total_flops()
        loss.backward()
    per_token = tokens.numel() - len(tokens)
    return forward / per_token, counter.get_total_flops() / per_token
