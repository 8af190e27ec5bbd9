"""What a layer costs: parameters, arithmetic and bytes moved per token. Pure arithmetic, no tensors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Cost(BaseModel):
    """Cost of one layer. `flops` counts a multiply-add as two; `bytes_read` is weights and table rows read for one token.

    A dense layer reads its weights once per *batch*; `bytes_read` states the decode case (one token), where reading
    dominates. Adding two costs adds every field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int = 0
    parameter_bytes: int = 0
    flops: int = 0
    bytes_read: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            parameters=self.parameters + other.parameters,
            parameter_bytes=self.parameter_bytes + other.parameter_bytes,
            flops=self.flops + other.flops,
            bytes_read=self.bytes_read + other.bytes_read,
        )


def dense_cost(weights: int, biases: int, itemsize: int, active: int | None = None) -> Cost:
    """Cost of matrices with `weights` entries in all, of which a token uses `active` (all of them), and of `biases`."""
    used = weights if active is None else active
    stored, read = (weights + biases) * itemsize, (used + biases) * itemsize
    return Cost(parameters=weights + biases, parameter_bytes=stored, flops=2 * used + biases, bytes_read=read)
