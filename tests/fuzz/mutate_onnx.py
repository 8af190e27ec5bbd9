"""One random change of an ONNX file: of any field of any message in it, or an addition that would do harm."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from .hostile import Hostile
from .mutate_bytes import change_bytes

AXES = ("batch * 99999999999", "sequence*" * 100 + "sequence", "9" * 6_000, "-1", "batch", "zqy")
Place = tuple[Any, FieldDescriptor, int]  # a message, one of its set fields, the number of a repeated value (-1: not repeated)
INTEGERS = (0, 1, -1, 2, 7, 16, 255, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))


def change_onnx(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """One change of a model; `other` is another model, from which messages are copied."""
    import onnx

    model, donor = onnx.ModelProto(), onnx.ModelProto()
    try:
        model.ParseFromString(data)
        donor.ParseFromString(other)
    except DecodeError:
        return change_bytes(rng, data, other, words)
    chance, places = rng.random(), places_of(model)
    if chance < 0.1 or not places:
        return change_bytes(rng, data, other, words)
    try:
        if chance < 0.35:
            rng.choice(ADDITIONS)(rng, model, words)
        else:
            _change_field(rng, places, places_of(donor), words)
        return bytes(model.SerializeToString())
    except (EncodeError, UnicodeError, ValueError, RecursionError):  # what protobuf itself refuses to write
        return change_bytes(rng, data, other, words)


def places_of(message: Message) -> list[Place]:
    """Every value in a message and in those inside it; of numbers and bytes of weights only a few."""
    found: list[Place] = []
    todo = [message]
    while todo:
        node = todo.pop()
        for field, value in node.ListFields():
            repeated = _is_repeated(field, value)
            for number in range(min(len(value), 200)) if repeated else (-1,):
                found.append((node, field, number))
                if field.type == FieldDescriptor.TYPE_MESSAGE:
                    todo.append(value[number] if repeated else value)
    return found


def _is_repeated(field: FieldDescriptor, value: Any) -> bool:
    return not isinstance(value, (str, bytes, int, float, Message)) and hasattr(value, "__len__")


def _change_field(rng: Random, places: list[Place], gifts: list[Place], words: Hostile) -> None:
    message, field, number = rng.choice(places)
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    change = rng.randrange(4)
    if change == 0:
        if number < 0:
            message.ClearField(field.name)
        else:
            del getattr(message, field.name)[number]
    elif change == 1 and number >= 0:
        values = getattr(message, field.name)
        for _ in range(rng.choice([1, 1, 30])):
            if is_message:
                values.add().CopyFrom(values[number])
            else:
                values.append(values[number])
    elif is_message:
        same = [(m, f, n) for m, f, n in gifts if f.type == field.type and f.message_type is field.message_type]
        if same:
            m, f, n = rng.choice(same)
            gift = getattr(m, f.name)[n] if n >= 0 else getattr(m, f.name)
            (getattr(message, field.name)[number] if number >= 0 else getattr(message, field.name)).CopyFrom(gift)
    else:
        new = _scalar(rng, field, words)
        if number >= 0:
            getattr(message, field.name)[number] = new
        else:
            setattr(message, field.name, new)


def _scalar(rng: Random, field: FieldDescriptor, words: Hostile) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(words.words)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 1, 4, 64]))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf")])
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(list(field.enum_type.values_by_number))
    if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT64):
        return rng.choice([0, 1, 2, 7, 11, 16, 23, 99, 2**31 - 1])
    return rng.choice(INTEGERS)


# ------------------------------------------------------------------------------------------------------------- additions


def _external(rng: Random, model: Any, words: Hostile) -> None:
    """A weight that is read from a file of the author's choice, also in a constant and in a function."""
    tensors = [*model.graph.initializer] or [model.graph.initializer.add(name="zqy", data_type=1, dims=[4])]
    tensor = rng.choice(tensors)
    if rng.random() < 0.5:
        nodes = rng.choice([model.graph.node, *(function.node for function in model.functions)])
        node = nodes.add(op_type="Constant", output=["zqy_constant"])
        attribute = node.attribute.add(name="value", type=4)
        attribute.t.CopyFrom(tensor)
        tensor = attribute.t
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    del tensor.external_data[:]
    entries = {"location": rng.choice(words.words), "offset": rng.choice(["0", "-1", "zqy", "9" * 30]), "length": "16"}
    for key, value in entries.items():
        if rng.random() < 0.9:
            tensor.external_data.add(key=key, value=value)


def _metadata(rng: Random, model: Any, words: Hostile) -> None:
    key = rng.choice(["source", "selections", "dtype", "with_past", "plan", "recipe", "versions"])
    value = rng.choice([*words.words, "zqx_evil.py", "saved", "-1", "0", "3", "1000000000000", "float16", "true", "{}"])
    for entry in [entry for entry in model.metadata_props if entry.key == f"memrewrite.{key}"]:
        model.metadata_props.remove(entry)
    model.metadata_props.add(key=f"memrewrite.{key}", value=value)


def _node_that_runs_code(rng: Random, model: Any, words: Hostile) -> None:
    node = model.graph.node.add(op_type=rng.choice(["EPContext", "PythonOp", "Zqy"]), output=["zqy_out"])
    node.domain = rng.choice(["com.microsoft", "ai.onnx.contrib", "zqx", "memrewrite"])
    node.input.extend(value.name for value in model.graph.input)
    for name in ("ep_cache_context", "source", "func_name", "code"):
        node.attribute.add(name=name, type=3, s=rng.choice(words.words).encode("utf-8", "replace"))
    model.opset_import.add(domain=node.domain, version=1)


def _functions(rng: Random, model: Any, words: Hostile) -> None:
    """Functions that call each other: in a circle, or each the next one many times."""
    count, calls = rng.choice([(1, 1), (2, 1), (30, 10), (300, 1)])
    for number in range(count):
        last = number == count - 1
        function = model.functions.add(name=f"zqy{number}", domain="memrewrite", input=["x"], output=["y"])
        function.opset_import.add(domain="", version=20)
        function.opset_import.add(domain="memrewrite", version=1)
        value = "x"
        for call in range(calls):
            result = "y" if call == calls - 1 else f"v{call}"
            ends = last and calls > 1
            target = "Identity" if ends else f"zqy{0 if last else number + 1}"
            function.node.add(op_type=target, domain="" if ends else "memrewrite", input=[value], output=[result])
            value = result
    model.graph.node.add(op_type="zqy0", domain="memrewrite", input=[model.graph.input[0].name], output=["zqy_called"])


def _large(rng: Random, model: Any, words: Hostile) -> None:
    """A value of a huge shape, an axis of a huge length, or a loop without end."""
    change = rng.randrange(3)
    if change == 0 and model.graph.initializer:
        rng.choice(model.graph.initializer).dims[:] = [rng.choice([2**20, 2**40, 2**62])] * rng.choice([1, 2, 3])
    elif change == 1:
        dims = rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape.dim
        for dim in dims:
            dim.dim_param = rng.choice(AXES)
    else:
        shape = model.graph.node.add(op_type="Constant", output=["zqy_shape"])
        attribute = shape.attribute.add(name="value_ints", type=7)
        attribute.ints.extend([rng.choice([2**20, 2**31, 2**40])] * 2)
        model.graph.node.add(op_type="ConstantOfShape", input=["zqy_shape"], output=["zqy_large"])


def _deep(rng: Random, model: Any, words: Hostile) -> None:
    """Graphs inside attributes of nodes inside graphs."""
    graph = model.graph
    for _ in range(rng.choice([3, 15, 40])):
        node = graph.node.add(op_type="If", input=["zqy"], output=["zqy"])
        for branch in ("then_branch", "else_branch"):
            attribute = node.attribute.add(name=branch, type=5)
            attribute.g.name = "zqy"
        graph = attribute.g


ADDITIONS: tuple[Callable[[Random, Any, Hostile], None], ...] = (
    _external,
    _external,
    _metadata,
    _metadata,
    _node_that_runs_code,
    _functions,
    _large,
    _deep,
)
