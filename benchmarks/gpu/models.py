"""The modules that the layer sections compare, and a training step for each.

A Memory+ layer with its table, and the SwiGLU MLP that it replaces, in bf16 on the device.
"""

from __future__ import annotations

import data as data
import torch
from harness import Bench, Run
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.layers.product_keys import ProductKeys
from memrewrite.layers.value_table import ValueTable

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
    """A Memory+ layer and its table, with the arithmetic and the names of `memrewrite.layers.memory_plus` but no recipe schema.

    The schema needs pydantic, which a GPU machine may not have; a test compares both layers bit for bit.
    """

    def __init__(self, dim: int, table: ValueTable, keys: ProductKeys) -> None:
        super().__init__()
        self.pool, self.product_keys = table, keys
        width, device, dtype = table.values.shape[1], table.values.device, keys.keys.dtype
        self.gate = nn.Linear(dim, width, device=device, dtype=dtype)
        self.value_proj = nn.Linear(width, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As in the layer of the package."""
        self.pool.reset_parameters()
        self.product_keys.reset_parameters()
        for linear in (self.gate, self.value_proj):
            nn.init.normal_(linear.weight, 0.0, linear.weight.shape[0] ** -0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> [T, d_model]."""
        slots, weights = self.product_keys(x, self.pool.backend)
        y = self.pool(slots, weights).to(x.dtype)
        out: Tensor = self.value_proj(y * F.silu(self.gate(x)))
        return out


def memory_layer(bench: Bench, dim: int, keys: int, *, gradient: str = "dense", dtype: str = "bfloat16") -> Memory:
    """A layer of width `dim` with a table of keys² × dim in `dtype`; the queries have half the width, as in the paper."""
    table = ValueTable(keys * keys, dim, dtype=getattr(torch, dtype), gradient=gradient, device=bench.device)
    sizes = {"heads": bench.sizes.heads, "topk": bench.sizes.topk, "key_dim": dim // 2}
    layer = Memory(dim, table, ProductKeys(dim, keys, **sizes, device=bench.device, dtype=DTYPE))
    layer.reset_parameters()
    return layer


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
