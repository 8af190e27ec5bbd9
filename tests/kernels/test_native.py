"""The native operators: compared with numpy and with their functions, in every type; their errors; the build."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

import native_builds
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import array, check_lookup, check_topk, lookup_model, model, near, run, session, topk_model

from memrewrite.errors import MemrewriteError, UserError
from memrewrite.kernels import native_library as kernels_library
from memrewrite.kernels import onnx_functions
from memrewrite.kernels.native_library import built_library
from memrewrite.passes.onnx import native_library

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed, which builds the library")

HERE = Path(__file__).parent
KINDS = ("float", "float16", "bfloat16")
INDICES = ("int64", "int32")
CPU, CUDA = b"CPUExecutionProvider", b"CUDAExecutionProvider"


@pytest.fixture(scope="session")
def calls(library: Path) -> Callable[[str], int]:
    counter = ctypes.CDLL(str(library)).memrewrite_calls
    counter.restype, counter.argtypes = ctypes.c_int64, [ctypes.c_char_p, ctypes.c_char_p]
    return lambda op, provider=CPU: int(counter(op.encode(), provider))


def lookup_feeds(kind: str, index: str, slots: int, width: int, tokens: int, reads: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(slots + 10 * width + 100 * tokens + 1000 * reads)
    values, weights = rng.standard_normal((slots, width)), rng.standard_normal((tokens, reads))
    indices = array(rng.integers(0, slots, (tokens, reads)), index)
    return {"values": array(values, kind), "indices": indices, "weights": array(weights, kind)}


def topk_feeds(kind: str, rest: tuple[int, ...], n1: int, n2: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n1 + 1000 * n2 + len(rest))
    return {"scores1": array(rng.standard_normal((*rest, n1)), kind), "scores2": array(rng.standard_normal((*rest, n2)), kind)}


def run_topk(session: Any, feeds: dict[str, np.ndarray], k: int) -> list[np.ndarray]:
    shape = (*feeds["scores1"].shape[:-1], k)
    return run(session, feeds, ("float", shape), ("int64", shape))


# ------------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_is_the_weighted_sum(library: Path, kind: str, index: str) -> None:
    loaded = session(lookup_model(kind, index), library, threads=2)
    for width in (1, 60, 63, 128, 1000):
        for tokens, reads in [(0, 33), (1, 33), (7, 0), (7, 1), (7, 33), (1, 300)]:
            feeds = lookup_feeds(kind, index, 97, width, tokens, reads)
            (y,) = run(loaded, feeds, (kind, (tokens, width)))
            check_lookup(y, kind, *feeds.values())


@pytest.mark.parametrize("soft", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_the_best_sums(library: Path, kind: str, soft: int) -> None:
    for k in (1, 3, 32, 63, 200):
        loaded = session(topk_model(kind, k=k, softmax=soft), library, threads=2)
        for rest, n1, n2 in [((), k, k), ((2, 3), k, 1000), ((5,), 600, k + 1), ((0, 2), k, k)]:
            feeds = topk_feeds(kind, rest, n1, n2)
            check_topk(run_topk(loaded, feeds, k), *feeds.values(), k, bool(soft))


def test_every_16_bit_number_is_read_and_rounded(library: Path) -> None:
    """All values with a weight of 1, also subnormals, infinities and NaN; and sums that are between two values."""
    for kind in ("float16", "bfloat16"):
        loaded = session(lookup_model(kind), library)
        dtype = array(0, kind).dtype
        every = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, -1)
        feeds = {"values": every, "indices": np.zeros((1, 1), np.int64), "weights": array([[1]], kind)}
        np.testing.assert_array_equal(run(loaded, feeds, (kind, every.shape))[0].astype("float32"), every.astype("float32"))
        finite = np.where(np.isfinite(every.astype("float32")), every, array(0, kind)).astype(dtype)
        halves = np.concatenate([finite, np.roll(finite, 1)])
        feeds = {"values": halves, "indices": np.array([[0, 1]]), "weights": array([[0.5, 0.25]], kind)}
        wide = halves.astype("float32")
        with np.errstate(over="ignore"):
            expected = (wide[0] * np.float32(0.5) + wide[1] * np.float32(0.25)).astype(dtype)
        found = run(loaded, feeds, (kind, every.shape))[0][0]
        np.testing.assert_array_equal(found.astype("float32"), expected.astype("float32"))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(0, 5), st.integers(0, 40)),
    st.sampled_from(KINDS),
    st.sampled_from(INDICES),
)
def test_lookup_of_any_shape(library: Path, sizes: tuple[int, int, int, int], kind: str, index: str) -> None:
    _, width, tokens, _ = sizes
    feeds = lookup_feeds(kind, index, *sizes)
    (y,) = run(session(lookup_model(kind, index), library), feeds, (kind, (tokens, width)))
    check_lookup(y, kind, *feeds.values())


SCORE = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1.0, -1.0, 2.5, 3e38])


@settings(max_examples=100, deadline=None)
@given(st.lists(SCORE, min_size=1, max_size=40), st.lists(SCORE, min_size=1, max_size=40), st.integers(1, 40), st.booleans())
def test_topk_of_ties_infinities_and_nan(library: Path, one: list[float], two: list[float], k: int, soft: bool) -> None:
    """NaN is above all other scores; of equal scores the first is better; the order of the others does not change."""
    k = min(k, len(one), len(two))
    feeds = {"scores1": np.array([one], np.float32), "scores2": np.array([two], np.float32)}
    loaded = session(topk_model(k=k, softmax=int(soft)), library)
    with np.errstate(over="ignore"):
        check_topk(run_topk(loaded, feeds, k), *feeds.values(), k, soft)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_kernel_and_function_compute_the_same(library: Path, calls: Callable[[str], int], kind: str) -> None:
    """One file with and without the library; the counter shows that the native kernel ran."""
    functions = onnx_functions.functions(20)
    feeds = lookup_feeds(kind, "int64", 50, 63, 7, 33)
    proto = lookup_model(kind, functions=functions)
    before = calls("SparseLookup")
    (native,), (plain,) = (session(proto, where).run(None, feeds) for where in (library, None))
    assert calls("SparseLookup") == before + 1
    assert near(native, plain, 1e-6 if kind == "float" else 1e-3)

    scores = topk_feeds(kind, (2, 3), 60, 70)
    for soft in (0, 1):
        proto = topk_model(kind, functions=functions, k=9, softmax=soft)
        before = calls("ProductKeyTopk")
        native, plain = (session(proto, where).run(None, scores) for where in (library, None))
        assert calls("ProductKeyTopk") == before + 1
        assert near(native[0], plain[0], 1e-6)
        np.testing.assert_array_equal(native[1], plain[1])


def test_a_large_table_that_is_an_initializer(library: Path) -> None:
    """The kernel receives it before the first run, and requests huge pages for it."""
    feeds = lookup_feeds("float", "int64", 6_000, 1_001, 9, 33)
    table, proto = feeds.pop("values"), lookup_model()
    proto.graph.initializer.append(numpy_helper.from_array(table, "values"))
    del proto.graph.input[0]
    for _ in range(2):
        (y,) = run(session(proto, library), feeds, ("float", (9, 1_001)))
        check_lookup(y, "float", values=table, **feeds)


def test_results_do_not_depend_on_the_number_of_threads(library: Path) -> None:
    feeds, scores = lookup_feeds("float", "int64", 3000, 1000, 64, 128), topk_feeds("float", (4, 64), 256, 256)
    lookups = [session(lookup_model(), library, threads=n).run(None, feeds) for n in (1, 2)]
    topks = [session(topk_model(k=32), library, threads=n).run(None, scores) for n in (1, 2)]
    for one, two in [*zip(*lookups, strict=True), *zip(*topks, strict=True)]:
        np.testing.assert_array_equal(one, two)


def test_sessions_run_in_parallel(library: Path, calls: Callable[[str], int]) -> None:
    feeds, scores = lookup_feeds("float", "int64", 500, 130, 20, 30), topk_feeds("float", (3,), 99, 98)
    lookups, topks = session(lookup_model(), library, threads=2), session(topk_model(k=7), library, threads=2)
    before = calls("SparseLookup"), calls("ProductKeyTopk")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(s.run, None, f) for _ in range(50) for s, f in [(lookups, feeds), (topks, scores)]]
        results = [job.result() for job in jobs]
    assert (calls("SparseLookup"), calls("ProductKeyTopk")) == (before[0] + 50, before[1] + 50)
    for y, best in zip(results[::2], results[1::2], strict=True):
        check_lookup(y[0], "float", *feeds.values())
        check_topk(best, *scores.values(), 7, False)


def test_shapes_are_known_before_a_run(library: Path) -> None:
    """Unknown lengths are represented by their names; without a name the shape is unknown."""
    (y,) = session(lookup_model("float16"), library).get_outputs()
    assert (y.shape, y.type) == (["T", "D"], "tensor(float16)")
    inputs = {"a:batch,heads,9": "float", "b:batch,heads,7": "float"}
    loaded = session(model("ProductKeyTopk", inputs, {"s": "float", "i": "int64"}, k=4), library)
    assert [o.shape for o in loaded.get_outputs()] == [["batch", "heads", 4]] * 2
    unnamed = session(topk_model(k=4), library).get_outputs()
    assert [o.type for o in unnamed] == ["tensor(float)", "tensor(int64)"]


# ------------------------------------------------------------------------------------------------------------------ errors


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def integers(*shape: int, at: int = 0) -> np.ndarray:
    return np.full(shape, at, np.int64)


LOOKUPS_REFUSED = [
    (floats(4), integers(2, 3), floats(2, 3), r"values must be \[N, D\], not \[4\]"),
    (floats(4, 5), integers(2, 3, 1), floats(2, 3, 1), r"indices must be \[T, K\], not \[2, 3, 1\]"),
    (floats(4, 5), integers(2, 3), floats(2, 4), r"weights must be \[T, K\] as indices \[2, 3\], not \[2, 4\]"),
    (floats(4, 5), integers(2, 3, at=4), floats(2, 3), r"index 4 at \[0, 0\] of indices is out of range for a table of 4 rows"),
    (floats(4, 5), integers(2, 3, at=-1), floats(2, 3), r"index -1 at \[0, 0\]"),
    (floats(4, 5), integers(2, 3, at=2**63 - 1), floats(2, 3), r"index 9223372036854775807"),
    (floats(0, 5), integers(2, 3), floats(2, 3), r"out of range for a table of 0 rows"),
]


@pytest.mark.parametrize(("values", "indices", "weights", "message"), LOOKUPS_REFUSED)
def test_a_lookup_is_refused(library: Path, values: np.ndarray, indices: np.ndarray, weights: np.ndarray, message: str) -> None:
    loaded = session(model("SparseLookup", {"a": "float", "b": "int64", "c": "float"}, {"y": "float"}), library)
    with pytest.raises(Exception, match=rf"INVALID_ARGUMENT.*SparseLookup: .*{message}"):
        loaded.run(None, {"a": values, "b": indices, "c": weights})


TOPKS_REFUSED = [
    ({"k": 3}, floats(2, 4), floats(3, 4), r"scores1 is \[2, 4\], scores2 is \[3, 4\]: all axes but the last must agree"),
    ({"k": 5}, floats(2, 4), floats(2, 9), r"k is 5, more than a half has"),
    ({"k": 2**62}, floats(2, 4), floats(2, 9), r"more than a half has"),
    ({"k": 1}, floats(), floats(), r"not single numbers"),
    ({}, floats(2, 4), floats(2, 4), r"attribute k, a number, is required"),
    ({"k": 0}, floats(2, 4), floats(2, 4), r"k must be 1 or more, not 0"),
    ({"k": -7}, floats(2, 4), floats(2, 4), r"k must be 1 or more, not -7"),
]


@pytest.mark.parametrize(("attributes", "one", "two", "message"), TOPKS_REFUSED)
def test_a_topk_is_refused(library: Path, attributes: dict[str, int], one: np.ndarray, two: np.ndarray, message: str) -> None:
    with pytest.raises(Exception, match=rf"ProductKeyTopk: .*{message}"):
        session(topk_model(**attributes), library).run(None, {"scores1": one, "scores2": two})


def test_fuzzed_under_sanitizers() -> None:
    fuzzed(cases=450, seed=int(os.environ.get("FUZZ_SEED", "0")))


@pytest.mark.slow
def test_fuzzed_for_long() -> None:
    fuzzed(cases=30_000, seed=1)


def fuzzed(cases: int, seed: int) -> None:
    """Run the fuzzer in its own process. libstdc++ is preloaded too: the sanitizer intercepts the throwing of exceptions."""
    sanitized = native_builds.native(sanitize=True)
    names = [
        subprocess.check_output([str(GXX), f"-print-file-name={n}"], text=True).strip() for n in ("libasan.so", "libstdc++.so")
    ]
    environment = {**os.environ, "LD_PRELOAD": " ".join(names), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "native_fuzz.py"), str(sanitized), str(cases), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------- the build


SYSTEM = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*)\.so"


def test_the_library_depends_only_on_system_libraries(library: Path) -> None:
    assert not foreign(library)
    assert ctypes.CDLL(str(library)).memrewrite_has_cuda() == 0


@pytest.mark.slow
@pytest.mark.skipif(native_library.find_nvcc() is None, reason="nvcc is not installed")
def test_a_library_with_cuda_loads_without_a_gpu() -> None:
    """Kernels of both providers are registered; those of the CPU run."""
    both = native_builds.native(cuda=True)
    assert not foreign(both)
    assert ctypes.CDLL(str(both)).memrewrite_has_cuda() == 1
    for kind in KINDS:
        feeds = lookup_feeds(kind, "int64", 9, 20, 2, 3)
        check_lookup(run(session(lookup_model(kind), both), feeds, (kind, (2, 20)))[0], kind, *feeds.values())


def foreign(library: Path) -> list[str]:
    """The shared libraries that it needs, except the system's: it must load without CUDA and with any ONNX Runtime."""
    needed = re.findall(r"NEEDED.*\[(.*?)\]", subprocess.check_output(["readelf", "-d", str(library)], text=True))
    assert needed
    return [name for name in needed if not re.match(SYSTEM, name)]


def test_counters_of_unknown_kernels(calls: Callable[..., int]) -> None:
    assert calls("SparseLookup", CUDA) == 0
    assert calls("Gather") == calls("SparseLookup", b"QNN") == -1


def test_the_default_path_depends_on_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text("int one;")
    monkeypatch.setattr(kernels_library, "FOLDERS", (sources,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert built_library() is None
    steps: list[str] = []
    plain = native_library.build_op(cuda=False, step=steps.append)
    assert plain == built_library() == native_library.default_library(cuda=False)
    assert plain.parent == tmp_path / "memrewrite"
    assert steps == ["compiling 1 file for the CPU"]
    (sources / "one.cpp").write_text("int wrong")
    assert built_library() is None
    with pytest.raises(MemrewriteError, match=r"could not compile the operators:\n.*one\.cpp"):
        native_library.build_op(cuda=False)
    assert [path.name for path in plain.parent.iterdir()] == [plain.name]


def test_tests_build_again_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text("int one;")
    monkeypatch.setattr(kernels_library, "FOLDERS", (sources,))
    monkeypatch.setattr(native_builds, "CACHE", tmp_path / "cache")
    built, compile_op = list[Path](), native_library.build_op
    monkeypatch.setattr(native_library, "build_op", lambda path, **options: built.append(compile_op(path, **options)))

    first = native_builds.native()
    assert native_builds.native() == first
    assert len(built) == 1
    (sources / "one.cpp").write_text("int one, two;")
    second = native_builds.native()
    (sources / "three.h").write_text("")
    third = native_builds.native()
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {GXX} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    fourth = native_builds.native()
    assert len({first, second, third, fourth}) == len(built) == 4

    (sources / "one.cpp").write_text("int wrong")
    for _ in range(2):  # a failed build leaves nothing that a later one would use
        with pytest.raises(MemrewriteError, match="could not compile"):
            native_builds.native()
    names = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert names == {path.name for path in (first, second, third, fourth)}


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_library, "NVCC_PLACES", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler was found(.|\n)*install g\+\+"):
        native_library.build_op(tmp_path / "x.so")
    with pytest.raises(UserError, match="nvcc was found neither on PATH nor in"):
        native_library.build_op(tmp_path / "x.so", cuda=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="'no-such-compiler' of \\$CXX was not found"):
        native_library.build_op(tmp_path / "x.so")


OTHER_RUNTIME = """
import sys; sys.path[:0] = sys.argv[1:3]
import numpy as np, onnxruntime
from native_models import check_lookup, check_topk
print(onnxruntime.__version__)
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[3])
start = lambda name: onnxruntime.InferenceSession(sys.argv[4] + name, options, providers=["CPUExecutionProvider"])
rng = np.random.default_rng(0)
feeds = {"values": rng.standard_normal((50, 100), dtype="f"), "indices": rng.integers(0, 50, (7, 9)),
         "weights": rng.standard_normal((7, 9), dtype="f")}
check_lookup(start("/lookup.onnx").run(None, feeds)[0], "float", *feeds.values())
scores = {"scores1": rng.standard_normal((2, 60), dtype="f"), "scores2": rng.standard_normal((2, 70), dtype="f")}
topk = start("/topk.onnx")
assert [o.shape for o in topk.get_outputs()] == [["rows", 9]] * 2
check_topk(topk.run(None, scores), *scores.values(), 9, True)
try:
    start("/lookup.onnx").run(None, {**feeds, "indices": feeds["indices"] - 50})
except Exception as error:
    print("refused" if "SparseLookup: index" in str(error) else error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.16.3", "1.17.3", "1.20.1", "1.24.4"])
def test_another_runtime_loads_it(library: Path, tmp_path: Path, version: str) -> None:
    """The oldest supported version, some newer ones, and one that is too old, which reports that."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, f"onnxruntime=={version}", "numpy<2"], check=True)
    (tmp_path / "lookup.onnx").write_bytes(lookup_model().SerializeToString())
    inputs = {"scores1:rows,60": "float", "scores2:rows,70": "float"}
    topk = model("ProductKeyTopk", inputs, {"s": "float", "i": "int64"}, k=9, softmax=1)
    (tmp_path / "topk.onnx").write_bytes(topk.SerializeToString())
    command = [sys.executable, "-c", OTHER_RUNTIME, str(tmp_path / "site"), str(HERE.parent), str(library), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if version < "1.17":
        assert "memrewrite needs ONNX Runtime 1.17 or newer" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [version, "refused"]
