"""Refuses pools and layers that no device could hold, or that could not be read or trained where their sites are.

Flow: a completed pool and its sites, or a layer and its site → nothing, or a `SelectError` with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from memrewrite.errors import SelectError, UserError
from memrewrite.layers.contract import LayerOptions, MemoryLayer
from memrewrite.layers.pool import PoolSpec
from memrewrite.site import Site, dtype_named, itemsize_of

MAX_BYTES = 2**63 - 1  # of one tensor: sizes are 64-bit integers
COMPUTED = ("float32", "bfloat16", "float16", "float64")  # dtypes of layers: others can be stored, not computed in


def refuse_pool(name: str, spec: PoolSpec, sites: Sequence[Site]) -> None:
    """Raise `SelectError` for a pool that is too large for a tensor, or that cannot be trained as the layers read it."""
    place = f"pools.{name}"
    size, devices = spec.cost().parameter_bytes, sorted({site.device for site in sites})
    if size > MAX_BYTES:
        width = " + ".join(f"{width:,}" for width in spec.widths)
        what = f"pool {name!r} would have {size:,} bytes: {spec.slots:,} slots × {width} {spec.dtype}"
        raise SelectError(what, where=place, hint="lower `keys` or `value_dim`")
    if len(devices) > 1:
        what = f"the sites that share pool {name!r} are on different devices: {devices}"
        raise SelectError(what, where=place, hint="use one pool for each device")
    if spec.gradient == "fused" and spec.dtype == "float64":
        what = f"pool {name!r} is float64, which has no fused update"
        raise SelectError(what, where=place, hint="dtype: float32, or gradient: dense")
    reads = sum(site.calls for site in sites)
    if spec.gradient == "sparse" and spec.dtype and reads > 1:
        reason = _sparse_sum(str(spec.dtype), devices[0])
        if reason:
            what = f"pool {name!r} is read {reads} times, and torch cannot add its sparse gradients in {spec.dtype}: {reason}"
            raise SelectError(what, where=place, hint="`gradient: dense` or `fused`, or another `dtype`")


def refuse_layer(kind: type[MemoryLayer], site: Site, options: LayerOptions, pool: PoolSpec | None, zero_output: bool) -> None:
    """Raise `UserError` for a layer that cannot be built at a site, trained, or run by the pool's `backend`."""
    kind.check(site.d_in, site.d_model, options, pool)
    kind.check_trainable(site.d_in, options, pool)
    if site.dtype not in COMPUTED:
        what = f"the MLP at {site.path!r} has weights of {site.dtype}, in which no layer can compute"
        raise UserError(what, hint="convert the model: `model.float()`, or leave this site out")
    cost = kind.cost(site.d_in, site.d_model, options, pool, itemsize_of(site.dtype), zero_output=zero_output)
    if max(cost.parameter_bytes, cost.bytes_read) > MAX_BYTES:
        what = (
            f"a layer at {site.path!r} would have {cost.parameters:,} parameters and read {cost.bytes_read:,} bytes per token"
        )
        raise UserError(what, hint="lower `heads`, `topk` or `key_dim`")
    if site.device != "meta":  # there a layer does not run
        kind.check_device(options, pool, torch.device(site.device), dtype_named(site.dtype))


@cache
def _sparse_sum(dtype: str, device: str) -> str | None:
    """Why torch cannot add two row-sparse tensors of a dtype on a device, or None: it is tried."""
    if device == "meta":
        return None
    zeros = torch.zeros(1, 1, device=device)
    one = torch.sparse_coo_tensor(zeros.long(), zeros.to(dtype_named(dtype)), (1, 1), check_invariants=False)
    try:
        one + one
    except NotImplementedError as error:
        return str(error)
    return None
