"""The CUDA kernels for ONNX Runtime without a GPU: run on the CPU, thread by thread, and checked as machine code.

With `cuda_on_cpu.h`, g++ compiles them with sanitizers. Every block runs with the barriers of CUDA, in two orders of threads.
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

from native_builds import cached
from native_models import array, check_lookup, check_topk

from memrewrite.kernels.native_library import FOLDERS, source_files
from memrewrite.passes.onnx import native_library

GXX = shutil.which("g++")
NVCC = native_library.find_nvcc()
HERE = Path(__file__).parent
KINDS = ("float", "float16", "bfloat16")
ONNXRUNTIME = FOLDERS[1]
CUDA_SOURCES = {"lookup_cuda": 64, "topk_cuda": 128, "topk_large": 64}  # and the most registers of a thread
LIMITS = {"indices": 256, "k": 256, "scores": 65536}  # that fit into shared memory; k of a warp, and scores of 16 bits
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")


@pytest.fixture(scope="session")
def emulator() -> Path:
    if GXX is None:
        pytest.skip("g++ is not installed, which builds the kernels for the CPU")
    files = [HERE / "cuda_on_cpu.cpp", HERE / "cuda_on_cpu.h", *source_files()]
    return cached("cuda_on_cpu", emulate, files=files, compilers=[GXX], flags=[*WARNINGS, *SANITIZED])


def emulate(program: Path) -> None:
    """Compile the kernels and the code that runs them into one program."""
    options = ["-include", str(HERE / "cuda_on_cpu.h"), f"-I{ONNXRUNTIME}", "-x", "c++", "-c"]
    files = [HERE / "cuda_on_cpu.cpp", *sorted(ONNXRUNTIME.glob("*.cu"))]
    objects = [f"{program}.{path.name}.o" for path in files]
    commands = [
        [str(GXX), *WARNINGS, *SANITIZED, *options, str(path), "-o", target]
        for path, target in zip(files, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    subprocess.run([str(GXX), *SANITIZED, *objects, "-o", str(program)], check=True)


class Cases:
    """The cases to run, as bytes, and their results."""

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


LOOKUPS = [  # slots, width, tokens, reads, offset from an address aligned to 16 bytes, in elements
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
    (40, 128, 260, 2, 0),  # many tokens: wider blocks; the widest have one group
    (4, 1024, 513, 1, 0),
]


def test_lookup(cases: Cases) -> None:
    rng = np.random.default_rng(0)
    expected = []
    for number, (slots, width, tokens, reads, misplaced) in enumerate(LOOKUPS):
        for kind in KINDS if tokens < 100 else ("float",):
            index = ("int64", "int32")[(number + KINDS.index(kind)) % 2]
            values, weights = (array(rng.standard_normal(shape), kind) for shape in [(slots, width), (tokens, reads)])
            indices = array(rng.integers(0, slots, (tokens, reads)), index)
            cases.add(0, kind, index, misplaced, (slots, width, tokens, reads), values, indices, weights)
            expected.append((kind, values, indices, weights))
    cases.run()
    for kind, values, indices, weights in expected:
        check_lookup(cases.take(kind, len(indices), values.shape[1]), kind, values, indices, weights)
    assert not cases.results


@pytest.mark.parametrize("index", ["int64", "int32"])
def test_an_index_outside_the_table_gives_nan_and_reads_nothing(cases: Cases, index: str) -> None:
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
    (6, 256, 300, 32),  # more rows than a block has; as many groups of scores as k, and more
    (1, 2049, 6144, 100),
    (1, 2100, 300, LIMITS["k"]),
    (3, 300, 259, LIMITS["k"] + 1),
    (1, 1300, 1500, 1200),
    (1, LIMITS["scores"] + 1, 40, 3),
]


@pytest.mark.parametrize("soft", [0, 1])
def test_topk(cases: Cases, soft: int) -> None:
    rng = np.random.default_rng(soft)
    expected = []
    for number, (rows, n1, n2, k) in enumerate(TOPKS):
        for kind in KINDS if n1 < 280 else KINDS[number % 3 :][: n1 < 1000 or not soft]:
            one, two = (array(rng.standard_normal((rows, n)), kind) for n in (n1, n2))
            cases.add(1, kind, "int64", number % 2, (rows, n1, n2, k, soft), one, two)
            expected.append((one, two, k))
    cases.run()
    for one, two, k in expected:
        check_topk([cases.take("float", len(one), k), cases.take("int64", len(one), k)], one, two, k, bool(soft))
    assert not cases.results


def test_topk_of_ties_infinities_and_nan(cases: Cases) -> None:
    rng = np.random.default_rng(0)
    numbers = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1.0, -1.0, 2.5], np.float32)
    expected = []
    for k in (1, 4, 20):
        one, two = rng.choice(numbers, (8, 20)), rng.choice(numbers[int(k < 5) :], (8, 25))
        cases.add(1, "float", "int64", 0, (8, 20, 25, k, 0), one, two)
        expected.append((one, two, k))
    cases.run()
    for one, two, k in expected:
        check_topk([cases.take("float", 8, k), cases.take("int64", 8, k)], one, two, k, soft=False)


# ------------------------------------------------------------------------------------------------------------- machine code


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", [80, *(pytest.param(number, marks=pytest.mark.slow) for number in (90, 100))])
def test_machine_code(architecture: int) -> None:
    """No register spills; rows are read 16 bytes at a time, several reads before the first use."""
    assert set(native_library.ARCHITECTURES) == {80, 90, 100}
    flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    compilers = [str(NVCC), native_library.find_compiler()]
    files = [*source_files()]
    compiled = cached("machine_code", lambda path: compile_cubins(path, flags), files=files, compilers=compilers, flags=flags)
    for name, most in CUDA_SOURCES.items():
        log = (compiled / f"{name}.log").read_text()
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spilled
        assert set(spilled) == {("0", "0")}
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", log)) <= most
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed, which prints the instructions")
    text = subprocess.check_output([cuobjdump, "-sass", str(compiled / "lookup_cuda.cubin")], text=True)
    functions = re.split(r"Function : ", text)[1:]
    wide = [len(re.findall(r"LDG\.E\.\S*128", function)) for function in functions]
    assert len(functions) == 12
    assert sorted(wide)[:6] == [0] * 6  # one column a thread
    assert min(sorted(wide)[6:]) >= 8


def compile_cubins(folder: Path, flags: Sequence[str]) -> None:
    """Compile every CUDA source to a `.cubin` in `folder`, with a `.log` of the registers and spills that ptxas reports."""
    folder.mkdir()
    for name in CUDA_SOURCES:
        command = [str(NVCC), *flags, str(ONNXRUNTIME / f"{name}.cu"), "-o", str(folder / f"{name}.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.log").write_text(done.stderr)


def find_cuobjdump() -> str | None:
    """The path of Triton's cuobjdump, or else of CUDA's."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
