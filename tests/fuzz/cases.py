"""One case: a copy of a seed in which a file is changed in a few steps, all determined by kind, seed and number."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .hostile import Hostile, hostile
from .kinds import Kind, Target

MOST_STEPS = 5


@dataclass(frozen=True)
class Folders:
    """Where a run works. `decoy` is beside the case, and nothing may touch it."""

    base: Path

    @property
    def seeds(self) -> Path:
        return self.base / "seeds"

    @property
    def decoy(self) -> Path:
        return self.base / "decoy"

    @property
    def case(self) -> Path:
        return self.base / "case"

    def make(self) -> None:
        """Create the folders, and the files that hostile paths name."""
        for folder in (self.seeds, self.decoy):
            folder.mkdir(parents=True, exist_ok=True)
        for name in ("secret.bin", "secret.safetensors"):
            if not (self.decoy / name).exists():
                (self.decoy / name).write_bytes(b"secret" * 100)


@dataclass(frozen=True)
class Case:
    """A changed file in the case's directory, what it was before, and the call that reads it."""

    file: Path
    before: bytes
    after: bytes
    steps: int
    target: Target


def make_case(kind: Kind, folders: Folders, seed: int, number: int, steps: Collection[int] | None = None) -> Case:
    """Write a case into `folders.case`; `steps`: apply only these changes."""
    rng = Random(f"{kind.name}:{seed}:{number}")
    words: Hostile = hostile(folders.decoy)
    files = kind.files(folders.seeds)
    source, other = files[number % len(files)], rng.choice(files).read_bytes()
    target, count = rng.choice(kind.targets), min(MOST_STEPS, 1 + int(rng.expovariate(0.9)))
    shutil.rmtree(folders.case, ignore_errors=True)
    shutil.copytree(source.parent, folders.case)
    file = folders.case / source.name
    before = after = file.read_bytes()
    for step in range(count):
        if steps is None or step in steps:
            after = kind.change(Random(f"{kind.name}:{seed}:{number}:{step}"), after, other, words)
    file.write_bytes(after)
    kind.finish(folders.case, file, rng, folders.decoy)
    return Case(file, before, after, count, target)
