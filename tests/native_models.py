"""Models of one operator, sessions, and numpy references, for the tests of the native operators and for their fuzzing.

Imports nothing of memrewrite, so that it also runs with other versions of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOMAIN = "memrewrite"
NUMBERS = {"float": 1, "float16": 10, "bfloat16": 16, "int32": 6, "int64": 7, "double": 11}
OPSET, IR = 20, 9  # old enough for ONNX Runtime 1.17


def array(x: Any, kind: str) -> np.ndarray:
    """`x` as an array of an ONNX type; bfloat16 is ml_dtypes'."""
    if kind == "bfloat16":
        import ml_dtypes

        return np.asarray(x).astype(ml_dtypes.bfloat16)
    return np.asarray(x).astype("float32" if kind == "float" else kind)


def model(op: str, inputs: dict[str, str], outputs: dict[str, str], functions: Sequence[Any] = (), **attributes: Any) -> Any:
    """A model of one node (inputs and outputs: name → type). An input `name:A,B` has the axes A and B, others have no shape."""
    from onnx import helper

    def value(name: str, kind: str) -> Any:
        name, _, dims = name.partition(":")
        shape = [int(d) if d.isdigit() else d for d in dims.split(",")] if dims else None
        return helper.make_tensor_value_info(name, NUMBERS[kind], shape)

    node = helper.make_node(op, [n.partition(":")[0] for n in inputs], list(outputs), domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one", [value(*i) for i in inputs.items()], [value(*o) for o in outputs.items()])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=IR)


def lookup_model(kind: str = "float", index: str = "int64", functions: Sequence[Any] = ()) -> Any:
    inputs = {"values:N,D": kind, "indices:T,K": index, "weights:T,K": kind}
    return model("SparseLookup", inputs, {"y": kind}, functions)


def topk_model(kind: str = "float", functions: Sequence[Any] = (), **attributes: Any) -> Any:
    inputs = {"scores1": kind, "scores2": kind}
    return model("ProductKeyTopk", inputs, {"scores": "float", "indices": "int64"}, functions, **attributes)


def session(proto: Any, library: Path | str | None, threads: int = 1) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    data = proto if isinstance(proto, bytes) else proto.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(session: Any, feeds: dict[str, np.ndarray], *outputs: tuple[str, Sequence[int]]) -> list[np.ndarray]:
    """Run with every output bound to an array of this type and shape that is filled with NaN (or -1)."""
    binding = session.io_binding()
    for name, x in feeds.items():
        binding.bind_input(name, "cpu", 0, _element(x.dtype), x.shape, x.ctypes.data)
    found = []
    for output, (kind, shape) in zip(session.get_outputs(), outputs, strict=True):
        y = array(np.full(tuple(shape), -1 if kind.startswith("int") else np.nan), kind)
        binding.bind_output(output.name, "cpu", 0, _element(y.dtype), y.shape, y.ctypes.data)
        found.append(y)
    session.run_with_iobinding(binding)
    return found


def _element(dtype: np.dtype) -> Any:
    return NUMBERS["bfloat16"] if dtype.name == "bfloat16" else dtype.type


def lookup_reference(values: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """In float64: [N, D], [T, K], [T, K] -> [T, D]."""
    return np.einsum("tk,tkd->td", weights.astype(np.float64), values.astype(np.float64)[indices])


def ranked(x: np.ndarray) -> np.ndarray:
    """The indices of a row's numbers, best first: NaN is above all others, equal numbers keep their order."""
    return np.lexsort((np.arange(len(x)), np.where(np.isnan(x), 0, -x), ~np.isnan(x)))


def topk_reference(scores1: np.ndarray, scores2: np.ndarray, k: int, soft: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row by row in fp32: only pairs of ranks with i * j <= k (from 1) are considered; of equal sums the first is better."""
    scores1, scores2 = scores1.astype(np.float32), scores2.astype(np.float32)
    rest, n2 = scores1.shape[:-1], scores2.shape[-1]
    pairs = np.array([(i, j) for i in range(k) for j in range(k // (i + 1))])
    best, slots = np.empty((*rest, k), np.float32), np.empty((*rest, k), np.int64)
    for at in np.ndindex(*rest):
        one, two = ranked(scores1[at])[:k], ranked(scores2[at])[:k]
        with np.errstate(invalid="ignore"):  # infinities of two signs
            sums = scores1[at][one[pairs[:, 0]]] + scores2[at][two[pairs[:, 1]]]
        chosen = ranked(sums)[:k]
        best[at] = sums[chosen]
        slots[at] = one[pairs[chosen, 0]] * n2 + two[pairs[chosen, 1]]
    if soft:
        with np.errstate(invalid="ignore"):
            terms = np.exp(best.astype(np.float64) - best[..., :1])
            best = (terms / terms.sum(-1, keepdims=True)).astype(np.float32)
    return best, slots


TOLERANCE = {"float": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}  # of norms: fp32 sums, and one rounding to the type
SUBNORMAL = 6e-8  # step of the subnormal numbers of float16


def near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Whether ‖found − expected‖ <= tolerance · ‖expected‖, in float64."""
    found, expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    return found.shape == expected.shape and bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


def check_lookup(y: np.ndarray, kind: str, values: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> None:
    """Assert that every row of `y` is the lookup, within the tolerance of `kind` relative to the norm of the row.

    Two terms are added to that bound: a sum of terms of both signs has an error relative to the magnitudes of the terms, and
    numbers below the normal ones of a 16-bit type are rounded to a fixed step.
    """
    exact = lookup_reference(values, indices, weights)
    assert y.shape == exact.shape
    terms = lookup_reference(np.abs(values.astype(np.float64)), indices, np.abs(weights.astype(np.float64)))
    error, norm, magnitude = (np.linalg.norm(x, axis=-1) for x in (y.astype(np.float64) - exact, exact, terms))
    wrong = ~(error <= TOLERANCE[kind] * norm + TOLERANCE["float"] * magnitude + SUBNORMAL * y.shape[-1] ** 0.5)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} rows differ"


def check_topk(found: Sequence[np.ndarray], scores1: np.ndarray, scores2: np.ndarray, k: int, soft: bool) -> None:
    """Every slot the same, every score within rounding."""
    best, slots = topk_reference(scores1, scores2, k, soft)
    np.testing.assert_array_equal(found[1], slots)
    np.testing.assert_allclose(found[0], best, rtol=1e-5 if soft else 0, atol=1e-7 if soft else 0)
