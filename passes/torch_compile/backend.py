"""`memrewrite.backend(recipe)`: a backend for `torch.compile` that locates the MLPs of every graph, and rewrites them.

Flow: a graph from dynamo → its weights attached → lowered, located → the recipe selects → memory layers, built once and reused
→ the graph rewritten and verified → its weights inputs again → the next backend compiles it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.errors import MemrewriteError, ModelError, SelectError
from memrewrite.passes.capture.capture import lowered_segment
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.initialize.measure import Measured
from memrewrite.passes.initialize.output_scale import set_scales
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.forward import run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.plan.memory_budget import refuse_too_large
from memrewrite.passes.plan.select import narrowed, select
from memrewrite.passes.rewrite.edit_graph import emit_layers
from memrewrite.passes.rewrite.given_graph import GivenGraph
from memrewrite.passes.torch_compile.layer_store import LayerStore
from memrewrite.passes.torch_compile.lifted_weights import (
    GraphPart,
    attached,
    sites_as_stored,
    sites_numbered,
    source_of,
    with_weights_as_inputs,
)
from memrewrite.passes.verify.checks import CHECKS, identity
from memrewrite.passes.verify.evidence import refuse_failed
from memrewrite.passes.verify.gradient_flow import gradient
from memrewrite.passes.verify.measured_mlps import measured_graph
from memrewrite.passes.verify.verify import verify_graph
from memrewrite.plans import Plan
from memrewrite.recipes.reader import RecipeLike, read_recipe
from memrewrite.recipes.schema import Recipe
from memrewrite.report import Check, LayerScale
from memrewrite.site import Inspection, Site

log = logging.getLogger("memrewrite")
Compiled = Callable[..., Any]
Next = str | Callable[[fx.GraphModule, Sequence[Any]], Compiled]
AS_BUILT = (gradient, identity)  # checks of layers as built: layers that were trained since may fail them


def backend(
    recipe: RecipeLike | None = None,
    *,
    model: nn.Module | None = None,
    then: Next = "inductor",
    on_located: Callable[[Inspection], None] | None = None,
    allow_large: bool = False,
) -> Backend:
    """Create a backend for `torch.compile` that rewrites the MLPs of every graph. Use one backend for one model.

    Args:
        recipe: the name of a recipe in the gallery, a path, a mapping, or a `Recipe`. None: graphs are located, not rewritten.
        model: the model that is compiled. Its weights then have their names in it, and its blocks their numbers, which
            recipes that count blocks need where `torch.compile` breaks the graph.
        then: the backend that compiles the graphs: a name that torch knows, or a function.
        on_located: receives the MLPs of every graph.
        allow_large: do not compare the size of the pools with the free memory of their devices.

    Returns:
        The backend. Its `memory` contains the pools and layers, `located` the MLPs, `scales` how large the layers start, on
        the inputs of the call that compiled them; `check()` raises an error for a rule of the recipe that has selected nothing.

    Raises:
        RecipeError: the recipe cannot be read, or is not well formed. Errors about a graph (`SelectError`,
            `VerificationError`, ...) are raised when the compiled code of that graph is called.

    Example:
        >>> ours = memrewrite.backend("memory-plus", model=model)
        >>> fast = torch.compile(model, backend=ours)
    """
    return Backend(None if recipe is None else read_recipe(recipe), model, then, on_located, allow_large)


class Backend:
    """The result of `backend`. `torch.compile` calls it with a graph module and its example inputs."""

    def __init__(
        self,
        recipe: Recipe | None,
        model: nn.Module | None,
        then: Next,
        on_located: Callable[[Inspection], None] | None,
        allow_large: bool,
    ) -> None:
        self.memory = LayerStore().eval()
        self.graphs: list[Inspection] = []  # the MLPs of each graph, in the order of compilation
        self.checks: list[tuple[Check, ...]] = []  # of each graph that was rewritten
        self.scales: list[LayerScale] = []  # how large each layer starts, in the order in which they were built
        self._recipe, self._model, self._then = recipe, model, then
        self._on_located, self._allow_large = on_located, allow_large
        self._in_parts = False  # an earlier graph was broken: this one may be the rest of a model
        self._matched: set[int] = set()
        self._towers: dict[int, str] = {}

    @property
    def located(self) -> Inspection:
        """The MLPs of all graphs so far; one that is in several graphs is listed once."""
        sites = {(site.path, site.parameters): site for graph in self.graphs for site in graph.sites}
        misses = dict.fromkeys(miss for graph in self.graphs for miss in graph.near_misses)
        captured = f"torch.compile, {len(self.graphs)} graphs"
        return Inspection(sites=tuple(sites.values()), near_misses=tuple(misses), captured=captured)

    def check(self) -> None:
        """Raise `SelectError` when a rule of the recipe has selected no MLP of any graph so far."""
        for index, rule in enumerate(self._recipe.replace if self._recipe else ()):
            if index not in self._matched:
                where = ", ".join(f"{k}: {v}" for k, v in rule.where.model_dump(exclude_defaults=True).items())
                paths = ", ".join(site.path for site in self.located.sites[:6])
                raise SelectError(
                    f"`{where}` matches no MLP of {len(self.graphs)} graphs",
                    where=f"replace[{index}].where",
                    hint=f"there are: {paths}" if paths else "run the compiled model first; does it have MLPs?",
                )

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Compile one graph. An error about it is raised when the compiled code is called.

        Dynamo would wrap an error that is raised here, or suppress it (`suppress_errors`).
        """
        try:
            with _caller_independent():
                rewritten, guarded = self._rewritten(gm, example_inputs)
        except MemrewriteError as error:
            return _raising(error)
        compiled = _next(self._then)(rewritten, example_inputs)
        return _for_these(compiled, guarded) if guarded else compiled

    def _rewritten(self, gm: fx.GraphModule, examples: Sequence[Any]) -> tuple[fx.GraphModule, dict[int, Tensor]]:
        """The graph to compile; and one weight of each of its MLPs, by position among the inputs."""
        part, captured = self._captured(gm, examples)
        locations = locate(captured)
        whole = self._is_whole(gm, part)
        located = sites_as_stored(locations.located, part)
        if self._model is not None:
            located = sites_numbered(located, self._model)
        self.graphs.append(located)
        if self._on_located is not None:
            self._on_located(located)
        if self._recipe is None:
            return gm, {}
        guarded = _first_weights(gm, examples, part, located.sites)
        plan = self._plan(located, self._recipe, whole)
        if plan is None:
            return gm, guarded
        locations = GivenGraph(locations).bound(s.site.path for s in plan.substitutions)
        rewritten = with_weights_as_inputs(self._verified(plan, part, captured, locations), gm, part.weights)
        rewritten.add_module(plan.root, self.memory.pools)  # no node calls it: the layers read the pools
        return rewritten, guarded

    def _captured(self, gm: fx.GraphModule, examples: Sequence[Any]) -> tuple[GraphPart, Capture]:
        """The graph in ATen. Buffers that it mutates are inputs, because their values differ in each run."""
        part = attached(gm, examples, self._model)
        segment = lowered_segment(part.module, part.inputs)
        if segment.written:
            part = attached(gm, examples, self._model, as_inputs=segment.written)
            segment = lowered_segment(part.module, part.inputs)
        return part, Capture((segment,), part.inputs, "torch.compile")

    def _is_whole(self, gm: fx.GraphModule, part: GraphPart) -> bool:
        """Whether this is the whole model: no graph was broken so far, and its modules are the root's, as far as is known."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        self._in_parts |= bool(part.root) or bool(getattr(reason, "graph_break", False))
        return not self._in_parts

    def _plan(self, located: Inspection, recipe: Recipe, whole: bool) -> Plan | None:
        counting = next((i for i, rule in enumerate(recipe.replace) if rule.where.counts), None)
        in_blocks = any(site.block is not None for site in located.sites)
        if self._model is None and counting is not None and located.sites and not (whole and in_blocks):
            raise SelectError(
                "torch.compile broke the model into several graphs, and blocks cannot be counted in one of them",
                where=f"replace[{counting}].where",
                hint="pass the model: memrewrite.backend(recipe, model=model), or select by `path`",
            )
        if whole:
            plan = select(located, recipe, live=False)
            self._matched.update(range(len(recipe.replace)))
            return plan
        rules = narrowed(located.sites, recipe, self._towers)
        self._matched.update(rules)
        if not rules:
            log.info("the recipe selects none of %d MLPs of a graph", len(located.sites))
            return None
        pools = {name: pool for name, pool in recipe.pools.items() if name in {rule.pool for rule in rules.values()}}
        return select(located, recipe.model_copy(update={"replace": tuple(rules.values()), "pools": pools}), live=False)

    def _verified(self, plan: Plan, part: GraphPart, captured: Capture, locations: LocatedSites) -> fx.GraphModule:
        """The rewritten graph, its checks added to `checks`. Raises `VerificationError` if one failed."""
        weights = dict(tensors_of(part.module))
        built_before = [self.memory.known(weights, s) is not None for s in plan.substitutions]
        kept_pools = set(self.memory.pools._modules)
        if not self._allow_large and not all(built_before):
            refuse_too_large(plan)
        layers = self.memory.layers_for(plan, weights)
        new = {s.site.path: layers[s.site.path] for s, known in zip(plan.substitutions, built_before, strict=True) if not known}
        result = emit_layers(captured.segments[0], plan, locations, layers, self.memory.pools)

        def start(measured: Mapping[str, Measured]) -> None:
            self.scales += set_scales(plan, new, measured, kept_pools=kept_pools)

        if self._recipe is not None and self._recipe.verify != "off":
            captured = replace(captured, outputs=run(part.module, captured.inputs))
            after = [check for check in CHECKS if not any(built_before) or check not in AS_BUILT]
            checks = verify_graph(result, layers, plan, captured, locations, after, start=start)
            self.checks.append(checks)
            refuse_failed(checks, where="torch.compile", hint="please report the model and the recipe")
        elif new:
            start(measured_graph(plan, captured, locations) if plan.measured else {})
        return result


def _first_weights(gm: fx.GraphModule, examples: Sequence[Any], part: GraphPart, sites: Sequence[Site]) -> dict[int, Tensor]:
    """One weight of every MLP, by position among the inputs, with a guard: dynamo compiles again for other weights.

    In dynamo's graphs weights are inputs, and one graph would run for all blocks of a class that are compiled one by one.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._guards import TracingContext

    wanted = {site.parameters[0] for site in sites}
    found: dict[int, Tensor] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if part.weights.get(node.name) in wanted:
            found[position] = examples[position]
            if source_of(node) is not None and TracingContext.try_get() is not None:
                install_guard(source_of(node).make_guard(GuardBuilder.ID_MATCH))
    return found


def _for_these(compiled: Compiled, weights: Mapping[int, Tensor]) -> Compiled:
    """The compiled code, which raises `ModelError` for weights of other MLPs than it was rewritten for."""

    def checked(*args: Any) -> Any:
        if any(args[position] is not weight for position, weight in weights.items()):
            raise ModelError("a graph that was rewritten for one MLP was called with another one's weights")
        return compiled(*args)

    return checked


@contextmanager
def _caller_independent() -> Iterator[None]:
    """Inside, gradients are on and autocast caches no cast weights, whatever the caller of the compiled model has set."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _raising(error: MemrewriteError) -> Compiled:
    def refused(*_: Any) -> Any:
        raise error

    return refused


def _next(then: Next) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    if not isinstance(then, str):
        return then
    found: Any = torch._dynamo.lookup_backend(then)
    return found  # type: ignore[no-any-return]
