"""Every architecture of the zoo: which of its MLPs are found, how they can be substituted, and which checks pass.

    python benchmarks/zoo.py [NAMES] [--every N] [--keep JSON] [--zoo FOLDER] [--jobs 2] [--json OUT] [--table docs/zoo.md]
        [--chain JSONL]

The zoo (`zoo.py`, and `score.py`, which compares findings with the ground truth) is a folder next to the repository, or the
folder in MEMREWRITE_ZOO. For each architecture, MLPs are located, and a memory layer with zero output is added in parallel with
every MLP, with all checks. Workers are separate processes: a worker that dies or hangs gives one failed row. Exit code 1 if an
MLP is missed or invented, or if anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from zoo_page import KINDS, Row, flaws, page, show, totals

ROOT = Path(__file__).resolve().parent.parent
ZOO = Path(os.environ.get("MEMREWRITE_ZOO", ROOT.parent / "shared" / "zoo"))


# ------------------------------------------------------------------------------------------------------------- one row


def load(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The zoo's two modules. Exits with a message if they do not exist."""
    for name in ("zoo.py", "score.py"):
        if not (folder / name).is_file():
            sys.exit(f"no zoo: {folder / name} does not exist; pass its folder with --zoo FOLDER")
    sys.path.insert(0, str(folder.resolve()))
    return importlib.import_module("zoo"), importlib.import_module("score")


def measure(zoo: ModuleType, score: ModuleType, name: str) -> Row:
    """Locate and rewrite one architecture; returns the results and the time."""
    import memrewrite
    from memrewrite.errors import VerificationError

    seen = SimpleNamespace(located=None, report=None, seconds={})

    def timed(verb: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                seen.seconds.setdefault(verb, time.perf_counter() - start)

        return run

    def inspect(*args: Any) -> Any:
        seen.located = memrewrite.inspect(*args)
        return seen.located

    def apply(*args: Any) -> Any:
        try:
            seen.report = memrewrite.apply(*args)
        except VerificationError as error:
            seen.report = error.report
            raise
        return seen.report

    watched = SimpleNamespace(inspect=timed("inspect", inspect), apply=timed("apply", apply))
    case = zoo.CASES[name]
    row: Row = {"name": name, "truth": len(case.live)}
    for verb, does in (("locating", score.locate), ("surgery", score.surgery)):
        if verb == "surgery" and not (seen.located and seen.located.sites):
            break
        try:
            made = does(case, watched)
        except Exception as error:  # noqa: BLE001 - the row reports it
            row["error"] = f"{verb}: {type(error).__name__}: {str(error).strip()}"[:500]
            break
        row |= made if verb == "locating" else {"surgery": made}
    return row | _seen(seen)


def _seen(seen: SimpleNamespace) -> Row:
    row: Row = {"seconds": seen.seconds}
    if seen.located is not None:
        kinds = Counter(min((b.kind for b in site.bindings), key=KINDS.index) for site in seen.located.sites)
        row |= {"captured": seen.located.captured, "bindings": dict(kinds)}
        row["why_none"] = {s.path: b.why for s in seen.located.sites for b in s.bindings if b.kind == "none"}
    if seen.report is not None:
        row["checks"] = {check.name: [check.outcome, check.sentence] for check in seen.report.checks}
    return row


def serve(zoo: ModuleType, score: ModuleType) -> None:
    """A worker: one name per input line, one row per output line. Output printed by models goes to stderr."""
    import torch

    torch.set_num_threads(1)
    answers = sys.stdout
    for line in sys.stdin:
        with redirect_stdout(sys.stderr):
            row = measure(zoo, score, line.strip())
        print(json.dumps(row), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------------------- workers


class Worker:
    """A process that measures one architecture after another; it is restarted after it died or hung."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.command = [sys.executable, __file__, "--worker", "--zoo", str(folder)]
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def row(self, name: str) -> Row:
        """The row of one architecture, or a failed row if the process died or hung."""
        process = self.process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            self.stop()
            return {"name": name, "error": f"it took more than {self.timeout:.0f} s"}
        except BrokenPipeError:
            line = None
        if line is None:
            code = process.wait()
            self.stop()
            return {"name": name, "error": f"the worker died with exit code {code}"}
        row: Row = json.loads(line)
        return row

    def stop(self) -> None:
        """End the process; the next row starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _started(self) -> subprocess.Popen[str]:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(self.process.stdout, self.lines), daemon=True).start()
        return self.process


def _pump(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def measure_all(names: list[str], folder: Path, jobs: int, timeout: float, report: Callable[[Row], None]) -> list[Row]:
    """Rows in the order of `names`, measured by `jobs` parallel workers; `report` is called with each row as it is ready."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        todo.put(name)
    rows: dict[str, Row] = {}

    def work() -> None:
        worker = Worker(folder, timeout)
        try:
            while True:
                name = todo.get_nowait()
                rows[name] = worker.row(name)
                report(rows[name])
        except queue.Empty:
            return
        finally:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[name] for name in names]


def main() -> int:
    """Measure, show, write; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAMES", help="architectures; default: all")
    parser.add_argument("--names", dest="more", nargs="+", default=[], metavar="NAME", help="more architectures")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th architecture")
    parser.add_argument("--zoo", type=Path, default=ZOO, metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument(
        "--keep", type=Path, metavar="JSON", help="JSON of an earlier run: its rows are used for architectures not named now"
    )
    parser.add_argument("--table", type=Path, metavar="PAGE", help="write the docs page")
    parser.add_argument("--chain", type=Path, metavar="JSONL", help="results of the zoo's chain.py, for the page")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    zoo, score = load(args.zoo)
    if args.worker:
        serve(zoo, score)
        return 0
    names = [*args.names, *args.more] or list(zoo.CASES)
    unknown = [name for name in names if name not in zoo.CASES]
    if unknown:
        parser.error(f"the zoo has no {', '.join(unknown)}")
    names = names[:: args.every]

    def report(row: Row) -> None:
        print(f"{row['name']}: {flaws(row) or 'correct'}"[:200], file=sys.stderr, flush=True)

    rows = measure_all(names, args.zoo, args.jobs, args.timeout, report)
    if args.keep:
        measured = {row["name"]: row for row in (*json.loads(args.keep.read_text(encoding="utf-8"))["rows"], *rows)}
        rows, names = [measured[name] for name in zoo.CASES if name in measured], [n for n in zoo.CASES if n in measured]
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"total": totals(rows), "rows": rows}, indent=1), encoding="utf-8")
    if args.table:
        subset = "" if len(names) == len(zoo.CASES) else f" --every {args.every}" if args.every > 1 else " " + " ".join(names)
        subset += " --keep JSON" if args.keep else ""  # some rows are of an earlier run
        subset += " --chain JSONL" if args.chain else ""
        chain = [json.loads(line) for line in args.chain.read_text(encoding="utf-8").splitlines()] if args.chain else []
        args.table.write_text(page(rows, f"python benchmarks/zoo.py{subset} --table docs/zoo.md", chain), encoding="utf-8")
    return 1 if totals(rows)["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
