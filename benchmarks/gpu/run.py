"""Checks and measures everything on a GPU with one command: `python benchmarks/gpu`, no arguments, no network, seven minutes.

First the correctness of every kernel, then the peak rates of the device, each kernel, the training step, the largest tables,
the layer, torch.compile and ONNX Runtime. Each section is a process with a time limit, and each result is on the disk as soon
as it exists: whatever fails costs no other result. `--rehearse` runs all this on a CPU with tiny sizes and stores no times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import import_checkout
import processes
import report
from record import WHOLE, Contents, Record
from sections import NAMES, RATES, SECTIONS, TOTAL, Section, chosen

START = time.monotonic()
PROBE = 90.0  # seconds, of which a cold import of torch takes most
RESERVE = 10.0  # seconds kept for killed processes and the summary
REHEARSAL = 3600.0  # seconds: Triton's interpreter is slow


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu", description=__doc__)
    add = parser.add_argument
    add("--sections", default="", metavar="A,B", help=f"only these: {', '.join(NAMES)}")
    add("--out", type=Path, metavar="DIR", help="folder of results.jsonl, gpu.json, table.md and log.txt (build/gpu)")
    add("--resume", action="store_true", help="keep the finished cases of the run in this folder, and run the others")
    add("--json", type=Path, metavar="FILE", help="also write the summary here; its folder is the default of --out")
    add("--table", type=Path, metavar="DIR", help="only make the summary of the results in this folder")
    add("--seconds", type=float, help=f"time limit of the whole run ({TOTAL:.0f})")
    add("--library", type=Path, metavar="FILE", help="native library for the section onnx (default: built here with nvcc)")
    add("--rehearse", action="store_true", help="run everything on the CPU with tiny sizes, without times")
    args = parser.parse_args(argv)
    try:
        args.chosen = chosen(args.sections)
    except ValueError as error:
        parser.error(str(error))
    if args.out is None:
        args.out = args.json.parent if args.json else Path("build/gpu")
    if args.seconds is None:
        args.seconds = REHEARSAL if args.rehearse else TOTAL
    return args


def main(argv: Sequence[str]) -> int:
    """Measure, write, print. Returns 0: done; 1: a kernel is wrong, or a case failed; 2: nothing could be measured."""
    args = options(argv)
    if args.table:
        if not Record(args.table).path.is_file():
            return _refused(f"there is no results.jsonl in {args.table}")
        return report.conclude(args.table, Record(args.table).read(), args.json)
    measuring = Measuring(args)
    signal.signal(signal.SIGALRM, measuring.give_up)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, args.seconds - 2 - (time.monotonic() - START)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as for Ctrl-C, the processes are ended and the summary is written
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # goes on when the terminal is closed
    why = measuring.prepare()
    if why:
        return _refused(why)
    try:
        measuring.run()
    finally:
        code = measuring.conclude()
        signal.setitimer(signal.ITIMER_REAL, 0)
    return code


def _refused(why: str) -> int:
    print(why if why.startswith("benchmarks/gpu") else f"benchmarks/gpu: {why}", file=sys.stderr)
    return 2


@dataclass
class Measuring:
    """A run: its options, and what it has shown."""

    args: argparse.Namespace
    shown: int = 0  # bytes of the record

    def __post_init__(self) -> None:
        self.record = Record(self.args.out)
        self.log = self.args.out / "log.txt"
        self.end = START + self.args.seconds - RESERVE

    # ------------------------------------------------------------------------------------------------------ the machine

    def prepare(self) -> str:
        """Describe the machine, and begin or continue the record. Returns why that is impossible, or ""."""
        if folder := import_checkout.ensure():
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        why, printed = processes.output(self._line("probe"), min(PROBE, max(1.0, self.end - time.monotonic())))
        if why:
            return printed.strip() or f"the machine could not be described: {why}"
        (described,) = [line for line in printed.splitlines() if line.startswith("{")]
        run = {**json.loads(described), "rehearsal": self.args.rehearse}
        self.args.out.mkdir(parents=True, exist_ok=True)
        if self.args.resume and self.record.path.exists():
            if different := differences(self.record.read(), run):
                return f"{self.record.path} is of another run, so --resume is impossible: {different}\n  try: another --out"
        else:
            set_aside(self.record.path)
        self.shown = self.record.path.stat().st_size if self.record.path.exists() else 0
        self.record.append("run", **run, date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
        what = {**run["device"], **run["versions"]}
        self.say(", ".join(f"{name} {value}" for name, value in what.items()))
        if self.args.rehearse:
            self.say("rehearsal on the CPU: times are meaningless and not stored")
        return ""

    # ----------------------------------------------------------------------------------------------------- the sections

    def run(self) -> None:
        """All chosen sections that are not complete; and the peak rates, which all others need, if they are not known."""
        known = self.record.read()
        wanted = {section.name for section in self.args.chosen} | (set() if "copy" in known.values else {RATES})
        left = [section for section in SECTIONS if section.name in wanted and not known.complete(section.name)]
        for i, section in enumerate(left):
            seconds = (self.end - time.monotonic()) * section.share / sum(later.share for later in left[i:])
            ended = self.section(section, seconds) if seconds > 1 else ["no time left"]
            self.account(section, "; ".join(dict.fromkeys(filter(None, ended))))

    def section(self, section: Section, seconds: float) -> list[str]:
        """Run the processes of a section; returns how each ended."""
        count = min(section.processes, max(1, (os.cpu_count() or 1) // 2))
        with self.log.open("ab") as log:
            log.write(f"\n==== {section.name} ====\n".encode())
            log.flush()
            end = str(time.time() + seconds)
            lines = [self._line("section", section.name, str(i), str(count), end) for i in range(count)]
            return processes.run([processes.Child(line, log) for line in lines], seconds, self.show)

    def account(self, section: Section, why: str) -> None:
        """Record for every case of the section that is neither done nor failed why that is so."""
        cases = self.record.read()
        why = why or "the process ended early"
        for name, case in cases.cases.get(section.name, {}).items():
            if case.state in ("listed", "begun"):
                status = f"FAILED: {why}" if case.state == "begun" else f"not run ({why})"
                self.record.append("failed", section=section.name, of=name, why=status)
        if section.name not in cases.listed and WHOLE not in cases.cases.get(section.name, {}):
            self.record.append("failed", section=section.name, of=WHOLE, why=f"not run ({why})")
        self.show()

    def _line(self, *what: str) -> list[str]:
        given = {"out": str(self.args.out), "rehearse": self.args.rehearse, "parent": os.getpid()}
        library = str(self.args.library.resolve()) if self.args.library else ""
        line = [sys.executable, str(Path(__file__).resolve().parent), "--process"]
        return [*line, json.dumps({**given, "library": library}), *what]

    # ------------------------------------------------------------------------------------------------------- the report

    def show(self) -> None:
        """Print what was recorded since the last call."""
        for line, end in self.record.lines(self.shown):
            self.shown = end
            if line is not None and (text := report.progress(line)):
                self.say(text)

    def say(self, text: str) -> None:
        """A line with the time; lost if nobody reads standard output any more."""
        try:
            print(f"{time.monotonic() - START:6.1f} s  {text}", flush=True)
        except OSError:
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115

    def conclude(self) -> int:
        """Write and print the summary."""
        self.record.append("end", seconds=round(time.monotonic() - START, 1))
        return report.conclude(self.args.out, self.record.read(), self.args.json)

    def give_up(self, *_: object) -> NoReturn:
        """The last resort, e.g. when the disk or the terminal blocks: end at the time limit, without a summary."""
        processes.kill_all()
        os._exit(1)


def differences(earlier: Contents, run: dict[str, Any]) -> str:
    """How this machine differs from that of the recorded run, or ""."""
    if not earlier.runs:
        return ""
    before = earlier.runs[0]
    told = []
    for name in ("rehearsal", "device", "versions"):
        old, new = before[name], run[name]
        if isinstance(old, dict):
            told += [f"{key} {old.get(key)}, now {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
        elif old != new:
            told.append(f"{name} {old}, now {new}")
    return "; ".join(told)


def set_aside(path: Path) -> None:
    """Rename the record of an earlier run: nothing is overwritten."""
    number = 1
    while path.exists() and path.with_suffix(f".{number}.jsonl").exists():
        number += 1
    if path.exists():
        path.rename(path.with_suffix(f".{number}.jsonl"))


def inner(argv: Sequence[str]) -> int:
    """A process that `main` started: `SETTINGS probe`, or `SETTINGS section NAME NUMBER COUNT END`."""
    settings = json.loads(argv[0])
    processes.end_with_parent(settings["parent"])
    import_checkout.ensure()
    if argv[1] == "probe":
        import probe

        return probe.main(settings["rehearse"])
    import section_process

    (section,) = chosen(argv[2])
    library = Path(settings["library"]) if settings["library"] else None
    share = int(argv[3]), int(argv[4])
    record = Record(Path(settings["out"]))
    return section_process.main(section, record, settings["rehearse"], share, library, float(argv[5]))
