"""Measured plans of the Triton kernels: the fastest plan of a kernel for a dtype and a size, by device.

The launchers ask `tuned`; where `plans.json` has no entry, they compute a plan themselves. `benchmarks/gpu` measures the plans
and writes the entries. An entry is used with every version of Triton; `triton` says with which one it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("plans.json")
CACHES = ("evict_last", "", "evict_first")  # Triton's names for how long loaded rows stay in the caches; "": no hint


@dataclass(frozen=True)
class Kernel:
    """What a plan of this kernel depends on, and what it consists of."""

    size: tuple[str, ...]
    fields: tuple[str, ...]
    block: int = 1  # the smallest block


SLICES = ("rows", "block", "warps", "registers", "cache")  # of kernels that read table rows in slices of `block` columns
KERNELS = {
    "forward": Kernel(("width",), SLICES, 16),
    "segment_gradients": Kernel(("width",), SLICES, 16),
    "token_dots": Kernel(("width",), SLICES, 16),
    # `moments` is 1 for Adagrad and 2 for Adam; a program has `pieces` blocks of a row
    "update": Kernel(("width", "moments"), ("rows", "block", "pieces", "warps", "registers", "cache"), 16),
    # `state_bytes`: of an element of the moments
    "lazy_adam": Kernel(("width", "state_bytes"), ("rows", "block", "pieces", "warps", "registers", "cache"), 128),
    "topk_half": Kernel(("n", "k"), ("rows", "chunk", "group", "warps", "registers")),
    "topk_pair": Kernel(("k",), ("rows", "chunk", "group", "warps", "registers")),
}
OPTIONAL = {"registers": None, "cache": "evict_last"}  # fields that an entry may omit, and their values then
ENTRY = {"device": str, "date": str, "triton": str, "kernel": str, "dtype": str, "size": list, "plan": dict}
MEASURED = {"ms": (int, float), "default_ms": (int, float)}  # optional: the time of the plan, and without the entry
_used: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("memrewrite_used_plans", default=None)


class PlanError(ValueError):
    """A plan that its kernel cannot run, or an entry of the table that is not in its format."""


def tuned(kernel: str, device: torch.device, dtype: torch.dtype, *size: int) -> dict[str, Any] | None:
    """The measured plan of a kernel, with all fields, or None. `dtype` and `size` are those that `KERNELS` names.

    An entry for the name of the device is preferred to one for its compute capability ("sm_90").

    Raises:
        PlanError: The kernel is unknown, or the table is not valid.
    """
    used = _used.get()
    if used is not None and kernel in used:
        return used[kernel]
    return _found(kernel, device, dtype, size)


@contextmanager
def use(kernel: str, plan: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `tuned` returns this plan for the kernel on every device: for measurements and tests."""
    checked = complete(kernel, plan)
    token = _used.set({**(_used.get() or {}), kernel: checked})
    try:
        yield
    finally:
        _used.reset(token)


@lru_cache
def _found(kernel: str, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Any] | None:
    _known(kernel, f"tuned({kernel!r})")
    plans = table(FILE)
    for name in names(device):
        plan = plans.get((name, kernel, str(dtype).removeprefix("torch."), size))
        if plan is not None:
            return plan
    return None


def names(device: torch.device) -> tuple[str, ...]:
    """What a device is called in the table, the most specific name first."""
    if device.type != "cuda":
        return (device.type,)
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


@lru_cache
def table(file: Path) -> dict[tuple[str, str, str, tuple[int, ...]], dict[str, Any]]:
    """The plans of a file by device, kernel, dtype and size; every entry is checked."""
    plans: dict[tuple[str, str, str, tuple[int, ...]], dict[str, Any]] = {}
    for number, entry in enumerate(entries(file)):
        key = (entry["device"], entry["kernel"], entry["dtype"], tuple(entry["size"]))
        where = f"{file}, entry {number} ({' '.join(map(str, key))})"
        plan = complete(entry["kernel"], entry["plan"], where)
        if key in plans:
            raise PlanError(f"{where}: there is an earlier entry for the same device, kernel, dtype and size; remove one")
        plans[key] = plan
    return plans


def entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a file as written, each with the fields and types of `ENTRY`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PlanError(f"{file} is not JSON: {error}; restore it, or write {{'plans': []}}") from error
    if not isinstance(content, dict) or set(content) != {"plans"} or not isinstance(content["plans"], list):
        raise PlanError(f"{file} must be an object with one list, 'plans'")
    for number, entry in enumerate(content["plans"]):
        _check_entry(entry, f"{file}, entry {number}")
    return list(content["plans"])


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or not set(ENTRY) <= set(entry) <= set(ENTRY) | set(MEASURED):
        given = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise PlanError(f"{where}: needs the fields {', '.join(ENTRY)} and may have {', '.join(MEASURED)}; it has {given}")
    for name, kind in (ENTRY | MEASURED).items():
        if name in entry and not isinstance(entry[name], kind):
            raise PlanError(f"{where}: {name} is {entry[name]!r}, of type {type(entry[name]).__name__}")
    kernel = _known(entry["kernel"], where)
    if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        raise PlanError(f"{where}: {entry['dtype']!r} is no dtype of torch; try 'bfloat16' or 'float8_e4m3fn'")
    if len(entry["size"]) != len(kernel.size) or not all(_counts(number) for number in entry["size"]):
        raise PlanError(f"{where}: size is {entry['size']}; {entry['kernel']} has the sizes [{', '.join(kernel.size)}]")


def complete(kernel: str, plan: Mapping[str, Any], where: str = "plan") -> dict[str, Any]:
    """The plan with all fields of its kernel.

    Raises:
        PlanError: A field is missing or unknown, or the kernel cannot run with its value.
    """
    known = _known(kernel, where)
    full = {name: value for name, value in OPTIONAL.items() if name in known.fields} | dict(plan)
    if set(full) != set(known.fields):
        raise PlanError(f"{where}: the plan of {kernel} has the fields {', '.join(plan)}; it needs {', '.join(known.fields)}")
    for name, value in full.items():
        reason = _wrong(name, value, known)
        if reason:
            raise PlanError(f"{where}: {kernel} cannot run with {name} = {value!r}: {reason}")
    if full.get("registers") and full["registers"] * 32 * full["warps"] > 65536:
        raise PlanError(f"{where}: {full['warps']} warps of {full['registers']} registers do not fit on a multiprocessor")
    if full.get("group", 1) > full.get("chunk", 1):
        raise PlanError(f"{where}: a group of {full['group']} does not fit in a chunk of {full['chunk']}")
    if full["rows"] * full.get("block", full.get("chunk", 1)) > 2**20:
        raise PlanError(f"{where}: {full['rows']} rows x {full.get('block', full.get('chunk'))} exceed Triton's limit of 2**20")
    return full


def _known(kernel: str, where: str) -> Kernel:
    if kernel not in KERNELS:
        raise PlanError(f"{where}: there is no kernel {kernel!r}; the kernels with plans are {', '.join(KERNELS)}")
    return KERNELS[kernel]


def _wrong(name: str, value: Any, kernel: Kernel) -> str:
    """Why a field cannot have this value; "" if it can."""
    if name == "cache":
        return "" if value in CACHES else f"try one of {', '.join(map(repr, CACHES))}"
    if name == "registers":
        return "" if value is None or (_counts(value) and 16 <= value <= 255) else "try null, or 16 to 255"
    if name == "pieces":
        return "" if _counts(value) else "at least 1"
    if not _counts(value) or value & (value - 1):
        return "it must be a power of two"
    if name == "warps" and value > 32:
        return "at most 32"
    return f"at least {kernel.block}" if name == "block" and value < kernel.block else ""


def _counts(value: Any) -> bool:
    return type(value) is int and value > 0
