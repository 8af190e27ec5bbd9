"""Whether a plan's pools and layers fit into the free memory of their devices."""

from __future__ import annotations

from pathlib import Path

import torch

from memrewrite.errors import SelectError
from memrewrite.plans import Plan, Substitution

MEMINFO = Path("/proc/meminfo")


def refuse_too_large(plan: Plan) -> None:
    """Raise `SelectError` when the plan's pools and layers on one device need more than its free memory."""
    devices = {s.pool: s.site.device for s in plan.substitutions if s.pool}
    for device in dict.fromkeys(s.site.device for s in plan.substitutions):
        pools = {name: pool for name, pool in plan.pools.items() if devices[name] == device}
        tables = sum(pool.cost().parameter_bytes for pool in pools.values())
        layers = sum(_bytes_of(s, plan) for s in plan.substitutions if s.site.device == device)
        free = free_memory(torch.device(device))
        if free is not None and tables + layers > free:
            sizes = ", ".join(f"{n}: {p.slots:,} × {' + '.join(map(str, p.widths))} {p.dtype}" for n, p in pools.items())
            raise SelectError(
                f"the pools need {tables / 2**30:.1f} GiB ({sizes}), the layers {layers / 2**30:.1f} GiB, and {device} has "
                f"{free / 2**30:.1f} GiB free",
                where=f"pools.{next(iter(pools))}" if pools else f"the layer at {plan.substitutions[0].site.path!r}",
                hint="fewer `keys` or `heads`, a smaller `dtype`, or allow it: --allow-large",
            )


def _bytes_of(substitution: Substitution, plan: Plan) -> int:
    """Bytes of one new layer: its cost, without that of an MLP that stays."""
    kept = substitution.site.cost().parameter_bytes if substitution.placement == "parallel" else 0
    return substitution.cost(plan.pools).parameter_bytes - kept


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    sizes = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) * 1024
