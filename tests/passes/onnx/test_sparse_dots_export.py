"""`sparse_dots` in ONNX: its function of standard operators, and whole models with PEER layers by every route."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import near
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_files import arrays, difference

import memrewrite
from memrewrite.kernels import reference
from memrewrite.kernels.onnx_functions import DOMAIN, functions
from memrewrite.passes.onnx.check.check import check_onnx
from memrewrite.passes.onnx.session import calls_of

TYPES = {"float32": np.float32, "float16": np.float16}


def alone(values: str, x: str, index: str) -> onnx.ModelProto:
    """A model of one `SparseDots`, with its function."""
    node = helper.make_node("SparseDots", ["values", "indices", "x"], ["dots"], domain=DOMAIN)
    kinds = {"values": values, "indices": index, "x": x}
    types = {name: helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for name, kind in kinds.items()}
    ports = [helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in types.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "g", ports, [helper.make_empty_tensor_value_info("dots")])
    wanted = [f for f in functions(20) if f.name == "SparseDots"]
    return helper.make_model(graph, functions=wanted, opset_imports=opsets, ir_version=9)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 9),
    st.sampled_from(["int32", "int64"]),
    st.sampled_from(list(TYPES)),
    st.sampled_from(list(TYPES)),
)
def test_the_function_computes_the_operator(slots, width, tokens, reads, index, values, x):
    random = np.random.default_rng(slots * width + tokens)
    feed = {
        "values": random.standard_normal((slots, width)).astype(values),
        "indices": random.integers(0, slots, (tokens, reads)).astype(index),
        "x": random.standard_normal((tokens, width)).astype(x),
    }
    model = alone(values, x, index)
    exact = {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in feed.items()}
    wanted = reference.sparse_dots(*(torch.from_numpy(exact[name]) for name in ("values", "indices", "x")))
    evaluators = [onnxruntime.InferenceSession(model.SerializeToString())]
    if tokens and reads:  # numpy's matmul of empty arrays has another shape
        evaluators.append(ReferenceEvaluator(model))
    for evaluator in evaluators:
        (found,) = evaluator.run(None, feed)
        assert found.dtype == np.float32
        assert near(found, wanted.numpy(), 1e-5)


@pytest.mark.parametrize("index", [-1, -7, 7, 2**40])
def test_the_function_refuses_an_index_outside_the_table(index):
    feed = {"values": np.ones((7, 3), np.float32), "indices": np.array([[0, index]]), "x": np.ones((1, 3), np.float32)}
    session = onnxruntime.InferenceSession(alone("float32", "float32", "int64").SerializeToString())
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of"):
        session.run(None, feed)


@pytest.fixture(scope="module")
def rewritten():
    """A model with PEER layers, and its inputs."""
    model, inputs = tiny.named("modular")
    recipe = tiny.recipe(verify="off")
    recipe["replace"][0]["with"] = "peer"
    memrewrite.apply(model, recipe, inputs)
    return model.eval(), inputs


@pytest.mark.parametrize(
    ("op", "with_function"),
    [("both", {"SparseLookup", "SparseDots", "ProductKeyTopk"}), ("native", {"SparseDots"}), ("standard", set())],
)
def test_files_have_the_functions_that_their_routes_need(rewritten, op, with_function, library: Path, tmp_path: Path):
    model, inputs = rewritten
    path = tmp_path / "model.onnx"
    written = memrewrite.export_onnx(model, path, inputs, op=op)
    counts = {"ProductKeyTopk": 3, "SparseDots": 3, "SparseLookup": 3}
    assert written.nodes == ({} if op == "standard" else counts)
    file = onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    assert {function.name for function in file.functions} == with_function
    tables = sorted(i.name for i in file.graph.initializer if tuple(i.dims) == (64, tiny.WIDTH) and i.name.startswith("memory"))
    assert tables == ["memory.shared.inputs.values", "memory.shared.values"]
    wanted = tiny.values_of(model, inputs)
    if op != "native":
        stock = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert difference(stock.run(None, arrays(inputs))[0], wanted) < 1e-4
    if op != "standard":
        session = memrewrite.onnx_session(path, op="native", library=library)
        assert session.memory_kernels == {"SparseDots": "standard", "SparseLookup": "native", "ProductKeyTopk": "native"}
        before = calls_of(library, "SparseLookup"), calls_of(library, "ProductKeyTopk")
        assert difference(session.run(None, arrays(inputs))[0], wanted) < 1e-4
        assert (calls_of(library, "SparseLookup"), calls_of(library, "ProductKeyTopk")) == (before[0] + 3, before[1] + 3)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_check_compares_both_routes_with_torch(rewritten, dtype, library: Path, tmp_path: Path):
    model, inputs = rewritten
    path = tmp_path / "model.onnx"
    memrewrite.export_onnx(model, path, inputs, dtype=dtype)
    checked = check_onnx(path, model, inputs, library=library)
    assert checked.ok, checked
    assert [route.name for route in checked.routes if not route.skipped] == ["standard", "native"]


def test_tables_of_eight_bits_are_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, inputs = tiny.named("modular")
    recipe = tiny.recipe(verify="off", pools={"shared": {"keys": 8, "dtype": "float8_e4m3fn", "gradient": "fused"}})
    recipe["replace"][0]["with"] = "peer"
    memrewrite.apply(model, recipe, inputs)
    memrewrite.export_onnx(model, tmp_path / "model.onnx", inputs)
    stock = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert difference(stock.run(None, arrays(inputs))[0], tiny.values_of(model, inputs)) < 1e-4
