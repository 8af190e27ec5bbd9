"""The shared value table: what it is to be (`PoolSpec`), the module that holds it, and the root's container of pools.

A `PoolSpec` is in the plan; a `Pool` is built from it; `Pools` hangs once at the model's root as `model.memory`.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from memrewrite.cost import Cost
from memrewrite.errors import UserError
from memrewrite.frozen import Frozen
from memrewrite.kernels import ops, rounding
from memrewrite.kernels.pending import Pending
from memrewrite.kernels.torch_reads import in_pieces
from memrewrite.record import RewriteRecord
from memrewrite.site import itemsize_of

FP8 = "float8_e4m3fn"

ValueType = Literal["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"]
Gradient = Annotated[
    Literal["dense", "sparse", "fused"],
    Field(
        description="How the table learns: 'dense' is a gradient like any parameter's; 'sparse' holds only the rows that "
        "were read, for optimizers that take it; 'fused' makes none: `memrewrite.fuse` updates the rows in the step."
    ),
]
Backend = Annotated[
    Literal["auto", "triton", "torch"],
    Field(description="Which kernels read the table: 'auto' takes the fastest that can, and logs which and why."),
]


def needs_fused(dtype: str | None, gradient: str) -> bool:
    """Whether a table of this type cannot learn in this way: 8 bits are too few for gradients."""
    return dtype == FP8 and gradient != "fused"


class PoolSpec(Frozen):
    """A value table V of eq. (1): `keys`² slots, each `value_dim` wide."""

    keys: int = Field(gt=0, description="Keys per half; the pool has keys × keys slots.")
    value_dim: int = Field(gt=0, description="Width of one value.")
    init: Literal["paper"] = Field(default="paper", description="How values start: 'paper' is N(0, value_dim^-1/2).")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the initial values.")
    dtype: ValueType | None = Field(
        default=None, description="Type of the stored values; left out: the type the pool is built with."
    )
    gradient: Gradient = "dense"
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _can_learn(self) -> PoolSpec:
        if needs_fused(self.dtype, self.gradient):
            raise ValueError(f"a table of {self.dtype} learns by fused updates alone: gradient='fused'")
        return self

    @property
    def slots(self) -> int:
        """Rows of the table: keys²."""
        return self.keys**2

    def cost(self) -> Cost:
        """What the table stores, at float32 where the spec names no dtype. What layers read of it, the layers count."""
        parameters = self.slots * self.value_dim
        scales = 4 * self.slots if self.dtype == FP8 else 0
        return Cost(parameters=parameters, parameter_bytes=parameters * itemsize_of(self.dtype or "float32") + scales)


class Pool(nn.Module):
    """A value table shared by memory layers; calling it is the lookup.

    Its one parameter is `values` [keys², value_dim]. Layers call the pool and never touch `values`, so that hooks on
    this module (FSDP2's unshard, offloading, quantisation) always fire. Built uninitialised, directly on `device` in
    the spec's dtype (else `dtype`): call `reset_parameters` or load a checkpoint. A table of 8 bits has a buffer `scale`
    [keys²], one fp32 number a row. With gradient "fused" `pending` holds what the next optimizer step has to do.
    """

    scale: Tensor | None

    def __init__(self, spec: PoolSpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec = spec
        stored = dtype if spec.dtype is None else getattr(torch, spec.dtype)
        self.values = nn.Parameter(torch.empty(spec.slots, spec.value_dim, device=device, dtype=stored))  # [N, d_v]
        scale = torch.empty(spec.slots, device=device, dtype=torch.float32) if spec.dtype == FP8 else None
        self.register_buffer("scale", scale)
        self.pending = Pending() if spec.gradient == "fused" else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw N(0, d_v^-1/2) in place, as the paper does; a no-op on meta.

        Without a `generator` the values follow from the spec's seed alone (for one device type, dtype and shape).
        """
        if self.values.is_meta:
            return
        if generator is None:
            generator = torch.Generator(self.values.device).manual_seed(self.spec.seed)
        spread = self.spec.value_dim**-0.5
        with torch.no_grad():
            if self.scale is None:
                self.values.normal_(0.0, spread, generator=generator)
                return
            for values, scale in in_pieces(self.spec.value_dim, self.values, self.scale):
                drawn = torch.empty(values.shape, device=values.device).normal_(0.0, spread, generator=generator)
                scale.copy_(rounding.row_scale(drawn))
                values.copy_(drawn / scale.unsqueeze(-1))

    def forward(self, indices: Tensor, weights: Tensor) -> Tensor:
        """`y_t = sum_j weights[t, j] * values[indices[t, j]]`: [T, K], [T, K] -> [T, d_v].

        In the dtype of the values, which the weights are rounded to; of a table of 8 bits, in the dtype of the weights.
        """
        weights = weights if self.scale is not None else weights.to(self.values.dtype)
        learns = torch.is_grad_enabled()  # else: how, is nobody's business, and no exported graph's
        return ops.sparse_lookup(
            self.values,
            indices,
            weights,
            self.scale,
            gradient=self.spec.gradient if learns else "dense",
            backend=self.spec.backend,
            pending=self.pending if learns else None,
        )

    def extra_repr(self) -> str:
        """Slots and width, for `print(model)`."""
        how = "" if self.spec.gradient == "dense" else f", gradient={self.spec.gradient!r}"
        return f"slots={self.spec.keys}², value_dim={self.spec.value_dim}, dtype={self.values.dtype}{how}"


class Pools(nn.Module):
    """The pools of a model by name, each a child module; hangs at the model's root as `model.memory`.

    Raises `UserError` for a name that cannot be an attribute of a module.
    """

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        super().__init__()
        self.record: RewriteRecord | None = None  # of the rewrite that added the pools
        for name, pool in pools.items():
            plain = name.isascii() and name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)
            if not plain or hasattr(self, name):
                raise UserError(
                    f"a pool cannot be named {name!r}",
                    hint="use letters, digits and _, and no name that torch modules use for something else",
                )
            self.add_module(name, pool)

    def forward(self, x: Any) -> Any:
        """What it is given: a root that calls every child it has, as `nn.Sequential` does, calls this one too."""
        return x

    def __getitem__(self, name: str) -> Pool:
        pool = self._modules.get(name)
        if not isinstance(pool, Pool):
            raise KeyError(name)
        return pool


def record_of(model: nn.Module) -> RewriteRecord | None:
    """What a model records about its rewrite; None for a model that was not rewritten by `memrewrite.apply` or loaded."""
    pools = next((module for module in model.modules() if isinstance(module, Pools)), None)
    return None if pools is None else pools.record
