"""Runs the tests that need a CUDA device (marker `gpu`), also where memrewrite is not installed.

Needs pytest, with pluggy, iniconfig and packaging; e.g. unpacked wheels on PYTHONPATH. Arguments are passed to pytest.
"""

from __future__ import annotations

import importlib.util
import sys

import import_checkout

ROOT = import_checkout.ROOT
FILES = {  # file with such tests → packages it imports that a GPU machine may lack
    "tests/kernels/test_contract.py": (),
    "tests/kernels/test_devices.py": (),
    "tests/layers/test_clipping.py": ("hypothesis", "sortedcontainers", "pydantic", "yaml"),
    "tests/layers/test_fused.py": ("hypothesis", "sortedcontainers", "pydantic", "yaml"),
    "tests/whole/test_gpu.py": ("onnx", "onnxruntime"),
}


def main(argv: list[str]) -> int:
    """Run every file whose packages are there, and name those that are left out. Returns pytest's exit code."""
    import_checkout.ensure()
    import pytest

    files = []
    for file, packages in FILES.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{file}: not run ({', '.join(missing)} is not installed)")
        else:
            files.append(str(ROOT / file))
    return int(pytest.main(["-m", "gpu", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *argv, *files]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
