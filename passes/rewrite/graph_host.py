"""Replaces the forward of a module by its exported graph, for MLPs at which no submodule starts or ends.

This is the last way to edit a live module tree: the MLP's weights are bare parameters, or slices of larger weights.

Flow: the module that contains the MLP is exported by itself, in eval and in train mode, with the inputs it receives → calls
of layers are inserted into its graph → the graph's code becomes the module's forward. Weights stay where they are and are
looked up by name in every call, so that state dicts, `.to()`, optimizers and copies keep working.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memrewrite.errors import ModelError, SelectError
from memrewrite.passes.graphs.copying import copied
from memrewrite.passes.rewrite.layer_call import CHILD, insert_layer
from memrewrite.plans import Placement
from memrewrite.site import Site

CONSTANT = "memrewrite_constant"
ANOTHER_CALL = "call it as in the example, or rewrite the model again with an example of this call"
ANY = object()  # in `Trace.given`: any number is accepted


@dataclass(frozen=True)
class Trace:
    """A module's forward in one mode, as a graph that reads its weights from the module by name.

    `given` has one entry for each flattened argument: the shape of a tensor (None where any size is accepted), or the
    constant that the argument must equal.
    `ends` has, for each site, the names of its input node and its output node, once for each call.
    """

    graph: fx.Graph
    in_spec: TreeSpec
    out_spec: TreeSpec
    given: tuple[Any, ...]
    ends: Mapping[str, tuple[tuple[str, str], ...]]


@dataclass
class GraphHost:
    """A module whose forward becomes a graph, and the layers placed in it so far, by site."""

    path: str
    traces: Mapping[bool, Trace]  # by training mode
    constants: Mapping[str, Tensor]
    skewed: frozenset[str]  # sites whose input and output have different token layouts
    placed: dict[str, tuple[str, Placement]] = field(default_factory=dict)
    kind: type[nn.Module] = nn.Module  # the module's original class


# --------------------------------------------------------------------------------------------------- in the live tree


AddUndo = Callable[[Callable[[], object]], None]  # receives a function that undoes the last change


def put(model: nn.Module, host: GraphHost, site: Site, layer: nn.Module, placement: Placement, done: AddUndo) -> None:
    """Insert `layer` at a site of a host. Raises `SelectError` where it cannot replace the MLP."""
    module = model.get_submodule(host.path)
    if not all(site.path in trace.ends for trace in host.traces.values()):
        raise SelectError(f"the graph of {host.path!r} does not contain the MLP {site.path!r}", where=site.path)
    if not host.placed:
        _add_layers_child(module, host, done)
    name, children = str(len(host.placed)), module.get_submodule(CHILD)
    children.add_module(name, layer)
    done(lambda: delattr(children, name))
    if placement == "replace" and site.path in host.skewed:
        raise SelectError(
            "the MLP's input and output have different token layouts, so that a layer cannot replace it",
            where=site.path,
            hint="add the layer to the MLP: `placement: parallel`",
        )
    host.placed[site.path] = (name, placement)
    done(lambda: _take_out(module, host, site))
    read = _compile(module, host)
    if placement == "replace":
        _drop_weights(model, host, [name for name in site.parameters if name not in read], done)


def _take_out(module: nn.Module, host: GraphHost, site: Site) -> None:
    del host.placed[site.path]
    if host.placed:
        _compile(module, host)


def _drop_weights(model: nn.Module, host: GraphHost, names: Iterable[str], done: AddUndo) -> None:
    """Remove weights of a host that its graphs do not read any more."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path, _, last = name.rpartition(".")
        if not f"{path}.".startswith(f"{host.path}."):
            continue
        owner = modules.get(path)
        if owner is None:
            raise SelectError(f"the model has no module {path!r}", hint="the plan was made for another model: plan again")
        for tensors in (owner._parameters, owner._buffers):
            if last in tensors:
                value = tensors.pop(last)
                done(lambda tensors=tensors, last=last, value=value: tensors.__setitem__(last, value))  # type: ignore[misc]


def layer_in(model: nn.Module, path: str, number: int) -> nn.Module:
    """The `number`-th layer in the host at `path`."""
    return model.get_submodule(f"{path}.{CHILD}.{number}")


def _add_layers_child(module: nn.Module, host: GraphHost, done: AddUndo) -> None:
    if hasattr(module, CHILD):
        raise SelectError(f"the module {host.path!r} already has an attribute {CHILD!r}, the name of the layers' container")
    for name in host.constants:
        if hasattr(module, name):
            raise SelectError(f"the module {host.path!r} already has an attribute {name!r}, the name of a constant")
    _refuse_unknown_weights(module, host)
    host.kind = type(module)
    own = vars(module).pop("forward", None)  # set by a wrapper, for example: its effect is in the graph
    done(lambda: setattr(module, "__class__", host.kind))
    done(lambda: own is None or vars(module).update(forward=own))
    module.add_module(CHILD, nn.ModuleDict())
    done(lambda: delattr(module, CHILD))
    for name, value in host.constants.items():
        module.register_buffer(name, value, persistent=False)
        done(lambda name=name: delattr(module, name))  # type: ignore[misc]


def _refuse_unknown_weights(module: nn.Module, host: GraphHost) -> None:
    """Raise `SelectError` unless every name that the graphs read is that of a parameter, a buffer or a constant.

    The names become source code in `_function`, so a part of one may be no other text: no quotation mark, no keyword.
    """
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    known = {*host.constants, *(name for name, _ in tensors)}
    for trace in host.traces.values():
        for node in trace.graph.nodes:
            if node.op != "get_attr":
                continue
            if node.target not in known:
                raise SelectError(f"the graph of {host.path!r} reads {node.target!r}, which is no parameter or buffer of it")
            if not all(_can_be_source(part) for part in str(node.target).split(".")):
                raise SelectError(f"a graph cannot read a weight of the name {node.target!r}", where=host.path)


def _can_be_source(part: str) -> bool:
    """Whether torch.fx can write an access to the attribute `part`: as `.part`, or as `getattr(..., "part")`."""
    if part.isidentifier():
        return not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    return part.isprintable() and not set(part) & {'"', "\\"}


def _compile(module: nn.Module, host: GraphHost) -> set[str]:
    """Set the module's forward to its graph with every layer placed so far. Returns the names of the weights it reads."""
    modes, read = {}, set[str]()
    for training, trace in host.traces.items():
        graph = _with_layers(trace, host.placed)
        read |= {f"{host.path}.{node.target}" for node in graph.nodes if node.op == "get_attr"}
        modes[training] = (trace, _function(graph))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        trace, run = modes[self.training]
        leaves, spec = tree_flatten((args, kwargs))
        _check_arguments(host.path, trace, leaves, spec)
        return tree_unflatten(list(run(self, *leaves)), trace.out_spec)

    # a new class, as torch's parametrizations make: tracers and copies see a call of the module itself
    names = {name: getattr(host.kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    module.__class__ = type(host.kind.__name__, (host.kind,), {**names, "forward": forward})
    return read


def _with_layers(trace: Trace, placed: Mapping[str, tuple[str, Placement]]) -> fx.Graph:
    """A copy of the graph with a call of every placed layer."""
    graph, copies = copied(trace.graph.nodes)
    by_name = {node.name: copy for node, copy in copies.items()}
    for site, (name, placement) in placed.items():
        for x, y in trace.ends[site]:
            insert_layer(graph, f"{CHILD}.{name}", by_name[x], by_name[y], placement)
    graph.eliminate_dead_code(is_impure_node=_must_stay)
    return graph


def _must_stay(node: fx.Node) -> bool:
    """True if a node must be kept although its result is unused."""
    return node.op in ("placeholder", "output") or (isinstance(node.target, OpOverload) and node.target._schema.is_mutable)


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as Python: a function of the module and the flattened arguments."""
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)  # noqa: S102 - torch.fx turns graphs into Python in the same way
    function: Callable[..., Any] = namespace["forward"]
    return function


def _check_arguments(path: str, trace: Trace, leaves: list[Any], spec: TreeSpec) -> None:
    """Raise `ModelError` for a call that the graph was not traced for."""
    if spec != trace.in_spec:
        what = f"{path!r} is a graph, traced for a call of the form {trace.in_spec}; this one is {spec}"
        raise ModelError(what, hint=ANOTHER_CALL)
    for leaf, expected in zip(leaves, trace.given, strict=True):
        if isinstance(leaf, Tensor):
            fits = isinstance(expected, tuple) and len(expected) == leaf.ndim
            fits = fits and all(n is None or n == m for n, m in zip(expected, leaf.shape, strict=True))
        else:
            fits = expected is ANY or (type(leaf) is type(expected) and leaf == expected)
        if not fits:
            value = tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf
            what = f"{path!r} is a graph, traced for {expected} here (None: any size); this call has {value}"
            raise ModelError(what, hint=ANOTHER_CALL)
