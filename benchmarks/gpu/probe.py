"""The process that finds out whether this machine can run the benchmark, and what the numbers depend on."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "memrewrite", "fbgemm_gpu", "onnxruntime")


def main(rehearse: bool) -> int:
    """Print device and versions as JSON; or why nothing can be measured, with exit code 2."""
    why = refusal(rehearse)
    if why is not None:
        print(why, file=sys.stderr)
        return 2
    print(json.dumps({"device": device(rehearse), "versions": versions()}))
    return 0


def refusal(rehearse: bool) -> str | None:
    """Why nothing can be measured on this machine, and what to try; None if it can."""
    if rehearse:
        return None
    if not torch.cuda.is_available():
        return (
            f"benchmarks/gpu: torch {torch.__version__} sees no CUDA GPU, so there is nothing to measure\n"
            "  try: a machine with an NVIDIA GPU and a CUDA build of torch; or --rehearse, which runs all this on the CPU"
        )
    if importlib.util.find_spec("triton") is None:
        return (
            "benchmarks/gpu: Triton is not installed, and the kernels are written in it\n"
            "  try: pip install triton, in the version that your torch names"
        )
    return None


def device(rehearse: bool) -> dict[str, Any]:
    """The properties of the device on which the numbers depend."""
    if rehearse:
        return {"name": "cpu", "kernels": "triton" if interpreted() else "torch"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
    }


def interpreted() -> bool:
    """True if Triton's kernels can run on CPU tensors; the variable must be set before Triton is imported."""
    return importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def versions() -> dict[str, str | None]:
    """Versions of everything that affects times: packages (None: not installed), and a hash of the kernels' files."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    return {**found, **{name: _version(name) for name in PACKAGES}, "kernels": _kernels()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # it may be importable without being installed
        importable = importlib.util.find_spec(name) is not None
        return str(getattr(__import__(name), "__version__", "unknown")) if importable else None


def _kernels() -> str:
    import memrewrite.kernels

    folder = Path(memrewrite.kernels.__file__).parent
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".py", ".json", ".cpp", ".cu", ".h") and f.is_file())
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:12]
