"""Checks the machine code of the Triton kernels for each architecture, without a GPU: spills, narrow loads, more registers.

Flow: compile every variant of the kernel modules with the Triton that is importable → read the cubin → compare it with the
variant and with tests/kernels/compile_gate.json → print a table; any finding is exit code 1.
`python tests/kernels/compile_gate.py --write` records the register counts of this Triton version. With `--cache DIR` a kernel
whose source, options and compiler did not change is not compiled again: Triton's cache key is a hash of all of these.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memrewrite.kernels.compile_variants import CompileVariant

MODULES = ("triton_lookup", "triton_segments", "triton_backward", "triton_update", "triton_quantize", "triton_topk")
ARCHITECTURES = (80, 90, 100)
BASELINE = Path(__file__).with_suffix(".json")
GROWTH, SLACK = 1.15, 8  # a register count passes if it grew by at most this factor, or by at most this many


@dataclass(frozen=True)
class Code:
    """What the gate reads from the machine code of one kernel."""

    registers: int
    stack: int  # bytes per thread: registers that did not fit
    spills: int  # instructions that load and store them
    loads: dict[int, int]  # bytes -> global loads of that width

    @property
    def widths(self) -> str:
        return " ".join(f"{count}x{width}B" for width, count in sorted(self.loads.items(), reverse=True))


def compile_variants() -> Iterator[CompileVariant]:
    """Every variant of the kernel modules that exist."""
    for name in MODULES:
        if find_spec(f"memrewrite.kernels.{name}") is not None:
            yield from import_module(f"memrewrite.kernels.{name}").compile_variants()


def compiled(variant: CompileVariant, arch: int) -> Code:
    """Compile for one architecture and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = list(variant.kernel.arg_names)
    types = {**dict.fromkeys(variant.constants, "constexpr"), **variant.signature}
    source = triton.compiler.ASTSource(
        variant.kernel,
        {name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return read(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def read(cubin: bytes, cuobjdump: Path) -> Code:
    """Registers, spills and load widths of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)
    if found is None or not instructions:
        raise RuntimeError(f"{cuobjdump} printed no register count or no instructions; did its output format change?\n{usage}")
    loads = Counter(width(name) for name in instructions if name.split(".")[0] in ("LDG", "LDGSTS"))
    spills = sum(name.split(".")[0] in ("STL", "LDL") for name in instructions)
    return Code(int(found[1]), int(found[2]), spills, dict(loads))


def width(load: str) -> int:
    """Bytes that one load instruction reads per thread: LDG.E.128 -> 16."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in load.split(".") if part in sizes), 4)


def findings(variant: CompileVariant, code: Code, known: int | None) -> Iterator[str]:
    """Yield every fault of a kernel's code and what to try; `known` is the recorded register count, None if there is none."""
    if code.spills or code.stack:
        yield (
            f"{code.spills} spill instructions, {code.stack} bytes of stack at {code.registers} registers; "
            "try fewer rows or a smaller chunk in its plan, or more warps"
        )
    if variant.row_bytes and not any(size >= variant.row_bytes for size in code.loads):
        yield (
            f"no load of {variant.row_bytes} bytes, only {code.widths or 'none'}; try a divisor of the stride as a constexpr, "
            "tl.multiple_of, tl.max_contiguous, and check for masks that change within one load"
        )
    narrow = sum(count for size, count in code.loads.items() if size < variant.row_bytes)
    if narrow > variant.scalar_loads:
        yield (
            f"{narrow} loads below {variant.row_bytes} bytes ({code.widths}), {variant.scalar_loads} are allowed; "
            "make the row's alignment provable to the compiler, or set scalar_loads in the variant if these loads read no rows"
        )
    if known is None:
        yield "no register count on record; run `python tests/kernels/compile_gate.py --write` and review the diff"
    elif code.registers > known * GROWTH and code.registers > known + SLACK:
        yield (
            f"{code.registers} registers, {known} on record: fewer warps fit on a multiprocessor; find what caused it,"
            " or record the new count with `python tests/kernels/compile_gate.py --write`"
        )


def table(rows: Iterable[tuple[str, int, Code, int | None]], version: str) -> str:
    """One line per kernel and architecture."""
    lines = [f"{'Triton ' + version:44} {'arch':>6} {'registers':>9} {'on record':>9} {'spills':>6}  loads"]
    for name, arch, code, known in rows:
        record = "-" if known is None else known
        lines.append(f"{name:44} {f'sm_{arch}':>6} {code.registers:9} {record:>9} {code.spills:6}  {code.widths}")
    return "\n".join(lines)


def run(options: argparse.Namespace, version: str) -> int:
    """Compile, check, record; returns the exit status: 1 if there is a finding or nothing was compiled."""
    baseline: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    known = {} if options.write else baseline.get(version, {})
    rows, wrong, measured = [], 0, {}
    for variant in compile_variants():
        for arch in (arch for arch in options.arch if arch in variant.architectures):
            code = compiled(variant, arch)
            record = code.registers if options.write else known.get(variant.name, {}).get(str(arch))
            for finding in findings(variant, code, record):
                print(f"FAILED {variant.name} · sm_{arch} · Triton {version}: {finding}", flush=True)
                wrong += 1
            rows.append((variant.name, arch, code, record))
            measured.setdefault(variant.name, {})[str(arch)] = code.registers
    if options.write:
        BASELINE.write_text(json.dumps({**baseline, version: measured}, indent=1, sort_keys=True) + "\n")
    if options.json is not None:
        codes = [{"name": name, "arch": arch, **vars(code)} for name, arch, code, _ in rows]
        options.json.write_text(json.dumps({"triton": version, "kernels": codes}, indent=1) + "\n")
    print(table(rows, version))
    print(f"{len(rows)} compiled, {wrong} findings")
    return 1 if wrong or not rows else 0


def main() -> int:
    """Read the options and run; without `--cache` in an empty temporary cache, so that every kernel is compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the registers of this Triton's version")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities (80 90 100)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled kernels here, in a folder per Triton version")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile_gate needs the compiler, and TRITON_INTERPRET=1 makes Triton interpret; run it without that variable")
        return 2
    if find_spec("triton") is None:
        print("compile_gate needs Triton, which is not installed; try `pip install triton`")
        return 2
    if options.write and tuple(options.arch) != ARCHITECTURES:
        parser.error("--write records all architectures: remove --arch")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TRITON_CACHE_DIR"] = temporary
        import triton

        if options.cache is not None:
            os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve() / triton.__version__)
        return run(options, triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
