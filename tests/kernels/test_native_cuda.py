"""The CUDA kernels for ONNX Runtime without a GPU: run on the CPU, thread by thread, and read as machine code.

`cuda_on_cpu.h` lets g++ compile them under the sanitizers: every block runs with barriers as CUDA's, in two orders of threads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="onnx, which brings bfloat16 for numpy, is not installed")

from native_models import array, built, check_lookup, check_topk

from memrewrite.passes.onnx import native_library as build_op

GXX = shutil.which("g++")
NVCC = build_op.find_nvcc()
HERE = Path(__file__).parent
KINDS = ("float", "float16", "bfloat16")
LIMITS = {"indices": 256, "keys": 2048}  # what the kernels hold in shared memory at once
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")


@pytest.fixture(scope="session")
def emulator(folder: Path) -> Path:
    if GXX is None:
        pytest.skip("g++ is not there to build the kernels for the CPU")
    return built(folder, "cuda_on_cpu", emulate)


def emulate(program: Path) -> None:
    """The kernels and what drives them as one program, all warnings on."""
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-include", str(HERE / "cuda_on_cpu.h")]
    head = [str(GXX), *flags, *SANITIZED, f"-I{build_op.SOURCES}", "-x", "c++", "-c"]
    files = [HERE / "cuda_on_cpu.cpp", *sorted(build_op.SOURCES.glob("*.cu"))]
    objects = [f"{program}.{path.name}.o" for path in files]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda path, made: subprocess.run([*head, str(path), "-o", made], check=True), files, objects))
    subprocess.run([str(GXX), *SANITIZED, *objects, "-o", str(program)], check=True)


class Cases:
    """What is to be run, as bytes; and what came of it."""

    def __init__(self, emulator: Path, folder: Path) -> None:
        self.emulator, self.folder = emulator, folder
        self.written, self.results = b"", b""

    def add(self, op: int, kind: str, index: str, misplaced: int, sizes: Sequence[int], *arrays: np.ndarray) -> None:
        numbers = [op, KINDS.index(kind), 8 if index == "int64" else 4, misplaced, *sizes]
        self.written += np.array(numbers + [0] * (10 - len(numbers)), np.int64).tobytes()
        self.written += b"".join(x.tobytes() for x in arrays)

    def run(self) -> None:
        (self.folder / "cases").write_bytes(self.written)
        command = [str(self.emulator), str(self.folder / "cases"), str(self.folder / "results")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        self.results = (self.folder / "results").read_bytes()

    def take(self, kind: str, *shape: int) -> np.ndarray:
        dtype = array(0, kind).dtype
        size = int(np.prod(shape)) * dtype.itemsize
        taken, self.results = self.results[:size], self.results[size:]
        return np.frombuffer(taken, dtype).reshape(shape)


@pytest.fixture
def cases(emulator: Path, tmp_path: Path) -> Cases:
    return Cases(emulator, tmp_path)


LOOKUPS = [  # slots, width, tokens, reads, elements off a place that is a multiple of 16 bytes
    (1, 1, 1, 1, 0),
    (9, 8, 3, 0, 0),
    (9, 8, 3, 2, 0),
    (50, 63, 2, 33, 0),
    (50, 64, 2, 33, 0),
    (50, 64, 2, 33, 1),
    (20, 1000, 3, 60, 0),
    (20, 1032, 1, 7, 3),
    (300, 264, 2, LIMITS["indices"], 0),
    (300, 8, 2, 2 * LIMITS["indices"] + 5, 0),
    (40, 128, 260, 2, 0),  # many tokens: wider blocks, and one group where they are widest
    (4, 1024, 513, 1, 0),
]


def test_lookup(cases: Cases) -> None:
    rng = np.random.default_rng(0)
    given = []
    for number, (slots, width, tokens, reads, misplaced) in enumerate(LOOKUPS):
        for kind in KINDS if tokens < 100 else ("float",):
            index = ("int64", "int32")[(number + KINDS.index(kind)) % 2]
            values, weights = (array(rng.standard_normal(shape), kind) for shape in [(slots, width), (tokens, reads)])
            indices = array(rng.integers(0, slots, (tokens, reads)), index)
            cases.add(0, kind, index, misplaced, (slots, width, tokens, reads), values, indices, weights)
            given.append((kind, values, indices, weights))
    cases.run()
    for kind, values, indices, weights in given:
        check_lookup(cases.take(kind, len(indices), values.shape[1]), kind, values, indices, weights)
    assert not cases.results


@pytest.mark.parametrize("index", ["int64", "int32"])
def test_an_index_of_no_row_gives_nan_and_reads_nothing(cases: Cases, index: str) -> None:
    beyond = [-1, 5, np.iinfo(index).min, np.iinfo(index).max]
    for kind in KINDS:
        values, weights = array(np.ones((5, 24)), kind), array(np.ones((6, 3)), kind)
        indices = array(np.full((6, 3), 2), index)
        indices[[0, 2, 3, 5], [0, 1, 2, 0]] = beyond
        cases.add(0, kind, index, 0, (5, 24, 6, 3), values, indices, weights)
        cases.add(0, kind, index, 0, (0, 24, 6, 3), indices, weights)
    cases.run()
    for kind in KINDS:
        y = cases.take(kind, 6, 24).astype(np.float32)
        assert np.isnan(y[[0, 2, 3, 5]]).all()
        np.testing.assert_array_equal(y[[1, 4]], 3)
        assert np.isnan(cases.take(kind, 6, 24).astype(np.float32)).all()


TOPKS = [  # rows, n1, n2, k
    (1, 1, 1, 1),
    (3, 7, 60, 5),
    (2, 63, 33, 33),
    (2, 256, 300, 32),
    (1, LIMITS["keys"] + 1, 3 * LIMITS["keys"], 100),
    (1, 1024, 1100, 1024),
]


@pytest.mark.parametrize("soft", [0, 1])
def test_topk(cases: Cases, soft: int) -> None:
    rng = np.random.default_rng(soft)
    given = []
    for number, (rows, n1, n2, k) in enumerate(TOPKS):
        for kind in KINDS if n1 < 1000 else KINDS[number % 3 :][: 1 - soft]:
            one, two = (array(rng.standard_normal((rows, n)), kind) for n in (n1, n2))
            cases.add(1, kind, "int64", number % 2, (rows, n1, n2, k, soft), one, two)
            given.append((one, two, k))
    cases.run()
    for one, two, k in given:
        check_topk([cases.take("float", len(one), k), cases.take("int64", len(one), k)], one, two, k, bool(soft))
    assert not cases.results


def test_topk_of_ties_infinities_and_nan(cases: Cases) -> None:
    rng = np.random.default_rng(0)
    numbers = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1.0, -1.0, 2.5], np.float32)
    given = []
    for k in (1, 4, 20):
        one, two = rng.choice(numbers, (8, 20)), rng.choice(numbers[int(k < 5) :], (8, 25))
        cases.add(1, "float", "int64", 0, (8, 20, 25, k, 0), one, two)
        given.append((one, two, k))
    cases.run()
    for one, two, k in given:
        check_topk([cases.take("float", 8, k), cases.take("int64", 8, k)], one, two, k, soft=False)


# ------------------------------------------------------------------------------------------------------------- machine code


@pytest.mark.skipif(NVCC is None, reason="nvcc is not there")
@pytest.mark.parametrize("architecture", [80, *(pytest.param(number, marks=pytest.mark.slow) for number in (90, 100))])
def test_machine_code(tmp_path: Path, architecture: int) -> None:
    """No spills, and rows are read by 16 bytes, several before the first is used."""
    assert set(build_op.ARCHITECTURES) == {80, 90, 100}
    head = [str(NVCC), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    for name in ("lookup_cuda", "topk_cuda"):
        made = tmp_path / f"{name}.cubin"
        done = subprocess.run([*head, str(build_op.SOURCES / f"{name}.cu"), "-o", str(made)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert spilled
        assert set(spilled) == {("0", "0")}
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)) <= 64
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not there to read the instructions")
    text = subprocess.check_output([cuobjdump, "-sass", str(tmp_path / "lookup_cuda.cubin")], text=True)
    functions = re.split(r"Function : ", text)[1:]
    wide = [len(re.findall(r"LDG\.E\.\S*128", function)) for function in functions]
    assert len(functions) == 12
    assert sorted(wide)[:6] == [0] * 6  # one column a thread
    assert min(sorted(wide)[6:]) >= 8


def find_cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
