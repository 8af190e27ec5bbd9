"""Nothing is lost by a kill: SIGKILL at random moments of every operation that writes (`tests/kill_loops.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOPS = Path(__file__).parent.parent / "kill_loops.py"


@pytest.mark.parametrize(
    ("count", "seed"),
    [pytest.param(45, 0, id="short"), pytest.param(1000, 1, id="long", marks=pytest.mark.slow)],
)
def test_kills(count: int, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(LOOPS), str(count), str(seed), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    operations = found["operations"]
    with capsys.disabled():
        print(f"\nkills: {found['tried']} tried, {found['failed']} failed, by operation: {json.dumps(operations)}")
    assert not found["failures"]
    assert found["tried"] == count
    assert len(operations) == 9
    assert all(row["killed"] for row in operations.values())  # the kills come before the end
    if count >= 1000:
        assert all(row["old"] + row["absent"] and row["new"] for row in operations.values())  # and on both sides of the rename
