"""A captured model with its located MLPs: what every command starts from.

Flow: capture → locate → the sites bound to the given graph, if the model is one. A live module that will be rewritten as a
graph is exported first, with dynamic shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.export import ExportedProgram

from memrewrite.errors import CaptureError, ModelError, SelectError
from memrewrite.passes.capture.capture import as_graph, capture
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.distance import refuse_inexact
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.rewrite.given_graph import GivenGraph

Model = nn.Module | ExportedProgram
Step = Callable[[str], None]  # receives the name of each stage as it begins


def ignore(_: str) -> None:
    """A `Step` that ignores the names."""


class Look(NamedTuple):
    """A captured model with its located MLPs; `given` for a model that is rewritten as a graph."""

    capture: Capture
    locations: LocatedSites
    given: GivenGraph | None


def look_at(model: Model, inputs: Any, step: Step) -> Look:
    """Capture a model and locate its MLPs."""
    if inputs is None and not isinstance(model, ExportedProgram):
        raise ModelError("no example inputs were given", hint="give a tuple, a dict or (args, kwargs) that the model runs on")
    step("capturing the model")
    with evaluating(model):
        captured = capture(model, inputs)
        step("locating its MLPs")
        look = _located(captured)
        lowered = bool(captured.segments[0].values)
        if look.given is not None and lowered and look.given.all_hidden():  # in modules that the graph calls: edit these
            captured = capture(model, inputs, as_module_tree=True)
            look = Look(captured, locate(captured), None)
    return look


def look_at_export(model: Model, inputs: Any, allow_inexact: bool, step: Step) -> tuple[Model, Look]:
    """Export a live module with dynamic shapes, and locate the MLPs in its graph. Returns the graph's program, too.

    Raises `CaptureError` for a program that computes something else than the module, unless that is allowed.
    """
    step("capturing the model with dynamic shapes")
    with evaluating(model):
        captured = capture(model, inputs, dynamic=True)
        if not captured.is_whole:
            raise SelectError(f"there is no one graph of this model: {captured.how}", hint="use --emit module")
        exported = as_graph(captured)
        if not allow_inexact:
            refuse_inexact(exported.distance, CaptureError, exported.how)
        step("locating its MLPs")
        return captured.segments[0].program, _located(exported)


def _located(captured: Capture) -> Look:
    locations = locate(captured)
    return Look(captured, locations, GivenGraph(locations) if captured.is_graph else None)
