"""ONNX files are data: what would read another file, run code or never end is refused before a runtime sees it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import memrewrite
from memrewrite.errors import ExportError
from memrewrite.passes.onnx.reading import MOST_NODES, read_graph

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("memrewrite", 1)]
Build = Callable[[], onnx.ModelProto]


def model(*nodes: onnx.NodeProto, functions: Any = (), initializer: Any = ()) -> onnx.ModelProto:
    """A file with one input `x` and one output `y`, float vectors of length 2."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes), "g", ports[:1], ports[1:], list(initializer))
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=9)
    return made


def written(made: onnx.ModelProto, folder: Path) -> Path:
    file = folder / "model.onnx"
    file.write_bytes(made.SerializeToString())
    return file


def external(location: str, **entries: str) -> TensorProto:
    """Two numbers that are in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "8", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(tensor: TensorProto) -> onnx.NodeProto:
    node: onnx.NodeProto = helper.make_node("Constant", [], ["w"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    return node


def in_a_branch(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    """The nodes in both branches of an `If`, twice nested."""
    for _ in range(2):
        graph = helper.make_graph(list(nodes), "g", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [2])])
        nodes = (helper.make_node("If", ["x"], ["w"], then_branch=graph, else_branch=graph),)
    return nodes[0]


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    made: onnx.FunctionProto = helper.make_function("memrewrite", name, ["x"], ["y"], list(nodes), OPSETS)
    return made


def call(name: str, source: str = "x", result: str = "y") -> onnx.NodeProto:
    made: onnx.NodeProto = helper.make_node(name, [source], [result], domain="memrewrite")
    return made


ADD = helper.make_node("Add", ["x", "w"], ["y"])
PLACES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "a weight": lambda tensor: model(ADD, initializer=[tensor]),
    "a constant": lambda tensor: model(constant(tensor), ADD),
    "a branch": lambda tensor: model(in_a_branch(constant(tensor)), ADD),
    "a function": lambda tensor: model(call("f"), functions=[function("f", constant(tensor), ADD)]),
    "a function that is not called": lambda tensor: model(
        helper.make_node("Identity", ["x"], ["y"]), functions=[function("f", constant(tensor), ADD)]
    ),
}
OUTSIDE = ["../secret.bin", "{folder}/secret.bin", "sub/../../secret.bin", "link.bin", "linked/secret.bin"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with weights, next to a file that is not the model's, and with links to it."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(np.ones(2, np.float32).tobytes())
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")
    (tmp_path / "model" / "linked").symlink_to(tmp_path)
    for name in ("w.bin", "sub/w.bin"):
        (tmp_path / "model" / name).write_bytes(np.full(2, 3, np.float32).tobytes())
    return tmp_path / "model"


@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_of_the_directory_are_refused(place: str, location: str, folder: Path) -> None:
    file = written(PLACES[place](external(location.format(folder=folder.parent))), folder)
    with pytest.raises(ExportError, match="outside of the directory of the file"):
        memrewrite.onnx_session(file)


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin", "./sub/../w.bin"])
def test_weights_in_the_directory_are_read(location: str, folder: Path) -> None:
    file = written(PLACES["a weight"](external(location)), folder)
    read_graph(file)
    if ".." not in location:  # which onnxruntime refuses itself
        assert memrewrite.onnx_session(file).run(None, {"x": np.zeros(2, np.float32)})[0].tolist() == [3, 3]


def test_a_file_and_its_weights_may_be_links_into_one_directory(folder: Path, tmp_path: Path) -> None:
    """A download cache keeps files under their hashes, and links to them."""
    written(PLACES["a weight"](external("w.bin")), folder)
    (tmp_path / "cache").mkdir()
    for name in ("model.onnx", "w.bin"):
        (tmp_path / "cache" / name).symlink_to(folder / name)
    read_graph(tmp_path / "cache" / "model.onnx")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "nothing.bin"}, "'nothing.bin' is not next to it"),
        ({"location": ""}, "is not next to it"),
        ({"location": "sub"}, "is not next to it"),
        ({"location": "a\0b"}, "is not next to it"),
        ({"location": "a" * 100_000}, "is not next to it"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "140000000000000"}, "is not next to it"),  # memory of the process
        ({"location": "pipe"}, "is not next to it"),
        ({"offset": "-1"}, "not written as the standard says"),
        ({"length": "8 "}, "not written as the standard says"),
        ({"length": "\u0668"}, "not written as the standard says"),
        ({"basepath": "/"}, "not written as the standard says"),
        ({"offset": "4"}, "has 8 bytes, and at least 12 are needed"),
        ({"length": "9" * 30}, "weights are damaged"),
    ],
)
def test_weights_that_are_not_in_a_file_are_refused(entries: dict[str, str], message: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ExportError, match=message):
        read_graph(written(PLACES["a weight"](external(**{"location": "w.bin", **entries})), folder))


@pytest.mark.parametrize("operator", ["EPContext", "PythonOp", "PythonOpGrad"])
@pytest.mark.parametrize("domain", ["com.microsoft", "", "memrewrite"])
def test_nodes_that_run_code_or_load_files_are_refused(operator: str, domain: str, folder: Path) -> None:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain, ep_cache_context="w.bin", embed_mode=0)
    for made in (model(node), model(call("f"), functions=[function("f", node)]), model(in_a_branch(node), ADD)):
        with pytest.raises(ExportError, match=f"a node '{operator}', which runs code or loads a file"):
            memrewrite.onnx_session(written(made, folder))


def chain(count: int, calls: int) -> list[onnx.FunctionProto]:
    """Functions of which each calls the next one `calls` times."""
    made = []
    for number in range(count):
        values = ["x", *(f"v{step}" for step in range(1, calls)), "y"]
        made.append(function(f"f{number}", *(call(f"f{number + 1}", *pair) for pair in itertools.pairwise(values))))
    return [*made, function(f"f{count}", helper.make_node("Identity", ["x"], ["y"]))]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([function("f0", call("f0"))], "call themselves: f0"),
        ([function("f0", call("f1")), function("f1", call("f2")), function("f2", call("f1"))], "call themselves"),
        ([function("f0", in_a_branch(call("f0", "x", "w")), ADD)], "call themselves"),
        (chain(30, 10), "with its functions expanded the file has"),
        (chain(7, 10), f"at most {MOST_NODES} are read"),
        ([function("f0", ADD), function("f0", ADD)], "defines the function 'f0' twice"),
    ],
    ids=["one", "three", "in a branch", "10^30", "10^7", "twice"],
)
def test_functions_that_never_end_are_refused(functions: Any, message: str, folder: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ExportError, match=message):
        memrewrite.onnx_session(written(model(call("f0"), functions=functions), folder))
    assert time.monotonic() - begun < 5


def test_many_functions_one_after_another_are_read(folder: Path) -> None:
    """Their number is no recursion in Python."""
    read_graph(written(model(call("f0"), functions=chain(5_000, 1)), folder))


@pytest.mark.parametrize("edit", ["producer_name", "graph.name", "node", "input", "metadata"])
def test_text_that_is_not_utf8_is_refused(edit: str, folder: Path) -> None:
    made = model(helper.make_node("Identity", ["x"], ["y"], name="QQQQ" if edit == "node" else "n"))
    if edit == "metadata":
        made.metadata_props.add(key="memrewrite.dtype", value="QQQQ")
    elif edit == "input":
        made.graph.input[0].name = "QQQQ"
    elif edit == "graph.name":
        made.graph.name = "QQQQ"
    elif edit == "producer_name":
        made.producer_name = "QQQQ"
    (folder / "model.onnx").write_bytes(made.SerializeToString().replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(ExportError, match="not UTF-8"):
        memrewrite.onnx_session(folder / "model.onnx")


def test_what_is_no_file_is_refused_and_never_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.onnx")
    for name in ("pipe.onnx", "sub", "nothing.onnx", "a\0b", "a" * 10_000, "model.onnx/x"):
        with pytest.raises(ExportError):
            read_graph(folder / name)


@pytest.mark.parametrize("suffix", [".json", ".textproto", ".onnxtxt", ".ort"])
def test_the_suffix_does_not_choose_another_format(suffix: str, folder: Path) -> None:
    file = written(PLACES["a weight"](numpy_helper.from_array(np.ones(2, np.float32), "w")), folder)
    renamed = file.rename(folder / f"model{suffix}")
    assert memrewrite.onnx_session(renamed).run(None, {"x": np.zeros(2, np.float32)})[0].tolist() == [1, 1]
