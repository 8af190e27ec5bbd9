"""The *null* check: the original MLPs, lifted out as they were recorded and put where the layers will stand, change no bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.models.fingerprints import differing
from memrewrite.passes.models.forward import run
from memrewrite.passes.rewrite.edit_module import place
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.rewrite.undo_log import UndoLog, module_at
from memrewrite.passes.verify.evidence import Evidence, checked
from memrewrite.report import Check
from memrewrite.site import Site

Calls = Mapping[str, tuple[SiteCall, ...]]


def run_with_originals(evidence: Evidence, *, gradients: bool = False) -> tuple[Any, dict[str, OriginalMLP]]:
    """The live model's outputs with every selected MLP lifted out and put in the layer's way, and these wrapped MLPs.

    Leaves the model as it was.
    """
    with originals_placed(evidence, evidence.locations.found) as wrapped:
        return run(evidence.model, evidence.before.inputs, gradients=gradients), wrapped


@contextmanager
def originals_placed(evidence: Evidence, found: Calls, *, train_noise: bool = False) -> Iterator[dict[str, OriginalMLP]]:
    """The live model with every selected MLP lifted out and put in the layer's way; `train_noise`: as it acts in train mode."""
    edit = UndoLog(evidence.hosts)
    wrapped: dict[str, OriginalMLP] = {}
    try:
        for substitution in evidence.plan.substitutions:
            site = substitution.site
            wrapped[site.path] = OriginalMLP(evidence.model, found[site.path], train_noise=train_noise)
            wrapped[site.path].stands_for = [module_at(evidence.model, b.exit) for b in site.bindings if b.exit]
            place(evidence.model, site, wrapped[site.path], "replace", edit)
            _rewind(evidence.model, site, wrapped[site.path], edit)
        yield wrapped
    finally:
        edit.revert()


def null(evidence: Evidence, outputs: Any) -> Check:
    """With the original MLPs wrapped in the layers' places: does every output keep every bit?"""
    different = differing(evidence.before.outputs, outputs)
    sentence = "with the original MLPs in the layers' places, outputs are bit-equal"
    if different:
        sentence = f"with the original MLPs in the layers' places, {different} output elements differ"
    return checked("null", different == 0, different, sentence)


# ------------------------------------------------------------------------------- random numbers, between entry and exit


class _Rewind:
    """The state of torch's random numbers when an MLP's input came by.

    Code between the matrices of a span runs on, on zeros, and draws: at the exit these draws are taken back, for the
    lifted-out MLP does them itself.
    """

    def __init__(self) -> None:
        self.states: list[torch.Tensor] | None = None

    def keep(self, *_: Any) -> None:
        """Forward pre-hook of an entry: the first to be called counts."""
        if self.states is None:
            self.states = [torch.get_rng_state(), *_cuda_states()]

    def take_back(self, *_: Any) -> None:
        """Forward pre-hook of the exit."""
        if self.states is not None:
            torch.set_rng_state(self.states[0])
            if self.states[1:]:
                torch.cuda.set_rng_state_all(self.states[1:])
            self.states = None


def _cuda_states() -> list[torch.Tensor]:
    return list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else []


def _rewind(model: nn.Module, site: Site, exit_: nn.Module, edit: UndoLog) -> None:
    rewind = _Rewind()
    for binding in site.bindings:
        if binding.kind == "span":
            for path in binding.entries:
                edit.done(module_at(model, path).register_forward_pre_hook(rewind.keep).remove)
    edit.done(exit_.register_forward_pre_hook(rewind.take_back).remove)
