"""The fuzzers: that they report what must not happen, that their cases can be made again, and (slow) that nothing is found.

`MEMREWRITE_FUZZ_SECONDS` and `MEMREWRITE_FUZZ_SEED` run longer, and other cases.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from . import planted
from .cases import Folders
from .guard import ROOT
from .hostile import Hostile, hostile
from .kinds import KINDS, Kind
from .mutate_bytes import change_bytes, change_npz, change_safetensors
from .mutate_json import change_json, change_yaml
from .runner import Result, fuzz

SECONDS = float(os.environ.get("MEMREWRITE_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("MEMREWRITE_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def reported() -> Result:
    """What the fuzzer reports about the planted reader, one case for each act."""
    return fuzz("fuzz.planted:acts", seconds=60, cases=len(planted.ACTS), deadline=0.2)


@pytest.mark.parametrize("number", [pytest.param(n, id=name) for n, (name, _, _) in enumerate(planted.ACTS)])
def test_whatever_a_reader_must_not_do_is_reported(reported: Result, number: int) -> None:
    _, _, wanted = planted.ACTS[number]
    assert reported.outcomes[number].startswith(wanted)


def test_a_kind_that_nothing_reads_is_an_error() -> None:
    """Otherwise a fuzzer whose cases are all refused for one reason would find nothing for ever."""
    with pytest.raises(RuntimeError, match="did not start"):
        fuzz("fuzz.planted:broken", seconds=1)


SAMPLES: dict[str, tuple[Any, bytes]] = {
    "json": (change_json, json.dumps({"a": [1, 2.5, "b", None], "c": {"d": True, "e": {}}}).encode()),
    "yaml": (change_yaml, yaml.safe_dump({"memrewrite": 1, "pools": {"a": {"keys": 8}}, "replace": [1]}).encode()),
    "safetensors": (change_safetensors, b"\x08" + b"\0" * 7 + b'{"a": 1}' + b"\0" * 8),
    "npz": (change_npz, b"PK\x05\x06" + b"\0" * 18),
    "bytes": (change_bytes, bytes(range(256))),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_changes_are_many_and_can_be_made_again(name: str, tmp_path: Path) -> None:
    change, data = SAMPLES[name]
    words = hostile(tmp_path)
    made = [change(Random(number), data, data, words) for number in range(200)]
    assert made == [change(Random(number), data, data, words) for number in range(200)]
    assert len(set(made)) > 60
    assert sum(one != data for one in made) > 150


def test_hostile_text_is_recognised(tmp_path: Path) -> None:
    """Code among the words contains the mark, and leaves a trace where it may not."""
    words: Hostile = hostile(tmp_path / "decoy")
    assert all("zqx" in word for word in words.words if "open(" in word or "system(" in word)
    folders = Folders(tmp_path)
    folders.make()
    assert (folders.decoy / "secret.bin").stat().st_size


def test_the_documentation_has_a_row_for_each_kind() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert not [name for name in KINDS if f"\n| {name} | " not in text]


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_damaged_file_is_read_or_refused(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    result = fuzz(kind.name, seconds=SECONDS, seed=SEED)
    with capsys.disabled():
        print(f"\n{result.line()}")
    assert result.tried > SECONDS / 2
    assert not result.failures, "\n".join(
        f"{f['count']} × {f['what']} at {f['where']}: {f.get('path')}" for f in result.failures.values()
    )
