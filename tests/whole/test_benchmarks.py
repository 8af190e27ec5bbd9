"""The parts of the GPU benchmark: wrong kernels are found, results are right, baselines compute the same as ours."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_norm_close, most_reads

from memrewrite.kernels import reference, torch_backend

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
LOOKUP = "forward, decode, backward"
interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
]


# -------------------------------------------------------------------------------------------------------- wrong kernels


def off(function: Any, by: float = 0.01) -> Any:
    """`function` with its (first) result a little too large."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if isinstance(out, tuple):
            return (None if out[0] is None else out[0] * (1 + by), *out[1:])
        return out * (1 + by)

    return wrong


def unwritten(function: Any) -> Any:
    """`function` that does not write its last row."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        found = torch.empty_like(out)
        found[:-1] = out[:-1]
        return found

    return wrong


def biased(function: Any) -> Any:
    """An update that rounds to nearest, so that small steps are lost."""

    def wrong(values: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        wide = values.float()
        function(wide, *args, **kwargs)
        values.copy_(wide)

    return wrong


def unsteady(function: Any) -> Any:
    """`function` whose bits differ between calls, within the tolerance."""
    calls = iter(range(10**6))

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out * (1 + next(calls) * 1e-6)

    return wrong


def greedy(function: Any) -> Any:
    """An update that also changes rows that were not read."""

    def wrong(values: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        before = values.clone()
        function(values, *args, **kwargs)
        values[(values.float() == before.float()).all(-1)] = 0

    return wrong


@pytest.mark.parametrize(
    ("name", "fault", "said", "depends"),
    [
        ("forward", off, "forward: relative error", LOOKUP),
        ("forward", unwritten, "forward: relative error nan", LOOKUP),
        ("forward", unsteady, "not the same bits", LOOKUP),
        ("backward", off, "gradient of values", LOOKUP),
        ("rows", lambda f: lambda *a: (f(*a)[0], f(*a)[1] * 1.01), "row gradients", LOOKUP),
        ("adagrad_", biased, "the mean step is", "update"),
        ("adagrad_", greedy, "rows that were not read: not the same bits", "update"),
        ("topk", off, "scores: not the same bits", "topk"),
        ("topk_backward", off, "gradient of the first half", "topk"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_found_and_marks_what_depends_on_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, fault: Any, said: str, depends: str
) -> None:
    monkeypatch.setattr(torch_backend, name, fault(getattr(torch_backend, name)))
    sections, report, record = bench("sections"), bench("report"), bench("record").Record(tmp_path)
    (correctness,) = sections.chosen("correctness")
    bench("section_process").measure(correctness, record, bench("harness").Bench(rehearse=True, triton=False))
    contents = record.read()
    wrong = {of: case.why for of, case in contents.cases["correctness"].items() if case.state == "failed"}
    assert any(why.startswith("WRONG: ") and said in why for why in wrong.values()), wrong
    assert len(wrong) < len(contents.cases["correctness"])
    marked = {section.name for section in sections.SECTIONS if report.mark(contents, section).startswith("WRONG kernel: times")}
    whole = {"correctness", "training step", "memory size", "layer", "compile"}
    assert marked >= {*whole, *depends.split(", ")}  # a check of large tables is one of lookup and updates
    assert ("topk" in marked) == (depends == "topk")
    assert depends != "topk" or not marked & {"forward", "decode", "backward", "update"}
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_correctness_case_belongs_to_a_kernel_that_a_section_times(bench: Any) -> None:
    known = tuple(prefix for section in bench("sections").SECTIONS for prefix in section.checks)
    sizes = bench("harness").Sizes
    for b in (SimpleNamespace(rehearse=True, sizes=sizes.rehearsal()), SimpleNamespace(rehearse=False, sizes=sizes())):
        b.kernels = SimpleNamespace(NAME="triton")
        names = [case.name for case in bench("correctness").cases(b)]
        assert names
        assert [name for name in names if not name.startswith(known)] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_the_measured_layer_is_memory_plus_bit_for_bit(bench: Any, dtype: str) -> None:
    from memrewrite.fused import fuse
    from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
    from memrewrite.layers.pool import Pool, PoolSpec

    b = bench("harness").Bench(rehearse=True, triton=False)
    gradient = "fused" if "8" in dtype else "dense"
    measured = bench("models").memory_layer(b, 20, 8, gradient=gradient, dtype=dtype)
    pool = Pool(PoolSpec(keys=8, value_dim=20, gradient=gradient, dtype=dtype))
    options = MemoryPlusOptions(heads=b.sizes.heads, topk=b.sizes.topk)
    layer = MemoryPlus(20, 20, options, pool, dtype=torch.bfloat16)
    given = measured.state_dict()
    pool.load_state_dict({name[5:]: x for name, x in given.items() if name.startswith("pool.")})
    layer.load_state_dict({name: x for name, x in given.items() if not name.startswith("pool.")})
    x = torch.randn(7, 20, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    outs, grads = [], []
    for module, whole in ((measured, measured), (layer, torch.nn.ModuleList([layer, pool]))):
        optimizer = torch.optim.AdamW(whole.parameters())
        if gradient == "fused":
            fuse(optimizer, whole)  # it takes the table's gradient
        leaf = x.clone().requires_grad_()
        outs.append(module(leaf))
        outs[-1].float().square().sum().backward()
        grads.append([leaf.grad, *(p.grad for name, p in sorted(module.named_parameters()) if not name.startswith("pool."))])
    assert outs[0].norm() > 0
    assert torch.equal(*outs)
    assert len(grads[0]) == len(grads[1]) == 10  # of x, keys, two norms, and weight and bias of query, gate and output
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


# ------------------------------------------------------------------------------------------------------------- results


def test_floor_ratios_and_targets(bench: Any) -> None:
    harness = bench("harness")
    b = harness.Bench(rehearse=True, triton=False)
    b.rehearse, b.copy = False, 1e12
    times = {name: harness.Timing(ms, ms, 3) for name, ms in (("ours", 2.0), ("bag", 5.0), ("triton", 1.0))}
    times["fbgemm"] = "not installed"
    wanted = [harness.Target(of, least) for of, least in (("floor", 0.85), ("bag", 2), ("triton", 1), ("fbgemm", 1))]
    line = b.result("s", "c", times, moved=1_800_000_000, targets=wanted)
    assert (line.ms, line.gbps, line.of_floor) == (2.0, 900.0, 0.9)
    assert line.ratios == {"bag": 2.5, "triton": 0.5}
    assert line.rivals["fbgemm"] == "not installed"
    assert [met for _, met in line.targets] == [True, True, False, None]
    table = bench("report").table([line])
    for cell in ("90%", "bag 2.50×", "fbgemm: not installed", "≥ 85% of floor", "yes", "NO"):
        assert cell in table


def test_ours_must_run_and_a_baseline_may_fail(bench: Any) -> None:
    harness = bench("harness")
    b = harness.Bench(rehearse=True, triton=False)

    def fail() -> None:
        raise ValueError("too wide")

    times = b.race({"ours": lambda: None, "other": fail})
    assert isinstance(times["ours"], harness.Timing)
    assert times["other"] == "ValueError: too wide"
    with pytest.raises(ValueError, match="too wide"):
        b.race({"ours": fail})


def test_inputs_match_their_description(bench: Any) -> None:
    data, cpu = bench("data"), torch.device("cpu")
    zipf = data.slots_read("zipf", 100, 20, 1000, cpu)
    assert 0 <= int(zipf.min()) <= int(zipf.max()) < 1000
    assert zipf.flatten().bincount().max() > 10 * 2000 / 1000
    hot = data.slots_read("hot", 50, 4, 64, cpu, torch.int32)
    assert hot.dtype == torch.int32
    assert (hot == 32).any(1).all()
    values, scale = data.fp8_table(300, 20, cpu)
    assert values.float().isfinite().all()
    assert len(values.view(torch.uint8).unique()) == 254
    assert (scale > 0).all()
    table, weights = data.table(64, 8, torch.bfloat16, cpu), data.weights_like(hot, torch.bfloat16)
    rows = len(hot.unique())
    assert data.forward_bytes(table, hot, weights) == 200 * 16 + 200 * (4 + 2) + 50 * 16
    assert data.backward_bytes(table, hot, weights, dense=True) == (rows + 64 + 50) * 16 + 200 * (4 + 2 + 2)
    assert data.update_bytes(table, hot, weights, torch.zeros(64)) == 2 * rows * 20 + 50 * 16 + 200 * 6


def test_a_checkout_that_is_not_installed_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    bench("import_checkout").ensure()
    code = "import sys; sys.path[:0] = sys.argv[1:]; from memrewrite.kernels import compile_variants as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code, sys.path[0]], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(sys.path[0])


# ----------------------------------------------------------------------------------------------------------- baselines


def lookup_inputs(dtype: torch.dtype = torch.float32, dim: int = 20) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (5, 6), generator=g)
    return *(torch.randn(s, generator=g).to(dtype) for s in ((9, dim), (5, 6), (5, dim))), indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rival", [pytest.param("triton", marks=interpreted), "bag", "torch", "gradients of torch"])
def test_baselines_are_right(monkeypatch: pytest.MonkeyPatch, rival: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    baselines = importlib.import_module("baselines")
    values, weights, grad, indices = lookup_inputs(dtype)
    exact = values.double().requires_grad_(), weights.double().requires_grad_()
    want = reference.sparse_lookup(exact[0], indices, exact[1])
    want_gv, want_gw = torch.autograd.grad(want, exact, grad.double())
    most = most_reads(indices)  # these kernels may add up a row's gradient in its own dtype: one rounding per read
    name = rival.split()[-1]
    forward = getattr(baselines, f"{name}_forward")
    assert_norm_close(forward(values, indices, weights), want, terms=6)
    if rival == "triton":
        for sums in (None, torch.float32)[dtype != torch.float32 :]:  # the interpreter adds no bf16 atomically
            gv, gw = baselines.triton_backward(grad, values, indices, weights, sums)
            assert_norm_close(gv, want_gv, most, roundings=most + 1)
            assert_norm_close(gw, want_gw, terms=20)
    else:
        gv, gw = baselines.gradients(forward, grad, values, indices, weights)()
        assert_norm_close(gv, want_gv, most, roundings=most + 1)
        assert_norm_close(gw, want_gw, terms=20)


def test_the_baseline_of_the_topk_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    baselines = importlib.import_module("baselines")
    one, two = torch.randn(7, 20), torch.randn(7, 30)
    scores, slots = baselines.torch_topk(one, two, 5)
    want, wanted = reference.product_key_topk(one, two, 5)
    assert torch.equal(scores, want)
    assert torch.equal(slots, wanted)
