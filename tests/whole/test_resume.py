"""A training run that is saved and resumed in another process has the losses of one that is not interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import resumed


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Losses of both halves of every variant: the first in this process, the second in another."""
    folder = tmp_path_factory.mktemp("runs")
    first = {}
    for name, variant in resumed.VARIANTS.items():
        (folder / name).mkdir()
        first[name] = resumed.first_half(variant, folder / name)
    same = {**os.environ, "XDG_CACHE_HOME": str(folder)}  # without a native library too: other kernels round differently
    done = subprocess.run([sys.executable, resumed.__file__, folder], capture_output=True, text=True, check=False, env=same)
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout)
    return {name: losses + second[name] for name, losses in first.items()}


@pytest.mark.parametrize("name", resumed.VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, halves: dict[str, list[str]]) -> None:
    wanted = resumed.uninterrupted(resumed.VARIANTS[name])
    assert halves[name] == wanted
    assert len(set(wanted)) == len(wanted)
