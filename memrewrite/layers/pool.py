"""The shared value table of a recipe: its specification, its module, and the container of all pools of a model.

A `PoolSpec` is in the plan; a `Pool` is built from it; `Pools` is registered once on the root module as `model.memory`.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from memrewrite.cost import Cost
from memrewrite.errors import UserError
from memrewrite.frozen import Frozen
from memrewrite.layers.value_table import ValueTable
from memrewrite.record import RewriteRecord
from memrewrite.site import itemsize_of

FP8 = "float8_e4m3fn"

ValueType = Literal["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"]
Gradient = Annotated[
    Literal["dense", "sparse", "fused"],
    Field(
        description="How the table is trained: 'dense': a gradient of the whole table; 'sparse': a COO gradient of the rows "
        "that were read, for optimizers that accept it; 'fused': no gradient: with `memrewrite.fuse` the optimizer step "
        "updates the rows that were read."
    ),
]
Backend = Annotated[
    Literal["auto", "triton", "native", "torch"],
    Field(description="Which kernels read the table: 'auto' selects the fastest that supports the call, and logs the choice."),
]


def needs_fused(dtype: str | None, gradient: str) -> bool:
    """True if a table of this dtype can be trained only by fused updates, and `gradient` is another: 8-bit tables."""
    return dtype == FP8 and gradient != "fused"


class PoolSpec(Frozen):
    """A value table V [keys², value_dim] of eq. (1) of arXiv 2412.09764.

    Attributes:
        keys: Keys per half (√N); the table has keys² = N slots.
        value_dim: Width of one value (d_v).
        init: Initialization: "paper" is N(0, value_dim^-1/2).
        seed: Seed of the initial values.
        dtype: Dtype of the stored values. None: the dtype that the pool is built with.
        gradient: How the table is trained: "dense", "sparse" or "fused".
        backend: Kernels that read it: "auto", "triton", "native" or "torch".

    Raises:
        pydantic.ValidationError: For sizes below 1, and for an 8-bit table whose gradient is not "fused".
    """

    keys: int = Field(gt=0, description="Keys per half; the pool has keys × keys slots.")
    value_dim: int = Field(gt=0, description="Width of one value.")
    init: Literal["paper"] = Field(default="paper", description="Initialization of the values: 'paper': N(0, value_dim^-1/2).")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the initial values.")
    dtype: ValueType | None = Field(
        default=None, description="Dtype of the stored values. Default: the dtype that the pool is built with."
    )
    gradient: Gradient = "dense"
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _can_learn(self) -> PoolSpec:
        if needs_fused(self.dtype, self.gradient):
            raise ValueError(f"a table of {self.dtype} can be trained only by fused updates: gradient='fused'")
        return self

    @property
    def slots(self) -> int:
        """Number of rows of the table: keys²."""
        return self.keys**2

    def cost(self) -> Cost:
        """Parameters and bytes of the table (float32 where the spec has no dtype). Reads are in the cost of the layers."""
        parameters = self.slots * self.value_dim
        scales = 4 * self.slots if self.dtype == FP8 else 0
        return Cost(parameters=parameters, parameter_bytes=parameters * itemsize_of(self.dtype or "float32") + scales)


class Pool(ValueTable):
    """The value table of a recipe's pool, shared by memory layers: a `ValueTable` of keys² rows with its specification.

    Args:
        spec: Size, dtype and training of the table.
        device: Device of the table.
        dtype: Dtype of the table if the spec has none.
    """

    def __init__(self, spec: PoolSpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        stored = dtype if spec.dtype is None else getattr(torch, spec.dtype)
        super().__init__(
            spec.slots,
            spec.value_dim,
            dtype=stored,
            gradient=spec.gradient,
            backend=spec.backend,
            seed=spec.seed,
            device=device,
        )
        self.spec = spec

    @torch.no_grad()
    def scale_values_(self, factor: float) -> None:
        """Multiply all values by `factor`, in place; of an 8-bit table, the scales of the rows."""
        (self.values if self.scale is None else self.scale).mul_(factor)

    def extra_repr(self) -> str:
        """Slots and width, for `print(model)`."""
        how = "" if self.spec.gradient == "dense" else f", gradient={self.spec.gradient!r}"
        return f"slots={self.spec.keys}², value_dim={self.spec.value_dim}, dtype={self.values.dtype}{how}"


class Pools(nn.Module):
    """The pools of a model, each a child module by its name; registered on the root module as `model.memory`.

    Raises:
        UserError: A name cannot be an attribute of a module.
    """

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        super().__init__()
        self.record: RewriteRecord | None = None  # of the rewrite that added the pools
        for name, pool in pools.items():
            plain = name.isascii() and name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)
            if not plain or hasattr(self, name):
                raise UserError(
                    f"a pool cannot be named {name!r}",
                    hint="use letters, digits and _, and no attribute name of torch modules",
                )
            self.add_module(name, pool)

    def forward(self, x: Any) -> Any:
        """Return `x` unchanged: a root that calls all its children, such as `nn.Sequential`, calls this module too."""
        return x

    def __getitem__(self, name: str) -> Pool:
        pool = self._modules.get(name)
        if not isinstance(pool, Pool):
            raise KeyError(name)
        return pool


def find_pools(model: nn.Module) -> Pools | None:
    """The pools of a rewritten model; None for a model that was not rewritten."""
    return next((module for module in model.modules() if isinstance(module, Pools)), None)


def record_of(model: nn.Module) -> RewriteRecord | None:
    """What a model records about its rewrite; None for a model that was not rewritten by `memrewrite.apply` or loaded."""
    pools = find_pools(model)
    return None if pools is None else pools.record
