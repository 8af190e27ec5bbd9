"""Cost of a layer: parameters, floating-point operations and bytes read per token. Computed from sizes, without tensors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Cost(BaseModel):
    """Cost of one layer. `a + b` adds every field.

    Attributes:
        parameters: Number of parameters.
        parameter_bytes: Bytes in which they are stored.
        flops: Floating-point operations per token; a multiply-add counts as two.
        bytes_read: Bytes of weights and table rows read for one token. A dense layer reads its weights once per
            *batch*; this field is for decoding with one token, where reading dominates.
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
    """Cost of dense matrices.

    Args:
        weights: Entries of all matrices together.
        biases: Entries of all biases together.
        itemsize: Bytes of one entry.
        active: Matrix entries that one token uses, fewer than `weights` in a mixture of experts. Default: all.
    """
    used = weights if active is None else active
    stored, read = (weights + biases) * itemsize, (used + biases) * itemsize
    return Cost(parameters=weights + biases, parameter_bytes=stored, flops=2 * used + biases, bytes_read=read)
