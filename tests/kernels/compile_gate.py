"""Checks the machine code of the Triton kernels for each architecture, without a GPU: spills, narrow loads, more registers.

Flow: compile every variant of the kernel modules with the Triton that is importable → read the cubin → compare it with the
variant and with tests/kernels/compile_gate.json → print a table; any finding is exit code 1. The variants are those of the
launchers' own plans, and of every plan in kernels/plans.json for the architecture of its device.
`python tests/kernels/compile_gate.py --write` records the register counts of this Triton version. With `--cache DIR` a kernel
whose source, options and compiler did not change is not compiled again: Triton's cache key is a hash of all of these.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from machine_code import Code, read

from memrewrite.kernels import triton_plans
from memrewrite.kernels.compile_variants import CompileVariant

MODULES = (
    "triton_lookup",
    "triton_segments",
    "triton_backward",
    "triton_update",
    "triton_lazy_adam",
    "triton_quantize",
    "triton_topk",
)
ARCHITECTURES = (80, 90, 100)
BASELINE = Path(__file__).with_suffix(".json")
GROWTH, SLACK = 1.15, 8  # a register count passes if it grew by at most this factor, or by at most this many


def compile_variants() -> Iterator[CompileVariant]:
    """Every variant of the kernel modules that exist."""
    for name in MODULES:
        if find_spec(f"memrewrite.kernels.{name}") is not None:
            yield from import_module(f"memrewrite.kernels.{name}").compile_variants()


def measured_variants() -> Iterator[CompileVariant]:
    """A variant for each entry of kernels/plans.json whose module can make one (`measured_variants`), if it has entries."""
    entries = triton_plans.entries(triton_plans.FILE)
    triton_plans.table(triton_plans.FILE)  # checks the plans
    modules = [import_module(f"memrewrite.kernels.{name}") for name in MODULES] if entries else []
    for entry in entries:
        plan = triton_plans.complete(entry["kernel"], entry["plan"])
        makers = [make for module in modules if (make := getattr(module, "MEASURED", {}).get(entry["kernel"]))]
        if not makers:
            raise SystemExit(
                f"{triton_plans.FILE}: no module has variants for the plans of {entry['kernel']}; add it to MEASURED there"
            )
        for variant in makers[0](plan, getattr(torch, entry["dtype"]), *entry["size"]):
            number = re.fullmatch(r"sm_(\d+)", entry["device"])
            only = (int(number[1]),) if number else ARCHITECTURES
            name = f"{variant.name} measured on {entry['device']}"
            yield replace(variant, name=name, architectures=tuple(a for a in variant.architectures if a in only))


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
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return read(kernel.asm["cubin"], cuobjdump, variant.row_bytes, variant.constants.get("CACHE", ""))


def findings(variant: CompileVariant, code: Code, known: int | None, recorded: bool = True) -> Iterator[str]:
    """Yield every fault of a kernel's code and what to try.

    `known` is the register count on record, None if there is none; `recorded` is False if there are none at all for this
    version of Triton, or if the plan is measured: then none is needed.
    """
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
    if known is None and recorded:
        yield "no register count on record; run `python tests/kernels/compile_gate.py --write` and review the diff"
    elif known is not None and code.registers > known * GROWTH and code.registers > known + SLACK:
        yield (
            f"{code.registers} registers, {known} on record: fewer warps fit on a multiprocessor; find what caused it,"
            " or record the new count with `python tests/kernels/compile_gate.py --write`"
        )


def table(rows: Iterable[tuple[CompileVariant, int, Code, int | None]], version: str) -> str:
    """One line per kernel and architecture; "in flight": row loads of a thread, and their KiB on a full multiprocessor."""
    head = f"{'arch':>6} {'registers':>9} {'on record':>9} {'spills':>6} {'in flight':>9} {'KiB':>5}"
    lines = [f"{'Triton ' + version:60} {head}  loads"]
    for variant, arch, code, known in rows:
        record = "-" if known is None else known
        flight = f"{code.in_flight:9} {code.kilobytes(variant.num_warps, variant.row_bytes):5.0f}"
        numbers = f"{f'sm_{arch}':>6} {code.registers:9} {record:>9} {code.spills:6} {flight}"
        lines.append(f"{variant.name:60} {numbers}  {code.widths}")
    return "\n".join(lines)


def run(options: argparse.Namespace, version: str) -> int:
    """Compile, check, record; returns the exit status: 1 if there is a finding or nothing was compiled."""
    baseline: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    known = {} if options.write else baseline.get(version, {})
    recorded = options.write or bool(known)
    if not recorded:
        print(f"there are no register counts on record for Triton {version}: they are printed, and not compared")
    rows, wrong, measured = [], 0, {}
    for variant, of_plan in [*((v, False) for v in compile_variants()), *((v, True) for v in measured_variants())]:
        for arch in (arch for arch in options.arch if arch in variant.architectures):
            code = compiled(variant, arch)
            record = code.registers if options.write and not of_plan else known.get(variant.name, {}).get(str(arch))
            for finding in findings(variant, code, record, recorded and not of_plan):
                print(f"FAILED {variant.name} · sm_{arch} · Triton {version}: {finding}", flush=True)
                wrong += 1
            rows.append((variant, arch, code, record))
            if not of_plan:
                measured.setdefault(variant.name, {})[str(arch)] = code.registers
    if options.write:
        BASELINE.write_text(json.dumps({**baseline, version: measured}, indent=1, sort_keys=True) + "\n")
    if options.json is not None:
        codes = [{"name": variant.name, "arch": arch, **vars(code)} for variant, arch, code, _ in rows]
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
