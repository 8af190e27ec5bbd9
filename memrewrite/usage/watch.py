"""Watches a model: counts which slots its memory layers read, from `start` to `stop`.

Flow: each layer makes a counter → while it is watched, the layer adds every forward's reads to it, on the device → `statistics`
computes the numbers from the counts, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memrewrite.errors import ModelError, UserError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import find_pools
from memrewrite.usage.counter import ReadCounter
from memrewrite.usage.statistics import UsageStatistics, layer_usage, pool_usage, weight_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of names that wrappers of torch add


@contextmanager
def watch(model: nn.Module) -> Iterator[Usage]:
    """Count which slots the memory layers of `model` read inside of the `with` block.

    ```python
    with memrewrite.watch(model) as usage:
        model(**batch)
    print(usage.statistics().layers[0].share_read)
    ```

    The counts stay in `usage` after the block. Counting is exact, works in train and eval mode and in compiled models (which
    compile once more when watching begins), and copies nothing to the host. A forward that gradient checkpointing repeats in
    the backward counts once. Forwards of several threads all count. Counters take 16 bytes per slot and layer. A copy of the
    model made inside of the block is not watched, and an export inside of it contains no counting.

    Args:
        model: A model with memory layers, on the device that it runs on.

    Raises:
        ModelError: The model has no memory layers that read slots, a layer is on meta, or is watched already.
    """
    usage = Usage(model)
    usage.start()
    try:
        yield usage
    finally:
        usage.stop()


@dataclass(frozen=True)
class _Watched:
    """One layer, its pool's name, and its counter."""

    layer: MemoryLayer
    pool: str
    counter: ReadCounter


class Usage:
    """What the memory layers of a model read between `start` and `stop`, which `memrewrite.watch` calls.

    Args:
        model: As for `memrewrite.watch`; the errors too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = _watched_layers(model)
        if not self._watched:
            kinds = any(isinstance(module, MemoryLayer) for module in model.modules())
            what = "the memory layers of this model read no slots" if kinds else "this model has no memory layers to watch"
            hint = "watch a model that memrewrite.apply rewrote, or memrewrite.load loaded, with layers that read a pool"
            raise ModelError(what, where=type(model).__name__, hint=hint)

    # ------------------------------------------------------------------------------------------------------------ counting

    def start(self) -> None:
        """Begin to count, or go on. Raises `ModelError` if a layer is watched already; then nothing changes."""
        for name, watched in self._watched.items():
            if watched.layer.counter is not None:
                hint = "leave the other `with memrewrite.watch(...)` block first, or use its result"
                raise ModelError("the model is watched already", where=name, hint=hint)
        for watched in self._watched.values():
            watched.layer.counter = watched.counter

    def stop(self) -> None:
        """Stop counting; the counts stay. A layer is then as if it had never been watched."""
        for watched in self._watched.values():
            if watched.layer.counter is watched.counter:
                del watched.layer.counter

    def reset(self) -> None:
        """Set all counts to zero."""
        for watched in self._watched.values():
            for tensor in watched.counter.tensors:
                tensor.zero_()

    # ----------------------------------------------------------------------------------------------------- several processes

    def merge(self, other: Usage) -> None:
        """Add the counts of `other`, a run of the same model. Raises `UserError` if its layers differ; then nothing changes."""
        mine, theirs = self._shapes(), other._shapes()
        if mine != theirs:
            differing = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
            raise UserError("the counts of two different models cannot be added", where=differing, hint="watch the same model")
        for name, watched in self._watched.items():
            for tensor, more in zip(watched.counter.tensors, other._watched[name].counter.tensors, strict=True):
                tensor += more.to(tensor.device)

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Replace the counts by their sums over all processes of `group` (by default all), each of which calls this."""
        for watched in self._watched.values():
            for tensor in watched.counter.tensors:
                torch.distributed.all_reduce(tensor, group=group)

    def _shapes(self) -> dict[str, tuple[tuple[int, int], int, int]]:
        return {name: (w.counter.grid, w.counter.heads, w.counter.topk) for name, w in self._watched.items()}

    # ------------------------------------------------------------------------------------------------------------- results

    @property
    def reads(self) -> dict[str, Tensor]:
        """How often each layer read each slot: int64 [N] by path, on the layer's device; it is what the counters change."""
        return {name: watched.counter.reads for name, watched in self._watched.items()}

    @property
    def weight(self) -> dict[str, Tensor]:
        """The sum of the weights with which each layer read each slot: float64 [N] by path, exact to 1e-9 per read."""
        return {name: weight_of(watched.counter) for name, watched in self._watched.items()}

    def statistics(self) -> UsageStatistics:
        """The numbers of all layers and pools. This waits for the device."""
        layers = [layer_usage(name, w.layer.kind, w.pool, w.counter) for name, w in self._watched.items()]
        pools = [pool_usage(pool, counters) for pool, counters in self._by_pool().items() if pool]
        return UsageStatistics(layers=tuple(layers), pools=tuple(pools))

    def scalars(self) -> dict[str, float]:
        """The numbers that a training log shows, by names such as "memory/model.layers.2.mlp/share_read"."""
        statistics = self.statistics()
        found: dict[str, float] = {}
        for layer in statistics.layers:
            numbers = layer.model_dump(include={"tokens", "share_read", "kl_reads", "top_reads", "entropy", "gate_rms"})
            found |= {f"memory/{layer.layer}/{name}": float(value) for name, value in numbers.items() if value is not None}
        for pool in statistics.pools:
            numbers = pool.model_dump(include={"share_read", "kl_reads", "top_reads"})
            found |= {f"memory/{pool.pool}/{name}": float(value) for name, value in numbers.items() if value is not None}
            if pool.overlaps:
                found[f"memory/{pool.pool}/overlap"] = sum(o.reads for o in pool.overlaps) / len(pool.overlaps)
        return found

    def plot(self, path: str | Path | None = None, *, overwrite: bool = False) -> Figure:
        """Draw, per pool, the reads of its slots in descending order, and for each layer a map of the reads over the key grid.

        Args:
            path: A file to write, .png, .svg or .pdf. Default: none.
            overwrite: Replace the file.

        Returns:
            The figure.

        Raises:
            UserError: matplotlib is missing, the file exists, has another suffix, or cannot be written.
        """
        from memrewrite.usage.plot import figure, write

        drawn = figure(self.statistics(), {name: (w.counter.grid, w.counter.reads) for name, w in self._watched.items()})
        if path is not None:
            write(drawn, Path(path), overwrite=overwrite)
        return drawn

    def _by_pool(self) -> dict[str, dict[str, ReadCounter]]:
        found: dict[str, dict[str, ReadCounter]] = {}
        for name, watched in self._watched.items():
            found.setdefault(watched.pool, {})[name] = watched.counter
        return found


def _watched_layers(model: nn.Module) -> dict[str, _Watched]:
    """Every layer that reads slots, by its path, without the names that wrappers add."""
    pools = find_pools(model)
    names = {} if pools is None else {id(pool): name for name, pool in pools.named_children()}
    found: dict[str, _Watched] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, MemoryLayer):
            continue
        counter = layer.read_counter()
        if counter is None:
            continue
        name = ".".join(part for part in path.split(".") if part not in WRAPPERS) or "(root)"
        if counter.reads.is_meta:
            hint = "load its weights, or move it to a device"
            raise ModelError("a layer on meta reads nothing that could be counted", where=name, hint=hint)
        pool = "" if layer.pool is None else names.setdefault(id(layer.pool), f"(pool {len(names)})")
        found[name] = _Watched(layer, pool, counter)
    return found
