"""Kills processes while they write: SIGKILL at random moments, spread over the operation. Arguments: count, seed, folder.

Flow: one process builds two results, "old" and "new" → per kill it forks a child that writes the new one, kills it, and looks:
the target is absent, old or new, and complete (by hashes) → a save beside it → nothing else is left. The last line is a JSON
document: tried, failed, and per operation how often the target was absent, old or new afterwards.

There is no command that converts a saved directory; `convert` is what a user does instead: load, `half()`, save over it. An
export is killed while it writes; its tracing, which writes nothing, is done before.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import tiny
import torch
from onnx import numpy_helper

import memrewrite
from memrewrite.atomic_write import replacing
from memrewrite.cli.output_path import write_page
from memrewrite.output_target import Target
from memrewrite.passes.onnx import file as onnx_file
from memrewrite.passes.onnx.export import _in_onnx
from memrewrite.passes.onnx.prepare import prepared
from memrewrite.passes.storage.manifest import MANIFEST, read_manifest

PAGES = {"old": "<p>old</p>" * 30_000, "new": "<p>new</p>" * 30_000}


@dataclass(frozen=True)
class Operation:
    """`write(path, which)` writes a result; `look(path)` checks that what is there is complete, and returns its hash."""

    name: str
    target: str
    write: Callable[[Path, str], None]
    look: Callable[[Path], str]
    overwrite: bool
    prepare: Callable[[Path], None] | None = None  # writes the old result, if `write(path, "old")` does not


def look_directory(path: Path) -> str:
    files = read_manifest(path, every_bit=True).manifest.files
    assert {p.name for p in path.iterdir()} == {*files, MANIFEST}
    return files["model.safetensors"].sha256


def look_onnx(path: Path) -> str:
    tensors = onnx.load(path).graph.initializer  # with the file of weights that it names
    return hashlib.sha256(b"".join(t.name.encode() + numpy_helper.to_array(t).tobytes() for t in tensors)).hexdigest()


def look_page(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def operations() -> list[Operation]:
    models = {"old": tiny.rewritten("modular")[0], "new": tiny.rewritten("modular")[0]}
    inputs = tiny.rewritten("modular")[1]
    torch.nn.init.ones_(models["new"].memory.shared.values)
    graphs: dict[str, Any] = {}
    for which, model in models.items():
        ready = prepared(model.eval(), inputs, None, with_past=False)
        graphs[which] = _in_onnx(ready, "both", ready.axes, allow_inexact=False, report=lambda _: None).graph
        onnx_file.describe(graphs[which], {})

    def save(path: Path, which: str) -> None:
        memrewrite.save(models[which], path, overwrite=which == "old" or path.exists())

    def convert(path: Path, which: str) -> None:
        memrewrite.save(memrewrite.load(path, tiny.modular()).half(), path, overwrite=True)

    def export(path: Path, which: str) -> None:
        onnx_file.LARGE = 2**30
        onnx_file.write(graphs[which], onnx_file.output(path, overwrite=path.exists()))

    def export_large(path: Path, which: str) -> None:
        onnx_file.LARGE = 1000
        onnx_file.write(graphs[which], onnx_file.output(path, overwrite=path.exists()))

    def page(path: Path, which: str) -> None:
        write_page(Target(path, overwrite=path.exists()), PAGES[which])

    made = []
    for overwrite in (False, True):
        how = "overwrite" if overwrite else "new"
        made += [
            Operation(f"save {how}", "out", save, look_directory, overwrite),
            Operation(f"export {how}", "m.onnx", export, look_onnx, overwrite),
            Operation(f"export {how}, two files", "m.onnx", export_large, look_onnx, overwrite),
            Operation(f"page {how}", "p.html", page, look_page, overwrite),
        ]
    return [*made, Operation("convert", "out", convert, look_directory, overwrite=True, prepare=lambda path: save(path, "old"))]


class Loop:
    """One operation: its two results by hash, its duration, and the outcomes of its kills."""

    def __init__(self, operation: Operation, folder: Path) -> None:
        self.operation, self.folder, self.outcomes = operation, folder, {"absent": 0, "old": 0, "new": 0}
        self.interrupted, self.failures = 0, list[str]()
        old, scratch = folder / "old", folder / "scratch"
        old.mkdir(parents=True)
        (operation.prepare or (lambda path: operation.write(path, "old")))(old / operation.target)
        self.hashes = {operation.look(old / operation.target): "old"}
        durations = []
        for _ in range(5):
            self.reset(scratch)
            child, started = self.start(scratch)
            begun = time.perf_counter()
            assert os.waitpid(child, 0)[1] == 0
            durations.append(time.perf_counter() - begun)
            os.close(started)
        self.hashes[operation.look(scratch / operation.target)] = "new"
        assert len(self.hashes) == 2
        self.duration = sorted(durations)[2]

    def reset(self, scratch: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(self.folder / "old", scratch) if self.operation.overwrite else scratch.mkdir()

    def start(self, scratch: Path) -> tuple[int, int]:
        """A child that writes the new result; returns when it begins."""
        gate, begins = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.write(begins, b"x")
                self.operation.write(scratch / self.operation.target, "new")
                code = 0
            finally:
                os._exit(code)
        os.close(begins)
        os.read(gate, 1)
        return child, gate

    def kill(self, moment: float) -> None:
        """One kill at `moment`, a fraction of the duration, and what it left."""
        scratch = self.folder / "scratch"
        self.reset(scratch)
        child, gate = self.start(scratch)
        time.sleep(moment * self.duration)
        os.kill(child, signal.SIGKILL)  # a child that has ended is a zombie until it is waited for: the number is still its own
        ended = os.waitpid(child, 0)[1]
        os.close(gate)
        self.interrupted += os.WIFSIGNALED(ended)
        try:
            if not os.WIFSIGNALED(ended):
                assert os.waitstatus_to_exitcode(ended) == 0, "the operation failed"
            outcome = self.outcome(scratch)
            with replacing(Target(scratch / "beside")) as draft:
                draft.write_text("")
            assert self.outcome(scratch) == outcome, "the next save changed it"
            left = (
                {path.name for path in scratch.iterdir()} - {"beside"} - (set() if outcome == "absent" else self.files(scratch))
            )
            assert not left, f"left: {sorted(left)}"
        except Exception as error:  # noqa: BLE001 - it is counted and printed
            self.failures.append(f"{self.operation.name} at {moment:.3f}: {type(error).__name__}: {error}")
        else:
            self.outcomes[outcome] += 1

    def outcome(self, scratch: Path) -> str:
        target = scratch / self.operation.target
        if not os.path.lexists(target):
            assert not self.operation.overwrite, "the old result is gone"
            return "absent"
        return self.hashes[self.operation.look(target)]

    def files(self, scratch: Path) -> set[str]:
        """The target and the file of weights that it names."""
        target = scratch / self.operation.target
        sides = [p.name for p in scratch.glob("*.data") if p.name.encode() in target.read_bytes()]
        assert len(sides) == self.operation.name.endswith("two files")
        return {target.name, *sides}


def main(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the kills and return the document."""
    rng = random.Random(seed)
    loops = [Loop(operation, folder / str(number)) for number, operation in enumerate(operations())]
    for number in range(count):
        turn, per_loop = number // len(loops), -(-count // len(loops))
        loops[number % len(loops)].kill(1.15 * (turn + rng.random()) / per_loop)
    failures = [failure for loop in loops for failure in loop.failures]
    table = {loop.operation.name: {**loop.outcomes, "killed": loop.interrupted} for loop in loops}
    return {"tried": count, "failed": len(failures), "operations": table, "failures": failures}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
