"""Runs the native operators on random inputs, attributes and files: the result must be that of numpy, or an error.

`python native_fuzz.py LIBRARY CASES SEED`, under AddressSanitizer. Inputs are arrays of numpy, which are read in place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from native_models import array, check_lookup, check_topk, lookup_model, model, run, session, topk_model

LIBRARY, CASES, SEED = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
KINDS = ("float", "float16", "bfloat16")
BEYOND = (-1, -(2**31), 2**31 - 1, 2**40, -(2**63), 2**63 - 1)

rng = np.random.default_rng(SEED)
lookup_session = functools.cache(lambda kind, index: session(lookup_model(kind, index), LIBRARY, threads=2))
topk_session = functools.cache(lambda kind, k, soft: session(topk_model(kind, k=k, softmax=soft), LIBRARY, threads=2))


def refused(call: Callable[[], Any]) -> str:
    """The error that a call raises, with its type."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (any type is accepted; the process must not crash)
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")


def size(most: int) -> int:
    return int(rng.choice([0, 1, 2, 3, 7, 8, 16, 31, 33, 64, 100, 128, 129, 160, 257, 1000])) % (most + 1)


def scores(kind: str, *shape: int) -> np.ndarray:
    """Normal scores, or scores with many that are equal, infinite or NaN."""
    x = rng.standard_normal(shape)
    chance = rng.random()
    if chance < 0.3:
        x = np.round(x)
    if chance < 0.15:
        x = np.where(rng.random(shape) < 0.2, rng.choice([np.nan, -np.inf, 0.0, -0.0], shape), x)
    return array(x, kind)


def lookup_arrays(kind: str, index: str) -> list[np.ndarray]:
    slots, width, tokens, reads = 1 + size(1000), size(300), size(9), size(160)
    indices = array(rng.integers(0, slots, (tokens, reads)), index)
    return [array(rng.standard_normal((slots, width)), kind), indices, array(rng.standard_normal((tokens, reads)), kind)]


def good_lookup() -> None:
    kind, index = rng.choice(KINDS), rng.choice(["int64", "int32"])
    values, indices, weights = lookup_arrays(kind, index)
    feeds = {"values": values, "indices": indices, "weights": weights}
    (y,) = run(lookup_session(kind, index), feeds, (kind, (indices.shape[0], values.shape[1])))
    check_lookup(y, kind, values, indices, weights)


def bad_index() -> None:
    index = str(rng.choice(["int64", "int32"]))
    values, indices, weights = lookup_arrays("float", index)
    if indices.size == 0:
        return
    beyond = [values.shape[0], *(b for b in BEYOND if np.iinfo(index).min <= b <= np.iinfo(index).max)]
    indices.reshape(-1)[rng.integers(indices.size)] = int(rng.choice(np.array(beyond, dtype=np.int64)))
    feeds = {"values": values, "indices": indices, "weights": weights}
    message = refused(lambda: lookup_session("float", index).run(None, feeds))
    assert "SparseLookup: index" in message, message
    assert "is out of range for a table of" in message, message


@functools.cache
def shapeless(op: str) -> Any:
    if op == "SparseLookup":
        return session(model(op, {"a": "float", "b": "int64", "c": "float"}, {"y": "float"}), LIBRARY)
    return session(model(op, {"a": "float", "b": "float"}, {"s": "float", "i": "int64"}, k=3), LIBRARY)


def bad_shapes() -> None:
    """Any ranks and lengths; shapes that are valid by chance must run."""
    op = str(rng.choice(["SparseLookup", "ProductKeyTopk"]))
    shapes = [tuple(int(n) for n in rng.integers(0, 5, rng.integers(0, 4))) for _ in range(3)]
    a, b, c = (array(rng.standard_normal(shape), "float") for shape in shapes)
    if op == "ProductKeyTopk":
        valid = bool(a.ndim and b.ndim and a.shape[:-1] == b.shape[:-1] and min(a.shape[-1], b.shape[-1]) >= 3)
        feeds = {"a": a, "b": b}
    else:
        valid = a.ndim == 2 and b.ndim == 2 and b.shape == c.shape and (b.size == 0 or a.shape[0] > 0)
        feeds = {"a": a, "b": np.zeros(b.shape, np.int64), "c": c}
    if valid:
        shapeless(op).run(None, feeds)
    else:
        message = refused(lambda: shapeless(op).run(None, feeds))
        assert f"{op}: " in message, message


def good_topk() -> None:
    kind, k, soft = rng.choice(KINDS), int(rng.choice([1, 2, 3, 8, 33])), int(rng.integers(2))
    rest = [(), (3,), (2, 2), (0,), (2, 0)][rng.integers(5)]
    one, two = scores(kind, *rest, k + size(600)), scores(kind, *rest, k + size(600))
    feeds = {"scores1": one, "scores2": two}
    found = run(topk_session(kind, k, soft), feeds, ("float", (*rest, k)), ("int64", (*rest, k)))
    check_topk(found, one, two, k, bool(soft))


def bad_attributes() -> None:
    wrong = [{}, {"k": 0}, {"k": -1}, {"k": -(2**63)}, {"k": 1.5}, {"k": "4"}, {"k": [4]}]
    late = [{"k": 2**63 - 1}, {"k": 2**31}, {"k": 6}]  # refused only when the scores are known
    feeds = {name: array(rng.standard_normal((2, 5)), "float") for name in ("scores1", "scores2")}
    choice = int(rng.integers(len(wrong) + len(late)))
    proto = topk_model("float", **[*wrong, *late][choice])
    message = refused(lambda: session(proto, LIBRARY).run(None, feeds))
    assert "ProductKeyTopk: " in message, message


def small_files() -> list[tuple[bytes, dict[str, np.ndarray]]]:
    values, weights = array(rng.standard_normal((6, 8)), "float"), array(rng.random((3, 4)), "float")
    lookup = {"values": values, "indices": rng.integers(0, 6, (3, 4)), "weights": weights}
    topk = {name: array(rng.standard_normal((2, 5)), "float") for name in ("scores1", "scores2")}
    return [(lookup_model().SerializeToString(), lookup), (topk_model(k=3).SerializeToString(), topk)]


def attempt(proto: Any, feeds: dict[str, np.ndarray]) -> None:
    with contextlib.suppress(Exception):  # any error is accepted; the process must not crash
        session(proto, LIBRARY).run(None, feeds)


def edited_bytes() -> None:
    data, feeds = small_files()[rng.integers(2)]
    changed = bytearray(data[: int(rng.integers(1, len(data)))] if rng.random() < 0.4 else data)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    attempt(bytes(changed), feeds)


def edited_nodes() -> None:
    """Inputs and outputs that are missing, empty, duplicated or of other types."""
    import onnx

    data, feeds = small_files()[rng.integers(2)]
    proto = onnx.load_model_from_string(data)
    node, graph = proto.graph.node[0], proto.graph
    names = node.input if rng.random() < 0.5 else node.output
    edit, position = int(rng.integers(5)), int(rng.integers(len(names)))
    if edit == 0:
        del names[position]
    elif edit == 1:
        names[position] = ""
    elif edit == 2:
        names.append(names[position] if names is node.input else "more")
    elif edit == 3:
        graph.input[rng.integers(len(graph.input))].type.tensor_type.elem_type = int(rng.integers(17))
    else:
        graph.input[rng.integers(len(graph.input))].type.tensor_type.ClearField("shape")
        node.op_type = str(rng.choice(["SparseLookup", "ProductKeyTopk"]))
    kept = {i.name for i in graph.input}
    attempt(proto, {name: x for name, x in feeds.items() if name in kept})


ALL = (good_lookup, good_lookup, bad_index, bad_shapes, good_topk, good_topk, bad_attributes, edited_bytes, edited_nodes)


def main() -> None:
    done: Counter[str] = Counter()
    for number in range(CASES):
        case = ALL[number % len(ALL)]
        try:
            case()
        except BaseException:
            print(f"case {number} of seed {SEED}: {case.__name__}", file=sys.stderr)
            raise
        done[case.__name__] += 1
    print(dict(done))


if __name__ == "__main__":
    main()
