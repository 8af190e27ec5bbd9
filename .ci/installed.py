"""Compares an installed wheel with the sources: `python installed.py WHEEL SOURCES`.

Every source file of the five folders must be in the wheel, and the imported package must be the installed one.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import zipfile
from pathlib import Path

FOLDERS = {"memrewrite": "memrewrite", **{name: f"memrewrite/{name}" for name in ("passes", "kernels", "recipes", "cli")}}


def main() -> None:
    """Exit with a message if something is missing."""
    wheel, sources = Path(sys.argv[1]), Path(sys.argv[2])
    installed = Path(sysconfig.get_path("purelib")) / "memrewrite"
    spec = importlib.util.find_spec("memrewrite")
    if spec is None or spec.origin is None or Path(spec.origin).parent != installed:
        sys.exit(f"memrewrite is imported from {spec and spec.origin}, not from {installed}")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{target}/{path.relative_to(sources / folder)}"
        for folder, target in FOLDERS.items()
        for path in (sources / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if missing := sorted(wanted - names):
        sys.exit(f"not in the wheel: {', '.join(missing)}")
    extra = sorted(name for name in names - wanted if ".dist-info/" not in name)
    if extra:
        sys.exit(f"in the wheel, and no source file: {', '.join(extra)}")
    sys.stdout.write(f"{len(wanted)} files are in the wheel, and it is the one that is imported\n")


if __name__ == "__main__":
    main()
