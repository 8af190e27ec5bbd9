"""`memrewrite.backend(recipe)`: a backend for `torch.compile` that shows the MLPs of every graph, and rewrites them.

Flow: a graph from dynamo → its weights attached → lowered, located → the recipe selects → memory layers, built once and kept
→ the graph rewritten and proved → its weights inputs again → the next backend compiles it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.errors import MemrewriteError, ModelError, SelectError, VerificationError
from memrewrite.passes.capture.capture import lowered_segment
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.forward import run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.pipeline import RecipeLike
from memrewrite.passes.plan.memory_budget import refuse_too_large
from memrewrite.passes.plan.select import narrowed, select
from memrewrite.passes.rewrite.edit_graph import emit_layers
from memrewrite.passes.rewrite.given_graph import anchored
from memrewrite.passes.torch_compile.layer_store import LayerStore
from memrewrite.passes.torch_compile.lifted_weights import (
    GraphPart,
    attached,
    given_back,
    sites_as_stored,
    sites_numbered,
    source_of,
)
from memrewrite.passes.verify.checks import CHECKS, identity
from memrewrite.passes.verify.gradient_flow import gradient
from memrewrite.passes.verify.verify import prove_graph
from memrewrite.plans import Plan
from memrewrite.recipes.reader import read_recipe
from memrewrite.recipes.schema import Recipe
from memrewrite.report import Check
from memrewrite.site import Inspection, Site

log = logging.getLogger("memrewrite")
Compiled = Callable[..., Any]
Next = str | Callable[[fx.GraphModule, Sequence[Any]], Compiled]
AS_BUILT = (gradient, identity)  # checks of layers as they are built: they need not hold when these were trained


def backend(
    recipe: RecipeLike | None = None,
    *,
    model: nn.Module | None = None,
    then: Next = "inductor",
    on_located: Callable[[Inspection], None] | None = None,
    allow_large: bool = False,
) -> Backend:
    """A backend for `torch.compile(model, backend=...)`; `then` compiles the graphs: a name torch knows, or a backend.

    Without a recipe graphs are handed on as they came. `model` gives weights the names they have in it, and its blocks their
    numbers, which takes it where `torch.compile` breaks the graph. `on_located` is told what each graph holds. Use one
    backend for one model. Raises `RecipeError`; what a graph is refused for is raised when the compiled code is called.
    """
    return Backend(None if recipe is None else read_recipe(recipe), model, then, on_located, allow_large)


class Backend:
    """What `backend` gives. Call it with a graph module and its example inputs, as `torch.compile` does."""

    def __init__(
        self,
        recipe: Recipe | None,
        model: nn.Module | None,
        then: Next,
        on_located: Callable[[Inspection], None] | None,
        allow_large: bool,
    ) -> None:
        self.memory = LayerStore().eval()
        self.graphs: list[Inspection] = []  # what each graph held, in the order they came
        self.checks: list[tuple[Check, ...]] = []  # of each graph that was rewritten
        self._recipe, self._model, self._then = recipe, model, then
        self._on_located, self._allow_large = on_located, allow_large
        self._in_parts = False  # a graph before was broken off: this one may be the rest of a model
        self._matched: set[int] = set()
        self._towers: dict[int, str] = {}

    @property
    def located(self) -> Inspection:
        """What was located in all graphs so far, an MLP that was met in several of them once."""
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
        """Compile one graph; what it is refused for is raised when the compiled code is called.

        Raised here it would reach the user wrapped in dynamo's own error, or not at all (`suppress_errors`).
        """
        try:
            with _on_its_own():
                rewritten, guarded = self._rewritten(gm, example_inputs)
        except MemrewriteError as error:
            return _raising(error)
        compiled = _next(self._then)(rewritten, example_inputs)
        return _for_these(compiled, guarded) if guarded else compiled

    def _rewritten(self, gm: fx.GraphModule, examples: Sequence[Any]) -> tuple[fx.GraphModule, dict[int, Tensor]]:
        """The graph to compile; and the weights it was made for, by their place among the inputs."""
        part, before = self._captured(gm, examples)
        locations = locate(before)
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
        made = self._plan(located, self._recipe, whole)
        if made is None:
            return gm, guarded
        locations = anchored(locations, [s.site.path for s in made.substitutions])
        rewritten = given_back(self._proved(made, part, before, locations), gm, part.weights)
        rewritten.add_module(made.root, self.memory.pools)  # no node names it: the layers hold it
        return rewritten, guarded

    def _captured(self, gm: fx.GraphModule, examples: Sequence[Any]) -> tuple[GraphPart, Capture]:
        """The graph in ATen; buffers it writes into count as inputs, for they are other ones at each run."""
        part = attached(gm, examples, self._model)
        segment = lowered_segment(part.module, part.inputs)
        if segment.written:
            part = attached(gm, examples, self._model, segment.written)
            segment = lowered_segment(part.module, part.inputs)
        return part, Capture((segment,), part.inputs, "torch.compile")

    def _is_whole(self, gm: fx.GraphModule, part: GraphPart) -> bool:
        """Whether this is the graph of the whole model, as far as can be told: nothing was broken off, and it is the root's."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        self._in_parts |= bool(part.root) or bool(getattr(reason, "graph_break", False))
        return not self._in_parts

    def _plan(self, located: Inspection, recipe: Recipe, whole: bool) -> Plan | None:
        counting = next((i for i, rule in enumerate(recipe.replace) if rule.where.counts), None)
        in_blocks = any(site.block is not None for site in located.sites)
        if self._model is None and counting is not None and located.sites and not (whole and in_blocks):
            raise SelectError(
                "this graph is a part of a model, as torch.compile broke it, and blocks cannot be counted in it",
                where=f"replace[{counting}].where",
                hint="give the model: memrewrite.backend(recipe, model=model), or select by `path`",
            )
        if whole:
            made = select(located, recipe, live=False)
            self._matched.update(range(len(recipe.replace)))
            return made
        rules = narrowed(located.sites, recipe, self._towers)
        self._matched.update(rules)
        if not rules:
            log.info("the recipe selects none of %d MLPs of a graph", len(located.sites))
            return None
        pools = {name: pool for name, pool in recipe.pools.items() if name in {rule.pool for rule in rules.values()}}
        return select(located, recipe.model_copy(update={"replace": tuple(rules.values()), "pools": pools}), live=False)

    def _proved(self, made: Plan, part: GraphPart, before: Capture, locations: LocatedSites) -> fx.GraphModule:
        weights = dict(tensors_of(part.module))
        built_before = [self.memory.known(weights, s) is not None for s in made.substitutions]
        if not self._allow_large and not all(built_before):
            refuse_too_large(made)
        layers = self.memory.layers_for(made, weights)
        result = emit_layers(before.segments[0], made, locations, layers, self.memory.pools)
        if self._recipe is not None and self._recipe.verify != "off":
            before = Capture(before.segments, before.inputs, before.how, outputs=run(part.module, before.inputs))
            after = [check for check in CHECKS if not any(built_before) or check not in AS_BUILT]
            checks = prove_graph(result, layers, made, before, locations, after)
            self.checks.append(checks)
            _refuse_failed(checks)
        return result


def _first_weights(gm: fx.GraphModule, examples: Sequence[Any], part: GraphPart, sites: Sequence[Site]) -> dict[int, Tensor]:
    """One weight of every MLP, by its place among the inputs; dynamo is told to compile again for others.

    Its graphs take weights as inputs, and it runs one graph for all blocks that are compiled each by itself.
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
    """The compiled code, which refuses to run for weights of other MLPs than it was rewritten for."""

    def checked(*args: Any) -> Any:
        if any(args[position] is not weight for position, weight in weights.items()):
            raise ModelError("a graph that was rewritten for one MLP was called with another one's weights")
        return compiled(*args)

    return checked


@contextmanager
def _on_its_own() -> Iterator[None]:
    """Gradients on, and no weight remembered as it was cast, whatever the caller of the compiled model has switched."""
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


def _refuse_failed(checks: Sequence[Check]) -> None:
    failed = next((check for check in checks if check.outcome == "failed"), None)
    if failed is not None:
        raise VerificationError(
            f"the check {failed.name!r} failed: {failed.sentence}",
            where="torch.compile",
            hint="please report the model and the recipe",
        )
