"""The last resort in the live tree: a module whose forward becomes a graph, for an MLP that nothing smaller gives a hold of.

Flow: the module that holds the MLP is exported by itself, in eval and in train mode, with the inputs it was given → layers
are called inside its graph → the graph's code becomes the module's forward. Weights stay where they are and are looked up
by name at every call, so that state dicts, `.to()`, optimisers and copies see the module they knew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memrewrite.errors import SelectError
from memrewrite.plans import Placement
from memrewrite.site import Site

CHILD = "memory"  # layers are children of the module they work in, under this name
CONSTANT = "memrewrite_constant"
ANY = object()  # an argument that may be any number


@dataclass(frozen=True)
class Trace:
    """A module's forward in one mode, as a graph that reads its weights from the module by name.

    `given` has one entry for each argument, flattened: the shape of a tensor (None where any size will do), or the constant
    that it must be.
    `ends` names, for each site, the nodes that are its input and its output, once for each call.
    """

    graph: fx.Graph
    in_spec: TreeSpec
    out_spec: TreeSpec
    given: tuple[Any, ...]
    ends: Mapping[str, tuple[tuple[str, str], ...]]


@dataclass
class GraphHost:
    """A module that becomes a graph, and the layers placed in it so far, by site."""

    path: str
    traces: Mapping[bool, Trace]  # by training mode
    constants: Mapping[str, Tensor]
    skewed: frozenset[str]  # sites whose input and output differ in layout
    placed: dict[str, tuple[str, Placement]] = field(default_factory=dict)
    kind: type[nn.Module] = nn.Module  # the module's class, as it was


# --------------------------------------------------------------------------------------------------- in the live tree


Done = Callable[[Callable[[], object]], None]  # is told how each change is undone


def put(model: nn.Module, host: GraphHost, site: Site, layer: nn.Module, placement: Placement, done: Done) -> None:
    """Have `layer` work at a site inside a host."""
    module = model.get_submodule(host.path)
    if not host.placed:
        _become(module, host, done)
    name, children = str(len(host.placed)), module.get_submodule(CHILD)
    children.add_module(name, layer)
    done(lambda: delattr(children, name))
    if placement == "replace" and site.path in host.skewed:
        what = "the MLP's input and output lay the tokens out differently, so that a layer cannot stand in its place"
        raise SelectError(what, where=site.path, hint="put the layer beside the MLP: `placement: parallel`")
    host.placed[site.path] = (name, placement)
    done(lambda: _take_out(module, host, site))
    read = _compile(module, host)
    if placement == "replace":
        _drop(model, host, [name for name in site.parameters if name not in read], done)


def _take_out(module: nn.Module, host: GraphHost, site: Site) -> None:
    del host.placed[site.path]
    if host.placed:
        _compile(module, host)


def _drop(model: nn.Module, host: GraphHost, names: Iterable[str], done: Done) -> None:
    """Let go of weights of a host that nothing in it reads any more."""
    for name in names:
        path, _, last = name.rpartition(".")
        if not f"{path}.".startswith(f"{host.path}."):
            continue
        owner = model.get_submodule(path)
        for held in (owner._parameters, owner._buffers):
            if last in held:
                value = held.pop(last)
                done(lambda held=held, last=last, value=value: held.__setitem__(last, value))  # type: ignore[misc]


def layer_in(model: nn.Module, path: str, number: int) -> nn.Module:
    """The `number`-th layer that works inside the host at `path`."""
    return model.get_submodule(f"{path}.{CHILD}.{number}")


def _become(module: nn.Module, host: GraphHost, done: Done) -> None:
    if hasattr(module, CHILD):
        raise SelectError(f"the module {host.path!r} has an attribute {CHILD!r} of its own, where layers were to hang")
    host.kind = type(module)
    own = vars(module).pop("forward", None)  # a wrapper's, say: what it did is in the graph
    done(lambda: setattr(module, "__class__", host.kind))
    done(lambda: own is None or vars(module).update(forward=own))
    module.add_module(CHILD, nn.ModuleDict())
    done(lambda: delattr(module, CHILD))
    for name, value in host.constants.items():
        module.register_buffer(name, value, persistent=False)
        done(lambda name=name: delattr(module, name))  # type: ignore[misc]


def _compile(module: nn.Module, host: GraphHost) -> set[str]:
    """Give the module a forward that is its graph, with every layer placed so far; the weights that it still reads."""
    modes, read = {}, set[str]()
    for training, trace in host.traces.items():
        graph = _with_layers(trace, host.placed)
        read |= {f"{host.path}.{node.target}" for node in graph.nodes if node.op == "get_attr"}
        modes[training] = (trace, _function(graph))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        trace, run = modes[self.training]
        leaves, spec = tree_flatten((args, kwargs))
        _check(host.path, trace, leaves, spec)
        return tree_unflatten(list(run(self, *leaves)), trace.out_spec)

    # a class of its own, as torch's parametrizations do: tracers and copies then see the module itself called
    names = {name: getattr(host.kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    module.__class__ = type(host.kind.__name__, (host.kind,), {**names, "forward": forward})
    return read


def _with_layers(trace: Trace, placed: Mapping[str, tuple[str, Placement]]) -> fx.Graph:
    """The graph with a call of every placed layer."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in trace.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    named = {node.name: twin for node, twin in made.items()}
    for site, (name, placement) in placed.items():
        for x, y in ((named[x], named[y]) for x, y in trace.ends[site]):
            with graph.inserting_after(y):
                new = graph.call_module(f"{CHILD}.{name}", (x,))
            if placement == "replace":
                y.replace_all_uses_with(new)
                continue
            with graph.inserting_after(new):
                total = graph.call_function(_added, (new, y))
            for user in [user for user in y.users if user is not total]:
                user.replace_input_with(y, total)
    graph.eliminate_dead_code(is_impure_node=_writes)
    return graph


def _writes(node: fx.Node) -> bool:
    """Whether a node counts though nobody reads it."""
    return node.op in ("placeholder", "output") or (isinstance(node.target, OpOverload) and node.target._schema.is_mutable)


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as Python: a function of the module and the flattened arguments."""
    code = graph.python_code("self")
    made_here: dict[str, Any] = dict(code.globals)
    exec(code.src, made_here)  # noqa: S102 - torch.fx's own way from a graph to Python
    function: Callable[..., Any] = made_here["forward"]
    return function


def _added(layer: Tensor, mlp: Tensor) -> Tensor:
    """The sum; the MLP's input and its output may lay the tokens out differently."""
    added = layer.to(mlp.dtype)
    return mlp + (added if added.shape == mlp.shape else added.reshape(mlp.shape))


def _check(path: str, trace: Trace, leaves: list[Any], spec: TreeSpec) -> None:
    """Refuse a call that the graph was not made for, instead of computing something else."""
    if spec != trace.in_spec:
        raise TypeError(f"{path!r} is a graph, made for a call of the form {trace.in_spec}; this one is {spec}")
    for leaf, expected in zip(leaves, trace.given, strict=True):
        if isinstance(leaf, Tensor):
            fits = isinstance(expected, tuple) and len(expected) == leaf.ndim
            fits = fits and all(n is None or n == m for n, m in zip(expected, leaf.shape, strict=True))
        else:
            fits = expected is ANY or (type(leaf) is type(expected) and leaf == expected)
        if not fits:
            what = tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf
            raise ValueError(f"{path!r} is a graph, made for {expected} here (None: any size); this call gives {what}")
