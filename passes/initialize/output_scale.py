"""Sets the scales at which layers start: their scores, and their outputs relative to those of the MLPs.

Flow: layers as the paper initializes them, and what their MLPs did in one forward → scores → each layer runs in eval mode on
tokens that its MLP read → pools whose values alone set an output's scale are scaled once → the other layers → a report of each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from memrewrite.layers.contract import MemoryLayer
from memrewrite.passes.initialize.measure import Measured, token_rms, typical
from memrewrite.passes.models.forward import layer_in_eval_mode
from memrewrite.plans import Plan, Substitution
from memrewrite.report import LayerScale
from memrewrite.site import dtype_named

log = logging.getLogger("memrewrite")
NO_TOKEN = "no token of the example inputs reaches the MLP"  # noqa: S105 - no password
ON_META = "the model is on meta; call memrewrite.match_outputs when it has values"


def set_scales(
    plan: Plan,
    layers: Mapping[str, nn.Module],
    measured: Mapping[str, Measured],
    *,
    without: str = NO_TOKEN,
    kept_pools: Collection[str] = (),
) -> tuple[LayerScale, ...]:
    """Make the layers start as their `init` says, in place. Layers without measurements, and on meta, stay as they are.

    Args:
        plan: The plan of the layers.
        layers: Freshly initialized layers by site path; substitutions without one are left out.
        measured: What their MLPs did, by site path.
        without: Why there are no measurements, for those that are not in `measured`.
        kept_pools: Pools whose values must not be scaled, because earlier layers read them.

    Returns:
        The scales of every layer, in the plan's order; none where nothing was measured and no layer needs it.
    """
    if not measured and not plan.measured:
        return ()
    starts = [
        _Start(substitution, layer, measured.get(substitution.site.path), without)
        for substitution in plan.substitutions
        if isinstance(layer := layers.get(substitution.site.path), MemoryLayer)
    ]
    with torch.no_grad():
        for start in starts:
            start.set_scores()
        for name in plan.pools:
            _scale_pool(
                [s for s in starts if s.substitution.pool == name and s.matched and s.layer.output_is_pool], name in kept_pools
            )
        for start in starts:
            if start.matched and not start.layer.output_is_pool:
                start.set_output()
        return tuple(start.report() for start in starts)


class _Start:
    """One layer at its start, and what its MLP did."""

    def __init__(self, substitution: Substitution, layer: MemoryLayer, seen: Measured | None, without: str) -> None:
        self.substitution, self.layer, self.seen = substitution, layer, seen
        dtype = dtype_named(substitution.site.dtype)
        self.x = None if seen is None else seen.x.to(dtype)  # a model's own autocast may convert inputs of another dtype
        self.note = without if seen is None else ""
        if seen is not None and not math.isfinite(seen.mlp):
            self.note = "the MLP returns values that are not finite"
        self.matched = not self.note and not isinstance(substitution.init.output, str)

    @property
    def target(self) -> float:
        """The rms that the output shall have."""
        multiple = self.substitution.init.output
        return 0.0 if isinstance(multiple, str) or self.seen is None else multiple * self.seen.mlp

    def rms(self) -> float:
        """The rms of the layer's output on the tokens of its MLP; NaN where it is not finite."""
        return math.nan if self.x is None else typical(token_rms(_output(self.layer, self.x)))

    def set_scores(self) -> None:
        """Give the scores the standard deviation that is asked for."""
        wanted = self.substitution.init.scores
        if isinstance(wanted, str) or self.x is None:
            return
        with layer_in_eval_mode(self.layer):
            std = typical(self.layer.score_std(self.x))
        if std > 0:
            self.layer.scale_scores(wanted / std)
        else:
            self.note = "its scores are not finite, or all equal"

    def set_output(self) -> None:
        """Give the output the rms that is asked for, through parameters of the layer's own."""
        rms = self.rms()
        if rms > 0:
            self.layer.scale_output(self.target / rms)
        else:
            self.note = "the layer returns zeros, or values that are not finite"

    def report(self) -> LayerScale:
        """What it starts with."""
        path, seen, init = self.substitution.site.path, self.seen, self.substitution.init
        layer = math.nan if seen is None else self.rms()
        mlp = math.nan if seen is None else seen.mlp
        scale = LayerScale(
            path=path,
            stream=None if seen is None else seen.stream,
            mlp=mlp if math.isfinite(mlp) else None,
            layer=layer if math.isfinite(layer) else None,
            note=f"not matched: {self.note}" if self.note and init.measured else "",
        )
        if scale.loud:
            log.warning("the layer at %s starts with an output of rms %.3g; its MLP has %.3g", path, layer, mlp)
        if scale.note:
            log.warning("the layer at %s is %s", path, scale.note)
        return scale


def _scale_pool(starts: list[_Start], kept: bool) -> None:
    """Scale one pool by the geometric mean of what the layers need whose outputs have the scale of its values."""
    needed: list[float] = []
    for start in starts:
        rms, target = start.rms(), start.target
        if kept:
            start.note = "its pool was scaled for an earlier graph"
        elif not target > 0:
            start.note = "the MLP returns zeros, and so would every layer that reads this pool"
        elif not rms > 0:
            start.note = "the layer returns zeros, or values that are not finite"
        else:
            needed.append(target / rms)
    pool = starts[0].layer.pool if needed else None
    if pool is not None:
        pool.scale_values_(math.exp(sum(map(math.log, needed)) / len(needed)))


def _output(layer: MemoryLayer, x: Tensor) -> Tensor:
    """The layer's output for tokens [n, d_in]: its forward alone; its hooks expect the arguments of the MLP's module."""
    with layer_in_eval_mode(layer):
        return layer.forward(x)
