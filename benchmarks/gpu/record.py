"""The record of a run, DIR/results.jsonl: one JSON object a line, on the disk as soon as it exists; written by all processes.

Kinds of lines: `run` (device, versions), `cases` (names of a section's cases), `begin`, `result`, `done` and `failed` of a
case, `value` (a rate that other sections read), `end` (seconds of the run). A line that was cut off is skipped when reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from results import Result

FIELDS = {f.name for f in fields(Result)}
WHOLE = ""  # in place of a case's name: the whole section


@dataclass
class CaseRecord:
    """What is recorded of a case. An attempt that did not finish leaves the lines that it yielded."""

    state: str = "listed"  # listed, begun, done, or failed
    why: str = ""  # of a failure
    earlier: list[Result] = field(default_factory=list)
    latest: list[Result] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """The lines of the last attempt, and those of earlier ones that it did not give again."""
        again = {result.case for result in self.latest}
        return [result for result in self.earlier if result.case not in again] + self.latest

    def add(self, line: dict[str, Any]) -> None:
        """Apply a line of this case."""
        if line["kind"] == "result":
            targets = [(str(text), met) for text, met in line["targets"]]
            self.latest.append(Result(**{**{k: v for k, v in line.items() if k in FIELDS}, "targets": targets}))
        elif line["kind"] == "begin":
            self.state, self.earlier, self.latest = "begun", self.results, []
        elif line["kind"] == "done":
            self.state, self.why, self.earlier = "done", "", []
        elif line["kind"] == "failed":
            self.state, self.why = "failed", line["why"]


@dataclass
class Contents:
    """What a record says: runs, cases by section and name (in the order of the section), shared values."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    cases: dict[str, dict[str, CaseRecord]] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)  # sections whose cases are known
    values: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    torn: int = 0  # lines that could not be read

    def add(self, line: dict[str, Any]) -> bool:
        """Apply a line; False if it lacks what its kind must have."""
        try:
            self._add(line)
        except (KeyError, TypeError, ValueError):
            return False
        return True

    def _add(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "run":
            self.runs.append(line)
        elif kind == "value":
            self.values[line["name"]] = line["value"]
        elif kind == "end":
            self.seconds += line["seconds"]
        elif kind == "cases":
            before = self.cases.get(line["section"], {})
            self.cases[line["section"]] = {name: before.get(name, CaseRecord()) for name in line["names"]}
            self.listed.add(line["section"])
        else:
            self.cases.setdefault(line["section"], {}).setdefault(line["of"], CaseRecord()).add(line)

    def unfinished(self, section: str) -> list[str]:
        """The cases of a section that are not done."""
        return [name for name, case in self.cases.get(section, {}).items() if case.state != "done"]

    def complete(self, section: str) -> bool:
        """True if all cases of a section are known and done."""
        return section in self.listed and not self.unfinished(section)


class Record:
    """Appends lines to the file, and reads them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"

    def append(self, kind: str, **line: Any) -> None:
        """One line, on the disk when this returns. Lines of several processes do not mix: each is one write."""
        text = json.dumps({"kind": kind, **line}, ensure_ascii=False, default=str) + "\n"
        with self.path.open("ab+", buffering=0) as file:
            if file.tell():  # the end of a line that was cut off must not swallow this one
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())
            os.fsync(file.fileno())

    def result(self, section: str, of: str, result: Result) -> None:
        """A line of the table that the case `of` gave."""
        self.append("result", of=of, **{**asdict(result), "section": section})

    def lines(self, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Every complete line from `offset` on (None: unreadable), and the offset of the next."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for text in file:
                offset += len(text)
                if text.endswith(b"\n"):
                    yield _parsed(text), offset

    def read(self) -> Contents:
        """Everything in the file; a last line that was cut off counts as unreadable."""
        contents, end = Contents(), 0
        for line, end in self.lines():  # noqa: B007 - `end` is used below
            if line is None or not contents.add(line):
                contents.torn += 1
        contents.torn += self.path.is_file() and end < self.path.stat().st_size
        return contents


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # also UnicodeDecodeError
        return None
    return line if isinstance(line, dict) and "kind" in line else None
