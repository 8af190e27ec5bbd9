"""The modules that the layer sections compare, and a training step for each.

A Memory+ layer with its pool, and the SwiGLU MLP that it replaces, in bf16 on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import data as data
import torch
from harness import Bench, Run
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from memrewrite.layers.memory_plus import MemoryPlus
    from memrewrite.layers.pool import Pool

DTYPE = torch.bfloat16


class SwiGLU(nn.Module):
    """The dense MLP of a Llama block: `W_down(silu(W_gate x) ⊙ W_up x)`, no biases."""

    def __init__(self, d_model: int, d_hidden: int, device: torch.device) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d_model, d_hidden, bias=False, device=device, dtype=DTYPE) for _ in range(2))
        self.down = nn.Linear(d_hidden, d_model, bias=False, device=device, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> [T, d_model]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Memory(nn.Module):
    """A Memory+ layer and its pool, as children of one model."""

    def __init__(self, layer: MemoryPlus, pool: Pool) -> None:
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> [T, d_model]."""
        out: Tensor = self.layer(x)
        return out


def memory_layer(bench: Bench, dim: int, keys: int, **spec: Any) -> Memory:
    """A layer of width `dim` with a pool of keys² × dim; `spec` has further fields of the PoolSpec (gradient, dtype)."""
    from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
    from memrewrite.layers.pool import Pool, PoolSpec

    pool = Pool(PoolSpec(keys=keys, value_dim=dim, **spec), device=bench.device, dtype=DTYPE)
    pool.reset_parameters()
    options = MemoryPlusOptions(heads=bench.sizes.heads, topk=bench.sizes.topk)
    layer = MemoryPlus(dim, dim, options, pool, device=bench.device, dtype=DTYPE)
    layer.reset_parameters()
    return Memory(layer, pool)


def optimizer_step(bench: Bench, model: nn.Module, x: Tensor, rule: str | None = None, compiled: bool = False) -> Run:
    """Forward, backward and optimizer as a run: AdamW(fused=True), and for a fused table the update by `rule`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    if rule is not None:
        from memrewrite.fused import RowwiseAdagrad, RowwiseAdam, fuse

        fuse(optimizer, model, {"adagrad": RowwiseAdagrad, "adam": RowwiseAdam}[rule]())
    forward = bench.compile(model) if compiled else model
    leaf = x.clone().requires_grad_()
    grad = data.normal(*x.shape, dtype=x.dtype, device=x.device, seed=8)

    def run() -> None:
        forward(leaf).backward(grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        leaf.grad = None

    return run
