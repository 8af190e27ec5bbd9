"""What the model computes, as graphs: live module or traced program in, `Capture` out.

Flow: record one forward (reference outputs, how every module is called) → `torch.export` of the whole model, non-strict,
then strict → block by block when neither works, and what `torch.export` refuses of these as a graph of what ran → an error
that names the submodule and quotes torch.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import CaptureError, in_a_line
from memrewrite.passes.capture.lowering import lower
from memrewrite.passes.capture.operator_trace import record
from memrewrite.passes.models.block_stacks import outermost_lists
from memrewrite.passes.models.forward import Call, Inputs, Recorder, as_inputs, first_run, on_device_of, on_meta

log = logging.getLogger("memrewrite")
PLAIN = (type(None), bool, int, float, str)  # besides tensors, what torch traces as an output


@dataclass(frozen=True)
class Segment:
    """One captured graph: of the whole model (`path` is "") or of one block, whose parameters live under `path`."""

    path: str
    graph: fx.Graph
    weights: Mapping[str, str]  # graph node name -> parameter or buffer name, as the model knows it
    literals: Mapping[str, torch.Tensor]  # graph node name -> constant tensor
    program: ExportedProgram | fx.GraphModule
    inputs: Inputs  # what it was captured with
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # graph node name -> the parameter or buffer itself
    values: Mapping[str, str] = field(default_factory=dict)  # of a lowered graph: given graph's node name -> its value's
    written: tuple[str, ...] = ()  # of a lowered graph: parameters and buffers that it writes into
    apart: tuple[str, ...] | None = None  # of a graph of what ran: the blocks in it that are segments of their own

    def example(self, given: fx.Node) -> Any:
        """What a placeholder that is no weight stood for when this was captured."""
        leaves, by_name = tree_leaves(self.inputs), self.inputs[1]
        if self.apart is not None:
            return leaves[int(given.name.rpartition("_")[2])]
        places = [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in {**self.weights, **self.literals}]
        return by_name[given.name] if given.name in by_name else leaves[places.index(given)]


@dataclass(frozen=True)
class Capture:
    """What the model computes: graphs, the inputs they were made with, and one recorded forward. Frozen."""

    segments: tuple[Segment, ...]
    inputs: Inputs
    how: str
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)  # of the live modules, by path
    outputs: Any = None  # of the recorded forward; None for a traced program

    @property
    def is_graph(self) -> bool:
        """Whether the model was given as a graph: it is rewritten graph → graph, and no module tree is edited."""
        return isinstance(self.segments[0].program, fx.GraphModule) and self.segments[0].apart is None


def capture(model: nn.Module | ExportedProgram, inputs: Any, *, dynamic: bool = False, as_tree: bool = False) -> Capture:
    """Capture `model` with example `inputs` (a tuple, a dict, or `(args, kwargs)`); tensors may be on `meta`.

    `dynamic` lets torch make batch and sequence symbolic where it can. An `ExportedProgram` or `fx.GraphModule` is taken
    as it is; `as_tree` has a `GraphModule` traced like any module. Raises `ModelError` when the model does not run on its
    inputs, `CaptureError` when torch cannot trace it.
    """
    if isinstance(model, ExportedProgram):
        return _as_given(model.module(check_guards=False), inputs or _of_program(model), "an exported program, as given")
    if isinstance(model, fx.GraphModule) and not as_tree:
        given = _unguarded(model) if _in_aten(model) else model
        return _as_given(given, inputs, "a graph module, as given")
    arguments, recorder = on_device_of(model, as_inputs(inputs)), Recorder(model)
    outputs = None
    if not on_meta(model):  # many forwards look at values, and run on meta only while they are traced
        with recorder:
            outputs = first_run(model, arguments)
    try:
        program, how = export_program(model, arguments, dynamic, recorder if on_meta(model) else None)
        made = Capture((segment_of("", program, arguments),), arguments, f"whole model, torch.export {how}")
    except Refused as refusal:
        made = _block_by_block(model, arguments, recorder.block_inputs, str(refusal))
    return replace(made, calls=recorder.calls, outputs=outputs)


def is_traced(model: nn.Module | ExportedProgram) -> bool:
    """Whether a model is a graph already: of ATen operators, or of torch's own functions and modules."""
    return isinstance(model, (ExportedProgram, fx.GraphModule))


def _in_aten(module: fx.GraphModule) -> bool:
    """Whether a graph is one of operators, with shapes known, which needs no lowering."""
    calls = [n for n in module.graph.nodes if n.op.startswith("call_") and n.users]  # none reads what only checks the inputs
    return all(node.op == "call_function" and "val" in node.meta for node in calls)


def _unguarded(module: Any) -> fx.GraphModule:
    """A graph module without the calls of modules that nothing reads: guards, by which `export` checks its inputs."""
    if not any(node.op == "call_module" for node in module.graph.nodes):
        return module  # type: ignore[no-any-return]
    graph = copy.deepcopy(module.graph)
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _as_given(module: nn.Module, inputs: Any, how: str) -> Capture:
    """A model that is a graph already."""
    arguments = on_device_of(module, as_inputs(inputs))
    outputs = first_run(module, arguments)
    is_given = not isinstance(module, fx.GraphModule) or _in_aten(module)
    segment = _graph_segment(module, arguments) if is_given else lowered_segment(module, arguments)
    return Capture((segment,), arguments, how, outputs=outputs)


# ------------------------------------------------------------------------------------------------- torch.export


class Refused(Exception):  # noqa: N818 - a verdict, turned into an error that names the place
    """`torch.export` would not trace; the message is torch's own, shortened."""


def export_program(
    model: nn.Module, inputs: Inputs, dynamic: bool, recorder: Recorder | None = None, *, axes: int = 2
) -> tuple[ExportedProgram, str]:
    """`torch.export` of a module, and how it went: dynamic shapes where asked and possible, non-strict, then strict.

    Of every input the first `axes` axes may become dynamic. Raises `Refused` with torch's reasons.
    """
    model = _as_module(model)
    args, kwargs = copy.deepcopy(inputs)
    shapes = _auto_dims((args, kwargs), axes) if dynamic else None
    attempts = [(False, shapes), (True, shapes)] if shapes else []
    reasons = []
    for strict, dims in [*attempts, (False, None), (True, None)]:
        how = ("strict" if strict else "non-strict") + (", dynamic shapes" if dims else "")
        dropped: set[str] = set()
        seen = recorder if recorder and not strict else nullcontext()
        try:
            with torch.no_grad(), hushed(), seen, nullcontext() if strict else _known_outputs(model, dropped):
                dynamic_shapes = None if dims is None else _by_argument(model, dims)
                program = torch.export.export(model, args, kwargs, strict=strict, dynamic_shapes=dynamic_shapes)
            _refuse_bodies(program)
            return program, how + (f", outputs of kind {', '.join(sorted(dropped))} left aside" if dropped else "")
        except Exception as error:
            log.debug("torch.export %s refused %s", how, type(model).__name__, exc_info=True)
            reasons.append(f"{how}: {type(error).__name__}: {in_a_line(error)}")
    raise Refused("; ".join(reasons[-2:]))


def _refuse_bodies(program: ExportedProgram) -> None:
    """Raise `Refused` where weights are multiplied in graphs of their own, as under `torch.autocast`: it would hide MLPs."""
    held = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and any(n.name in held for n in node.all_input_nodes):
            raise Refused(f"`{node.target}` keeps a part of it in a graph of its own")


def _as_module(model: nn.Module) -> nn.Module:
    """A graph module as a module like any other: `torch.export` would interpret its nodes, past the modules it calls."""
    if not isinstance(model, fx.GraphModule):
        return model
    plain: nn.Module = nn.Module.__new__(type("Generated", (nn.Module,), {"forward": type(model).forward}))
    plain.__dict__ = model.__dict__  # one tree: what is edited in one is edited in the other
    return plain


@contextmanager
def _known_outputs(model: nn.Module, dropped: set[str]) -> Iterator[None]:
    """Have `model` return its tensors alone where it returns objects that torch cannot trace, such as caches.

    The tensors are the witness; what is left aside is named in `dropped`.
    """
    original, own = model.forward, "forward" in vars(model)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        strange = {type(leaf).__name__ for leaf in tree_leaves(out) if not isinstance(leaf, (torch.Tensor, *PLAIN))}
        dropped.update(strange)
        return tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)) if strange else out

    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward


@contextmanager
def hushed() -> Iterator[None]:
    """A refused attempt is told in one line, not in torch's thousands: what it warns, logs and prints is dropped."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _auto_dims(inputs: Inputs, axes: int) -> Inputs:
    """The first axes, batch and sequence, left to torch: it makes them symbolic or says they are fixed."""

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {axis: Dim.AUTO for axis in range(min(axes, leaf.ndim)) if leaf.shape[axis] > 1}

    shapes: Inputs = tree_map(dims, inputs)
    return shapes


def _by_argument(model: nn.Module, dims: Inputs) -> Any:
    """`dims` by the names of the forward's arguments."""
    import inspect

    positional = dict(inspect.signature(model.forward).bind_partial(*dims[0]).arguments)
    return {**positional, **dims[1]} or None


def _block_by_block(model: nn.Module, inputs: Inputs, block_inputs: Mapping[str, Inputs], refusal: str) -> Capture:
    """Capture each repeated block by itself, with the inputs it had in the recorded forward; then what is around them."""
    segments, refused = [], []
    for list_path, blocks in outermost_lists(model):
        for name, block in blocks.named_children():
            path = f"{list_path}.{name}" if list_path else name
            if path not in block_inputs:
                continue
            try:
                program, _ = export_program(block, block_inputs[path], dynamic=False)
                segments.append(_of_the_model(model, segment_of(path, program, block_inputs[path])))
            except Refused as error:
                refused.append((path, str(error)))
    exported = len(segments)
    if on_meta(model):  # nothing can run there
        if not segments:
            path, reason = refused[0] if refused else ("", refusal)
            raise CaptureError(
                f"torch.export refused the model ({refusal}) and every block of it ({reason})",
                where=path or type(model).__name__,
                hint="give the model on a device, with values, so that what runs can be recorded; or smaller inputs",
            )
        for path, reason in refused:
            log.warning("block %s could not be captured and is left as it is: %s", path, reason)
    else:
        segments += [_recorded_segment(model, path, block_inputs[path], ()) for path, _ in refused]
        segments.append(_recorded_segment(model, "", inputs, tuple(segment.path for segment in segments)))
    what = "refused" if on_meta(model) else "recorded as they ran"
    how = f"block by block ({exported} blocks exported; whole model refused: {refusal})"
    if refused:
        how += f"; {len(refused)} blocks {what}: " + ", ".join(path for path, _ in refused) + f" ({refused[0][1]})"
    return Capture(tuple(segments), inputs, how)


# ---------------------------------------------------------------------------------------- graphs and their weights


def recapture(model: nn.Module, segment: Segment) -> Segment:
    """Capture again what a segment was captured from, after the model was edited. Raises `CaptureError`."""
    if segment.apart is not None:
        return _recorded_segment(model, segment.path, segment.inputs, segment.apart)
    if isinstance(segment.program, fx.GraphModule):
        return lowered_segment(model, segment.inputs) if segment.values else _graph_segment(model, segment.inputs)
    block = model.get_submodule(segment.path)
    try:
        program, _ = export_program(block, segment.inputs, dynamic=False)
    except Refused as refusal:
        raise CaptureError(f"torch.export refused the edited model: {refusal}", where=segment.path or None) from refusal
    return _of_the_model(model, segment_of(segment.path, program, segment.inputs))


def segment_of(path: str, program: ExportedProgram, inputs: Inputs) -> Segment:
    """The graph of the module at `path`, exported by itself."""
    signature = program.graph_signature
    prefix = f"{path}." if path else ""
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {node: program.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    state = {**program.state_dict, **program.constants}  # buffers that are no part of the state are among the constants
    tensors = {node: state[name] for node, name in held.items()}
    weights = {node: prefix + name for node, name in held.items()}
    return Segment(path, program.graph, weights, constants, program, inputs, tensors)


def _recorded_segment(model: nn.Module, path: str, inputs: Inputs, apart: tuple[str, ...]) -> Segment:
    """What runs in one forward of a block or the model; its graph holds for these inputs alone."""
    made = _graph_segment(record(model.get_submodule(path), inputs, apart), inputs)
    prefix = f"{path}." if path else ""
    weights = {node: prefix + name for node, name in made.weights.items()}
    return _of_the_model(model, replace(made, path=path, weights=weights, apart=apart))


def _of_the_model(model: nn.Module, segment: Segment) -> Segment:
    """A segment of a part, its weights named as the whole model names them first: two parts may share a module."""
    if not segment.path:
        return segment
    first: dict[int, str] = {}
    names = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    called = {name: first.setdefault(id(tensor), name) for name, tensor in names}
    return replace(segment, weights={node: called.get(name, name) for node, name in segment.weights.items()})


def _graph_segment(module: nn.Module, inputs: Inputs) -> Segment:
    """The graph of an already traced module; its `get_attr` nodes are the weights."""
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"a graph module was expected, not {type(module).__name__}")
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    named = {n.name: str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    weights = {node: name for node, name in named.items() if name in held}
    literals = {node: attrgetter(name)(module) for node, name in named.items() if name not in held}
    constants = {node: value for node, value in literals.items() if isinstance(value, torch.Tensor)}
    tensors = {node: held[name] for node, name in weights.items()}
    return Segment("", module.graph, weights, constants, module, inputs, tensors)


def lowered_segment(module: Any, inputs: Inputs) -> Segment:
    """The ATen graph of a module whose graph is written in torch's own functions, methods and modules."""
    made = lower(module, inputs)
    tensors = {node: attrgetter(name)(module) for node, name in made.weights.items()}
    return Segment("", made.graph, made.weights, made.literals, module, inputs, tensors, made.values, made.written)


def _of_program(program: ExportedProgram) -> Inputs:
    example: Any = program.example_inputs
    return example if example is not None else ((), {})
