"""The shared tables of a recipe: their specification, their module, and the container of all pools of a model.

A `PoolSpec` is in the plan; a `Pool` is built from it; `Pools` is registered once on the root module as `model.memory`.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from memrewrite.cost import Cost
from memrewrite.errors import ModelError, UserError
from memrewrite.frozen import Frozen
from memrewrite.layers.value_table import InputTable, ValueTable
from memrewrite.record import RewriteRecord
from memrewrite.site import itemsize_of

FP8 = "float8_e4m3fn"
_SEED_OF_INPUTS = 0x9E3779B97F4A7C15  # added to a pool's seed: its two tables have different values

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
    """A value table V [keys², value_dim] of eq. (1) of arXiv 2412.09764, and for some layer kinds a second table on its slots.

    Attributes:
        keys: Keys per half (√N); the table has keys² = N slots.
        value_dim: Width of one value (d_v).
        init: Initialization: "paper" is N(0, value_dim^-1/2).
        seed: Seed of the initial values.
        dtype: Dtype of the stored values. None: the dtype that the pool is built with.
        gradient: How the table is trained: "dense", "sparse" or "fused".
        backend: Kernels that read it: "auto", "triton", "native" or "torch".
        input_dim: Width of a second table u [keys², input_dim], which kinds with `reads_inputs` multiply with their input.
            The plan sets it. None: there is no second table.

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
    input_dim: int | None = Field(default=None, gt=0, description="Width of the second table; None: there is none.")

    @model_validator(mode="after")
    def _can_learn(self) -> PoolSpec:
        if needs_fused(self.dtype, self.gradient):
            raise ValueError(f"a table of {self.dtype} can be trained only by fused updates: gradient='fused'")
        return self

    @property
    def slots(self) -> int:
        """Number of rows of the table: keys²."""
        return self.keys**2

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the tables: of the values, and of the inputs if there are any."""
        return (self.value_dim,) if self.input_dim is None else (self.value_dim, self.input_dim)

    def cost(self) -> Cost:
        """Parameters and bytes of the tables (float32 where the spec has no dtype). Reads are in the cost of the layers."""
        parameters = self.slots * sum(self.widths)
        scales = 4 * self.slots * len(self.widths) if self.dtype == FP8 else 0
        return Cost(parameters=parameters, parameter_bytes=parameters * itemsize_of(self.dtype or "float32") + scales)


class Pool(ValueTable):
    """The value table of a recipe's pool, shared by memory layers: a `ValueTable` of keys² rows with its specification.

    Args:
        spec: Size, dtype and training of the tables.
        device: Device of the tables.
        dtype: Dtype of the tables if the spec has none.

    Attributes:
        inputs: The second table, a child module, so that its parameter is `memory.<name>.inputs.values`; None if the spec has
            no `input_dim`.
    """

    def __init__(self, spec: PoolSpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        stored = dtype if spec.dtype is None else getattr(torch, spec.dtype)
        how: dict[str, Any] = {"dtype": stored, "gradient": spec.gradient, "backend": spec.backend, "device": device}
        super().__init__(spec.slots, spec.value_dim, seed=spec.seed, **how)
        self.spec = spec
        seed = (spec.seed + _SEED_OF_INPUTS) % 2**63
        self.inputs = None if spec.input_dim is None else InputTable(spec.slots, spec.input_dim, seed=seed, **how)

    def forward(
        self,
        indices: Tensor,
        operand: Tensor,
        dtype: torch.dtype | None = None,
        *,
        table: Literal["values", "inputs"] = "values",
    ) -> Tensor:
        """Read the values as `ValueTable` does, or the rows of the second table as `InputTable` does.

        Layers read both through this call, so that a module that another library puts in the place of the pool has one
        method to forward.

        Args:
            indices: Slots [T, K], int32 or int64.
            operand: Weights [T, K] of the values, or with `table="inputs"` tokens [T, input_dim].
            dtype: Dtype of the result of reading values of 8 bits.
            table: Which table is read.

        Returns:
            [T, value_dim]; with `table="inputs"` [T, K].

        Raises:
            ModelError: The pool has no second table.
        """
        if table == "values":
            return super().forward(indices, operand, dtype)
        if self.inputs is None:
            raise ModelError("the layer reads input weights, and its pool has none", hint="PoolSpec(input_dim=...)")
        read: Tensor = self.inputs(indices, operand)
        return read

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sample the rows of all tables in place, as `Table` does."""
        super().reset_parameters(generator)
        if self.inputs is not None:
            self.inputs.reset_parameters(generator)

    @torch.no_grad()
    def scale_values_(self, factor: float) -> None:
        """Multiply all values by `factor`, in place; of an 8-bit table, the scales of the rows."""
        (self.values if self.scale is None else self.scale).mul_(factor)

    def extra_repr(self) -> str:
        """Slots and width, for `print(model)`."""
        how = "" if self.spec.gradient == "dense" else f", gradient={self.spec.gradient!r}"
        width = f"value_dim={self.spec.value_dim}" + (f", input_dim={self.spec.input_dim}" if self.inputs is not None else "")
        return f"slots={self.spec.keys}², {width}, dtype={self.values.dtype}{how}"


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
