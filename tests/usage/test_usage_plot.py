"""The figure of counted reads: what it shows, and what is written where. Its looks were judged by eye."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_layers import stack

import memrewrite
from memrewrite.errors import UserError
from memrewrite.usage.counter import ReadCounter
from memrewrite.usage.plot import MOST_CELLS, figure
from memrewrite.usage.statistics import UsageStatistics, layer_usage, pool_usage
from memrewrite.usage.watch import Usage

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def usage() -> Usage:
    with memrewrite.watch(model := stack()) as counted:
        model(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    return counted


def test_lines_and_maps_show_the_counts(usage: Usage) -> None:
    drawn = usage.plot()
    lines, *maps = [axes for axes in drawn.axes if axes.get_title()]
    assert lines.get_title() == f"pool shared: 25 slots,\n{usage.statistics().pools[0].share_read:.0%} read".replace("%", " %")
    assert [line.get_label() for line in lines.lines] == ["0", "1", "2"]
    for line, panel, reads in zip(lines.lines, maps, usage.reads.values(), strict=True):
        found = reads[reads > 0].sort(descending=True).values
        assert list(line.get_xdata()) == list(range(1, len(found) + 1))
        assert list(line.get_ydata()) == found.tolist()
        shown = np.ma.filled(panel.images[0].get_array(), np.nan)
        assert np.array_equal(np.nan_to_num(shown), reads.view(5, 5).double().numpy())
        assert np.isnan(shown).sum() == (reads == 0).sum()  # white
    for panel in (lines, *maps):
        assert panel.get_xlabel()
        assert panel.get_ylabel()
    assert [axes.get_ylabel() for axes in drawn.axes if axes not in (lines, *maps)] == ["reads per slot"]


@pytest.mark.parametrize("keys", [1, MOST_CELLS, MOST_CELLS + 1, 150])
def test_large_grids_are_drawn_in_cells_of_their_mean(keys: int) -> None:
    counter = ReadCounter((keys, keys), 1, 1, gated=False, device=torch.device("cpu"))
    counter.reads.copy_(torch.randint(1, 9, (keys**2,), generator=torch.Generator().manual_seed(0)))
    counter.weight.copy_(counter.reads)
    layers, pools = (layer_usage("a.memory", "pkm", "p", counter),), (pool_usage("p", {"a.memory": counter}),)
    drawn = figure(UsageStatistics(layers=layers, pools=pools), {"a.memory": (counter.grid, counter.reads)})
    shown = drawn.axes[1].images[0].get_array()
    side = -(-keys // MOST_CELLS)
    expected = [
        [block.double().mean().item() for block in row.split(side, 1)] for row in counter.reads.view(keys, keys).split(side, 0)
    ]
    np.testing.assert_allclose(shown, expected)
    assert drawn.axes[1].get_title().startswith("a.memory\n100 % read")


def test_a_memory_that_was_not_read_can_be_drawn(tmp_path: Path) -> None:
    with memrewrite.watch(stack()) as nothing:
        pass
    nothing.plot(tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").stat().st_size


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_files(usage: Usage, tmp_path: Path, suffix: str, start: bytes) -> None:
    file = tmp_path / f"usage{suffix}"
    usage.plot(file)
    assert file.read_bytes().startswith(start)
    with pytest.raises(UserError, match="exists"):
        usage.plot(file)
    usage.plot(str(file), overwrite=True)
    assert list(tmp_path.iterdir()) == [file]


def test_bad_names(usage: Usage, tmp_path: Path) -> None:
    for name in ("usage.gif", "usage"):
        with pytest.raises(UserError, match="no name of a plot"):
            usage.plot(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        usage.plot(tmp_path / "none" / "usage.png")


def test_pyplot_and_its_backend_are_left_alone() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); import memory_layers, memrewrite, torch\n"
    code += "m = memory_layers.layer()\nwith memrewrite.watch(m) as u: m(torch.randn(3, 8))\n"
    code += "assert 'matplotlib' not in sys.modules; u.plot(); print('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["False"]


def test_without_matplotlib(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs matplotlib"):
        usage.plot()
