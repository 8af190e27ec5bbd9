"""The *null* check: with the original MLPs, as they were recorded, in the layers' places, no bit of the outputs changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from memrewrite.errors import ModelError
from memrewrite.passes.initialize.measure import Probe
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.models.fingerprints import differing
from memrewrite.passes.models.forward import run
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.rewrite.edit_module import place
from memrewrite.passes.rewrite.hooks import TransparentStub
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.rewrite.undo_log import UndoLog, module_at
from memrewrite.passes.verify.evidence import BeforeEdit, checked
from memrewrite.report import Check
from memrewrite.site import Site

Calls = Mapping[str, tuple[SiteCall, ...]]


def run_with_originals(
    before: BeforeEdit, *, gradients: bool = False, probe: Probe | None = None
) -> tuple[Any, dict[str, OriginalMLP]]:
    """The live model's outputs with every selected MLP replaced by itself as an `OriginalMLP`, and these by site path.

    `probe` records what the MLPs do. The model is as before when it returns. Raises `ModelError`, as `run_guarded` does.
    """
    with originals_placed(before, before.locations.found) as wrapped, watching(probe, before.model, wrapped):
        return run_guarded(before, gradients=gradients), wrapped


def run_guarded(before: BeforeEdit, *, gradients: bool = False) -> Any:
    """The outputs of the model, whose selected MLPs were replaced by themselves.

    Raises `ModelError` if code outside of an MLP changes its weights in a forward: it would not change the layer.
    """
    state, changed = before.capture.state, list[tuple[str, str]]()
    weights = [(s.site.path, name) for s in before.plan.substitutions for name in s.site.parameters]
    weights = [(site, name) for site, name in weights if isinstance(state.get(name), nn.Parameter)]

    def compare(guard: StateGuard) -> None:
        changed.extend((site, name) for site, name in weights if guard.changed(state[name]))

    outputs = run(before.model, before.capture.inputs, gradients=gradients, at_end=compare)
    for site, name in changed:
        raise ModelError(
            f"in {'train' if before.model.training else 'eval'} mode, code outside of the MLP {site!r} changes its weights: "
            "it would not change the layer, whose output would not fit",
            where=name,
            hint="switch this off in the model (weights that are scaled by mode or depth, for example), or leave this MLP out",
        )
    return outputs


def watching(probe: Probe | None, model: nn.Module, wrapped: Mapping[str, OriginalMLP]) -> AbstractContextManager[None]:
    """Inside, the probe, if there is one, records what the `wrapped` MLPs do."""
    return nullcontext() if probe is None else probe.watching(model, wrapped)


@contextmanager
def originals_placed(before: BeforeEdit, found: Calls, *, train_noise: bool = False) -> Iterator[dict[str, OriginalMLP]]:
    """Inside, every selected MLP of the live model is replaced by itself; with `train_noise`, as it acts in train mode."""
    edit = UndoLog(before.hosts, TransparentStub)
    wrapped: dict[str, OriginalMLP] = {}
    try:
        for substitution in before.plan.substitutions:
            site = substitution.site
            original = wrapped[site.path] = OriginalMLP(before.model, found[site.path], train_noise=train_noise)
            place(before.model, site, original, "replace", edit)
            _rewind(before.model, site, original, edit)
        yield wrapped
    finally:
        edit.revert()


def null(before: BeforeEdit, outputs: Any) -> Check:
    """Are `outputs`, computed with the original MLPs in the layers' places, bit-equal to the model's own?"""
    different = differing(before.capture.outputs, outputs)
    sentence = "with the original MLPs in the layers' places, outputs are bit-equal"
    if different:
        sentence = f"with the original MLPs in the layers' places, {different} output elements differ"
    return checked("null", different == 0, different, sentence)


def refuse_unrepeatable(before: BeforeEdit) -> None:
    """Raise `ModelError` if the model itself, which nothing has edited, gives other outputs when it runs again."""
    for _ in range(2):  # a forward may alternate
        different = differing(before.capture.outputs, run(before.model, before.capture.inputs))
        if different:
            raise ModelError(
                f"the model is not deterministic: in eval mode, on the same inputs and from one seed, {different} output "
                "elements differ between two runs",
                where=before.capture.how,
                hint="remove what changes from call to call: other random numbers than torch's, a clock, state that the "
                "forward writes; or rewrite without checks: `verify: off`",
            )


# ------------------------------------------------------------------------------- random numbers, between entry and exit


class _Rewind:
    """Restores torch's RNG state at the exit of a span to what it was at the entry.

    In a span, code between entry and exit still runs (on zeros) and consumes random numbers. After the restore the original
    MLP at the exit samples the numbers that the model itself samples.
    """

    def __init__(self) -> None:
        self.states: list[torch.Tensor] | None = None

    def save(self, *_: Any) -> None:
        """Forward pre-hook of every entry: saves the state at the first one that is called."""
        if self.states is None:
            self.states = [torch.get_rng_state(), *_cuda_states()]

    def restore(self, *_: Any) -> None:
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
                edit.done(module_at(model, path).register_forward_pre_hook(rewind.save).remove)
    edit.done(exit_.register_forward_pre_hook(rewind.restore).remove)
