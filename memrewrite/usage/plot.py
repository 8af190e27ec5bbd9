"""Draws counted reads: for each pool the reads of its slots in descending order, and for each layer a map over the key grid.

All shades are ordered by lightness and lines differ in their dashes too, so that the figure can be read in grey. matplotlib is
imported by the first figure; its global state (pyplot) is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memrewrite.errors import UserError
from memrewrite.usage.statistics import LayerUsage, PoolUsage, SlotUsage, UsageStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

Grid = tuple[int, int]
SUFFIXES = (".png", ".svg", ".pdf")
MOST_CELLS = 64  # per side of a map: a cell is still visible at half size
MOST_POINTS = 512  # of a line
MOST_NAMES = 4  # in a legend
COLUMNS, WIDE, HIGH = 4, 3.4, 3.3  # panels of one row; inches of one panel
FONT = 12
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def figure(statistics: UsageStatistics, counted: Mapping[str, tuple[Grid, Tensor]]) -> Figure:
    """The figure of these statistics.

    Args:
        statistics: The numbers that titles state.
        counted: By layer: rows and columns of its slots, and int64 [N], how often each was read.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a plot needs matplotlib", hint="pip install 'memrewrite[plot]'") from error
    blocks = _blocks(statistics)
    rows = [math.ceil((1 + len(layers)) / COLUMNS) for _, layers in blocks]
    columns = max(min(COLUMNS, 1 + len(layers)) for _, layers in blocks)
    drawn = Figure(figsize=(WIDE * columns, HIGH * sum(rows)), dpi=150, layout="constrained")
    parts = drawn.subfigures(len(blocks), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, (pool, layers), high in zip(parts, blocks, rows, strict=True):
        axes = list(part.subplots(high, columns, squeeze=False).flat)
        names = _short([layer.layer for layer in layers])
        _lines(axes[0], pool, {names[layer.layer]: counted[layer.layer][1] for layer in layers})
        _maps(axes[1:], layers, names, counted)
        for unused in axes[1 + len(layers) :]:
            unused.set_axis_off()
    return drawn


def write(drawn: Figure, path: Path, *, overwrite: bool) -> None:
    """Write the figure in one step. Raises `UserError` as `check_path` does, or if the system refuses it."""
    from memrewrite.atomic_write import replacing
    from memrewrite.output_target import Target

    check_path(path)
    with replacing(Target(path, overwrite=overwrite, error=UserError)) as draft:
        drawn.savefig(draft, format=path.suffix[1:])


def check_path(path: Path) -> None:
    """Raise `UserError` unless the path has the suffix of a format that can be written."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{str(path)!r} is no name of a plot", hint=f"one of {', '.join(SUFFIXES)}: usage.png")


def _blocks(statistics: UsageStatistics) -> list[tuple[SlotUsage, list[LayerUsage]]]:
    """The pools with their layers; a layer without a pool is a block of its own."""
    found: list[tuple[SlotUsage, list[LayerUsage]]] = [
        (pool, [layer for layer in statistics.layers if layer.pool == pool.pool]) for pool in statistics.pools
    ]
    return found + [(layer, [layer]) for layer in statistics.layers if not layer.pool]


def _short(names: list[str]) -> dict[str, str]:
    """Names without the parts, between dots, that all of them begin or end with; a single name is not shortened."""
    if len(names) == 1:
        return {names[0]: names[0]}
    parts = [name.split(".") for name in names]
    shared = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    begin = shared.index(False) if False in shared else len(shared)
    ends = [len(set(column)) == 1 for column in zip(*(reversed(p) for p in parts), strict=False)]
    end = ends.index(False) if False in ends else 0
    short = {name: ".".join(p[max(0, begin - 1) : len(p) - end] or p) for name, p in zip(names, parts, strict=True)}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _lines(axes: Axes, usage: SlotUsage, layers: Mapping[str, Tensor]) -> None:
    """Reads per slot over the slot's rank, most read first, a line for each layer; slots that were not read have none."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    apart = max(1, (len(layers) - 1) / (MOST_NAMES - 1))  # the names in the legend are spread over all layers
    named = {round(apart * number) for number in range(MOST_NAMES)}
    for number, (name, reads) in enumerate(layers.items()):
        found = reads[reads > 0].sort(descending=True).values.cpu()
        if len(found):
            at = sorted({round(len(found) ** (step / MOST_POINTS)) for step in range(MOST_POINTS + 1)})
            color = shades(0.7 * number / max(1, len(layers) - 1))
            label = name if number in named else None
            line = DASHES[number % len(DASHES)]
            axes.plot(at, [int(found[rank - 1]) for rank in at], color=color, ls=line, lw=2, label=label)
    axes.set(xscale="log", yscale="log", xlim=(1, max(2, usage.slots)))
    axes.set_ylim(bottom=0.8)
    axes.set_xlabel("slots, most read first", fontsize=FONT)
    axes.set_ylabel("reads of the slot", fontsize=FONT)
    pool = f"pool {usage.pool}: " if isinstance(usage, PoolUsage) else ""
    axes.set_title(f"{pool}{usage.slots:,} slots,\n{_percent(usage.share_read)} read", fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(color="0.88", lw=0.7)
    if len(layers) > 1 and axes.lines:
        axes.legend(fontsize=FONT - 2, loc="lower left", framealpha=0.85, handlelength=2.6)


def _maps(
    panels: list[Axes], layers: list[LayerUsage], names: Mapping[str, str], counted: Mapping[str, tuple[Grid, Tensor]]
) -> None:
    """For each layer, its reads over the grid of both halves' keys; one scale for all layers of a pool."""
    maps = {layer.layer: _cells(counted[layer.layer][1], counted[layer.layer][0]) for layer in layers}
    (rows, columns), (_, (down, right)) = counted[layers[0].layer][0], maps[layers[0].layer]
    area = down * right
    scale = _scale(1 / area, max(float(cells.max()) for cells, _ in maps.values()))
    for layer, axes in zip(layers, panels, strict=False):
        cells = maps[layer.layer][0]
        image = axes.imshow(
            cells.where(cells > 0, math.nan).cpu().numpy(),  # cells without reads are white
            norm=scale,
            cmap=_shades(),
            extent=(0.0, float(columns), float(rows), 0.0),
            aspect="auto" if rows == 1 else "equal",
            interpolation="nearest",
        )
        axes.set_xlabel("key of the second half" if rows > 1 else "slot", fontsize=FONT)
        axes.set_ylabel("key of the first half" if rows > 1 else "", fontsize=FONT)
        shares = f"{_percent(layer.share_read)} read; at random {_percent(layer.share_if_uniform)}"
        axes.set_title(f"{names[layer.layer]}\n{shares}", fontsize=FONT)
        axes.yaxis.set_visible(rows > 1)
        axes.tick_params(labelsize=FONT - 1)
    bar = panels[0].figure.colorbar(image, ax=panels[: len(layers)], pad=0.02, aspect=18, shrink=0.9)
    bar.ax.tick_params(labelsize=FONT - 1)
    bar.set_label("reads per slot" + (f",\nmean of {down} × {right} slots" if area > 1 else ""), fontsize=FONT)


def _scale(least: float, most: float) -> LogNorm:
    """Shades by the logarithm, from one read in a cell to the most; of one shade if there is no other number."""
    from matplotlib.colors import LogNorm

    return LogNorm(vmin=least, vmax=max(most, 2 * least))


def _shades() -> Colormap:
    """More reads are darker; the lightest shade is darker than the white of slots that were not read, in grey too."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap([colormaps["viridis"](0.82 * (1 - step / 255)) for step in range(256)])


def _cells(reads: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Mean reads per slot in cells of the grid, at most `MOST_CELLS` on a side; rows and columns of keys in one cell.

    Cells at the end of a side may have fewer slots; their mean is over those.
    """
    rows, columns = grid
    down, right = math.ceil(rows / MOST_CELLS), math.ceil(columns / MOST_CELLS)
    padding = (0, -columns % right, 0, -rows % down)
    both = torch.stack([reads.view(grid).double(), torch.ones(grid, dtype=torch.float64, device=reads.device)])
    padded = torch.nn.functional.pad(both, padding)
    sums = padded.view(2, padded.shape[1] // down, down, padded.shape[2] // right, right).sum((2, 4))
    return sums[0] / sums[1], (down, right)


def _percent(share: float) -> str:
    """A share in percent: `12 %`, `0.34 %`."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"
