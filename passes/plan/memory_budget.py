"""Whether a plan's pools fit into the free memory of their devices."""

from __future__ import annotations

from pathlib import Path

import torch

from memrewrite.errors import SelectError
from memrewrite.plans import Plan

MEMINFO = Path("/proc/meminfo")


def refuse_too_large(plan: Plan) -> None:
    """Raise `SelectError` when the plan's pools on one device need more than its free memory."""
    devices = {s.pool: s.site.device for s in plan.substitutions if s.pool}
    for device in dict.fromkeys(devices.values()):
        pools = {name: pool for name, pool in plan.pools.items() if devices[name] == device}
        needed = sum(pool.cost().parameter_bytes for pool in pools.values())
        free = free_memory(torch.device(device))
        if free is not None and needed > free:
            sizes = ", ".join(f"{n}: {p.slots:,} × {p.value_dim} {p.dtype}" for n, p in pools.items())
            raise SelectError(
                f"the pools need {needed / 2**30:.1f} GiB ({sizes}), and {device} has {free / 2**30:.1f} GiB free",
                where=f"pools.{next(iter(pools))}",
                hint="fewer `keys`, a smaller `dtype`, or allow it: --allow-large",
            )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    sizes = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) * 1024
