"""Measures MLPs in one forward of the model: a sample of their inputs, and the rms of their outputs and of the residual stream.

Flow: hooks on the modules that are called in place of the MLPs, and on the blocks around them → one forward → `Measured` for
each MLP. All calls of an MLP are counted together. The rms of a token is that of its features; of all tokens the median is
taken, because in trained models a few tokens are hundreds of times larger than all others. Tokens of zeros (padding) are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.site import Site

SAMPLE = 256  # tokens of an MLP's input on which its layer is measured: the median of as many is known to some percent


@dataclass(frozen=True)
class Measured:
    """What one MLP does on the example inputs.

    `x`: tokens of its input [n, d_in]. `mlp`: rms of its output, NaN where it is not finite. `stream`: rms of the residual
    stream where its block begins; None outside of a block, and in graphs.
    """

    x: Tensor
    mlp: float
    stream: float | None = None


class Probe:
    """Records what MLPs read and return while the model runs inside of `watching`."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = {site.path: site for site in sites}
        self._records: dict[str, Record] = {}

    @contextmanager
    def watching(self, model: nn.Module, mlps: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, calls of the modules in place of the MLPs, by site path, are recorded; earlier records are dropped.

        Their first argument is the MLP's input and their result its output.
        """
        self._records = {path: Record(self._sites[path]) for path in mlps}
        modules = dict(model.named_modules(remove_duplicate=False))
        with ExitStack() as hooks:
            for path, record in self._records.items():
                hooks.callback(mlps[path].register_forward_hook(record.mlp_hook, prepend=True).remove)
                watch_block(modules, self._sites[path], record, hooks)
            yield

    def measured(self) -> dict[str, Measured]:
        """What was recorded, by site path; MLPs that got no token are left out."""
        return {path: record.measured() for path, record in self._records.items() if record.seen}


class Record:
    """What was recorded of one MLP, in all of its calls."""

    def __init__(self, site: Site) -> None:
        self._site, self._limit = site, -(-SAMPLE // site.calls)
        self._x: list[Tensor] = []
        self._mlp: list[Tensor] = []
        self._stream: list[Tensor] = []

    @property
    def seen(self) -> bool:
        """True if the MLP got a token."""
        return any(len(x) for x in self._x)

    def mlp_hook(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the module that is called in place of the MLP."""
        self.read(args[0])
        self.returned(output)

    def block_hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block around the MLP: the first tensor it gets is the residual stream."""
        stream = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()), None)
        if stream is not None and stream.dim():
            self._stream.append(token_rms(tokens_of(stream, self._site.axis, self._site.d_model)))

    def read(self, x: Tensor) -> None:
        """Record an input."""
        self._x.append(sample(tokens_of(x, self._site.axis, self._site.d_in), self._limit))

    def returned(self, output: Tensor) -> None:
        """Record an output."""
        self._mlp.append(token_rms(tokens_of(output, self._site.axis, self._site.d_model)))

    def rms(self) -> float:
        """The rms of the outputs; NaN where there are none, or one is not finite."""
        return typical(torch.cat(self._mlp)) if self._mlp else math.nan

    def measured(self) -> Measured:
        """All that was recorded."""
        stream = typical(torch.cat(self._stream)) if self._stream else math.nan
        return Measured(torch.cat(self._x), self.rms(), stream if math.isfinite(stream) else None)


def watch_block(modules: Mapping[str, nn.Module], site: Site, record: Record, hooks: ExitStack) -> None:
    """Record the residual stream where the site's block begins, until `hooks` are closed; nothing outside of a block.

    `modules` are those of the model, by every path that they have.
    """
    path = ".".join(site.path.split(".")[: len(site.tower.split(".")) + 1])
    block = None if site.block is None else modules.get(path)
    if block is not None:
        hooks.callback(block.register_forward_pre_hook(record.block_hook, with_kwargs=True, prepend=True).remove)


def tokens_of(value: Tensor, axis: int, width: int) -> Tensor:
    """The tokens [T, width] of a value whose features are on `axis`, or are the last axes where that has another size."""
    on_axis = -value.dim() <= axis < value.dim() and value.shape[axis] == width
    last = value.movedim(axis, -1) if on_axis else value
    return last.reshape(-1, width if on_axis or value.numel() % width == 0 else value.shape[-1])


def sample(tokens: Tensor, limit: int) -> Tensor:
    """A copy of at most `limit` of the tokens [T, d], the same for the same T."""
    if len(tokens) <= limit:
        return tokens.detach().clone()
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:limit]
    return tokens.detach()[chosen.sort().values.to(tokens.device)]


def token_rms(tokens: Tensor) -> Tensor:
    """The rms of every token's features: [T, d] -> [T], fp32 or wider."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=wide)
    return norm / math.sqrt(tokens.shape[-1])


def typical(rms: Tensor) -> float:
    """The median of the tokens' rms [T], without zeros; 0 if there are only zeros, NaN if one is not finite."""
    if not bool(rms.isfinite().all()):
        return math.nan
    nonzero = rms[rms > 0]
    return float(nonzero.median()) if len(nonzero) else 0.0
