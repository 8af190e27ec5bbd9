"""What the machine code of one kernel shows: registers, spills, the widths of its loads, and how many are in flight.

`cuobjdump`, which Triton brings along, disassembles a cubin; no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
HINTS = {"": "", "evict_last": "EL", "evict_first": "EF"}  # names of the hints in instructions
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor of sm_80, sm_90 and sm_100


@dataclass(frozen=True)
class Code:
    """What the gate reads from the machine code of one kernel."""

    registers: int
    stack: int  # bytes per thread: registers that did not fit
    spills: int  # instructions that load and store them
    loads: dict[int, int]  # bytes -> global loads of that width
    in_flight: int  # the most row loads of one thread whose values no instruction has read yet
    instructions: int

    @property
    def widths(self) -> str:
        """The loads in words: 8x16B 2x4B."""
        return " ".join(f"{count}x{width}B" for width, count in sorted(self.loads.items(), reverse=True))

    def kilobytes(self, warps: int, row_bytes: int) -> float:
        """KiB of rows in flight on a multiprocessor, if programs of this number of warps fill it."""
        most = REGISTERS // (32 * -(-self.registers // 8) * 8) // warps
        return min(most, PROGRAMS, WARPS // warps) * warps * 32 * self.in_flight * row_bytes / 1024


def read(cubin: bytes, cuobjdump: Path, row_bytes: int = 16, cache: str = "") -> Code:
    """The code of a cubin with one kernel.

    Row loads are those of `row_bytes` and more, with the hint `cache` if the kernel gives one to its row loads alone.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    instructions = INSTRUCTION.findall(sass)
    if found is None or not instructions:
        raise RuntimeError(f"{cuobjdump} printed no register count or no instructions; did its output format change?\n{usage}")
    names = [name for name, _ in instructions]
    loads = Counter(width(name) for name in names if name.split(".")[0] in ("LDG", "LDGSTS"))
    spills = sum(name.split(".")[0] in ("STL", "LDL") for name in names)
    return Code(int(found[1]), int(found[2]), spills, dict(loads), in_flight(instructions, row_bytes, HINTS[cache]), len(names))


def width(load: str) -> int:
    """Bytes that one load instruction reads per thread: LDG.E.128 -> 16."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in load.split(".") if part in sizes), 4)


def in_flight(instructions: list[tuple[str, str]], row_bytes: int, hint: str = "") -> int:
    """The most row loads that have been issued while no instruction has used the registers that they write.

    Instructions are issued in order, and one that uses a register waits for its load. Branches are ignored: the code is read
    from top to bottom.
    """
    waiting: list[set[int]] = []  # the registers of each load
    most = 0
    for name, operands in instructions:
        numbers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        parts = name.split(".")
        load = parts[0] == "LDG" and width(name) >= row_bytes and (not hint or hint in parts)
        used = set(numbers[1:] if load else numbers)
        waiting = [registers for registers in waiting if not registers & used]
        if load:
            waiting.append(set(range(numbers[0], numbers[0] + width(name) // 4)))
            most = max(most, len(waiting))
    return most
