"""The compile gate passes with each supported Triton version, and finds spills, narrow loads and increased register counts.

`make test` compiles for one architecture with the installed Triton; `make test-slow` for all, with the oldest version too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from memrewrite.kernels.compile_variants import CompileVariant

SCRIPT = Path(__file__).with_name("compile_gate.py")
OLDEST = Path(sys.prefix) / "triton-3.6.0"  # not in site-packages: the Makefile installs it there
CACHE = Path(__file__).parents[2] / "build" / "triton-cache"  # an unchanged kernel is not compiled again
INSTALL = f"{sys.executable} -m pip install --no-deps --target {OLDEST} triton==3.6.0"
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def total(table, out, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None].to(tl.int64) * stride * 8
    x = tl.load(table + rows + tl.arange(0, BLOCK)[None, :] * STEP).to(tl.float32)
    y = x / tl.sum(x, axis=0)[None, :]
    y = tl.exp(y) / tl.sum(y * y, axis=0)[None, :]
    tl.store(out + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], x / y)
"""


def gate(*options: str, triton: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    if triton is not None:
        env["PYTHONPATH"] = str(triton)
    return subprocess.run([sys.executable, SCRIPT, *options], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    spec = spec_from_file_location("compile_gate", SCRIPT)
    sys.modules["compile_gate"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def variant(tmp_path, monkeypatch) -> CompileVariant:
    """A small kernel without faults: it loads its rows 16 bytes at a time and does not spill."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    file = tmp_path / "gate_kernels.py"
    file.write_text(KERNELS)
    spec = spec_from_file_location("gate_kernels", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    signature = {"table": "*bf16", "out": "*fp32", "stride": "i32"}
    constants = {"BLOCK": 256, "ROWS": 8, "STEP": 1}
    signature.update(dict.fromkeys(constants, "constexpr"))
    return CompileVariant("total", module.total, signature, constants, ("table", "out"), 1)


@pytest.mark.parametrize(
    ("which", "architectures"),
    [
        pytest.param("installed", (90,), id="installed-sm_90"),
        pytest.param("installed", (80, 90, 100), id="installed", marks=pytest.mark.slow),
        pytest.param("3.6.0", (80, 90, 100), id="3.6.0", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_passes(which, architectures, tmp_path):
    if which == "installed" and find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    if which == "3.6.0" and not OLDEST.exists():
        pytest.skip(f"the oldest Triton version is not installed: {INSTALL}")
    file = tmp_path / "codes.json"
    options = ["--json", str(file), "--cache", str(CACHE), "--arch", *map(str, architectures)]
    done = gate(*options, triton=OLDEST if which == "3.6.0" else None)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    codes = json.loads(file.read_text())
    assert which in ("installed", codes["triton"])
    assert {code["arch"] for code in codes["kernels"]} == set(architectures)
    assert {code["name"].split()[0] for code in codes["kernels"]} >= {"half_topk", "pair_topk", "scatter_topk"}
    assert not any(code["spills"] or code["stack"] for code in codes["kernels"])


def test_a_cached_kernel_is_not_compiled_again_and_a_changed_one_is(judge, variant, tmp_path):
    first = judge.compiled(variant, 90)
    cubins = set(tmp_path.rglob("*.cubin"))
    assert judge.compiled(variant, 90) == first
    assert set(tmp_path.rglob("*.cubin")) == cubins
    file = tmp_path / "gate_kernels.py"
    file.write_text(KERNELS.replace("[None, :] * STEP", "[None, :] * STEP * 3"))  # the rows' loads become narrow
    spec = spec_from_file_location("gate_kernels_changed", file)
    changed = module_from_spec(spec)
    spec.loader.exec_module(changed)
    assert judge.compiled(replace(variant, kernel=changed.total), 90).loads != first.loads
    assert len(set(tmp_path.rglob("*.cubin")) - cubins) == 1


def test_a_kernel_without_faults_has_no_findings(judge, variant):
    code = judge.compiled(variant, 90)
    assert set(code.loads) == {16}
    assert list(judge.findings(variant, code, code.registers)) == []


def test_spills_are_found(judge, variant):
    spilling = replace(variant, constants={"BLOCK": 256, "ROWS": 32, "STEP": 1}, options={"maxnreg": 64})
    code = judge.compiled(spilling, 80)
    (finding,) = judge.findings(spilling, code, code.registers)
    assert code.spills > 0
    assert finding.startswith(f"{code.spills} spill instructions")
    assert "try" in finding


def test_narrow_loads_are_found(judge, variant):
    scalar = replace(variant, constants={"BLOCK": 256, "ROWS": 8, "STEP": 3})
    code = judge.compiled(scalar, 90)
    none_wide, narrow = judge.findings(scalar, code, code.registers)
    assert "no load of 16 bytes" in none_wide
    assert f"{code.loads[2]} loads below 16 bytes" in narrow
    unaligned = replace(variant, aligned=("out",))
    assert len(list(judge.findings(unaligned, judge.compiled(unaligned, 100), 255))) == 2
    assert list(judge.findings(replace(scalar, row_bytes=2), code, code.registers)) == []


def test_an_increased_register_count_is_found(judge, variant):
    code = judge.Code(registers=100, stack=0, spills=0, loads={16: 4, 4: 2}, in_flight=4, instructions=9)
    allowed = replace(variant, scalar_loads=2)
    assert list(judge.findings(allowed, code, 88)) == []
    assert list(judge.findings(allowed, replace(code, registers=30), 23)) == []
    (grown,) = judge.findings(allowed, code, 86)
    assert "100 registers, 86 on record" in grown
    (unknown,) = judge.findings(allowed, code, None)
    assert "--write" in unknown
    assert list(judge.findings(allowed, code, None, recorded=False)) == []
    (narrow,) = judge.findings(replace(variant, scalar_loads=1), code, 100)
    assert "2 loads below 16 bytes" in narrow


def test_a_finding_fails_the_run(judge, variant, monkeypatch, tmp_path, capsys):
    """The exit status: without a recorded register count, with a recorded one, and with a lower one."""
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"0.0": {"other": {"90": 1}}}))
    monkeypatch.setattr(judge, "BASELINE", record)
    monkeypatch.setattr(judge, "compile_variants", lambda: iter([variant]))
    options = judge.argparse.Namespace(write=False, json=None, arch=[90])
    assert judge.run(options, "1.0") == 0  # a version without any record is reported, and passes
    assert "no register counts on record for Triton 1.0" in capsys.readouterr().out
    assert judge.run(options, "0.0") == 1
    assert "FAILED total · sm_90 · Triton 0.0: no register count on record" in capsys.readouterr().out
    options.write = True
    assert judge.run(options, "1.0") == 0
    known = json.loads(record.read_text())
    assert set(known) == {"0.0", "1.0"}
    options.write = False
    assert judge.run(options, "1.0") == 0
    known["1.0"]["total"]["90"] = 10
    record.write_text(json.dumps(known))
    assert judge.run(options, "1.0") == 1
    out = capsys.readouterr().out
    assert "10 on record" in out
    assert out.rstrip().endswith("1 compiled, 1 findings")
    monkeypatch.setattr(judge, "compile_variants", lambda: iter(()))
    assert judge.run(options, "1.0") == 1  # a run that compiled nothing fails


def test_it_refuses_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stdout


def test_loads_in_flight_are_counted():
    from machine_code import in_flight

    load = ("LDG.E.EL.128", "R4, desc[UR4][R2.64]")
    other, scalar = ("LDG.E.EL.128", "R8, desc[UR4][R2.64]"), ("LDG.E", "R12, desc[UR4][R2.64]")
    use, copy = ("FADD", "R20, R5, R21"), ("FADD", "R20, R9, R21")
    assert in_flight([load, other, scalar, use, copy], 16) == 2
    assert in_flight([load, use, other, copy], 16) == 1
    assert in_flight([load, scalar, other], 4) == 3
    assert in_flight([load, ("LDG.E.128", "R8, desc[UR4][R2.64]"), use], 16, "EL") == 1


def test_widths_are_read():
    from machine_code import width

    names = {"LDG.E.128": 16, "LDG.E.EL.128.CONSTANT": 16, "LDG.E.64": 8, "LDG.E": 4, "LDG.E.U16": 2, "LDGSTS.E.BYPASS.128": 16}
    assert {name: width(name) for name in names} == names
    assert width("LDG.E.U8") == 1


SLICED = {"rows": 2, "block": 256, "pieces": 2, "warps": 1, "registers": 80, "cache": "evict_last"}
ENTRIES = [  # of the table of plans: kernel, dtype, size, plan
    ("forward", "bfloat16", [1024], {"rows": 8, "block": 256, "warps": 1}),
    ("segment_gradients", "bfloat16", [1024], {"rows": 4, "block": 256, "warps": 1}),
    ("token_dots", "bfloat16", [1024], {"rows": 8, "block": 256, "warps": 1}),
    ("update", "bfloat16", [2048, 1], SLICED),
    ("update", "float8_e4m3fn", [2048, 2], SLICED),
    ("lazy_adam", "bfloat16", [2048, 2], SLICED),
    ("lazy_adam", "float8_e4m3fn", [2048, 1], SLICED),
    ("topk_half", "bfloat16", [4096, 64], {"rows": 16, "chunk": 32, "group": 16, "warps": 1}),
    ("topk_pair", "float32", [32], {"rows": 16, "chunk": 16, "group": 1, "warps": 1}),
]


def test_each_entry_of_the_table_of_plans_has_variants_with_its_plan(judge, monkeypatch, tmp_path):
    """For every kernel that may have entries: its module makes variants, which have the plan and can be compiled."""
    pytest.importorskip("triton")
    from memrewrite.kernels import triton_plans

    assert {kernel for kernel, *_ in ENTRIES} == set(triton_plans.KERNELS), "add an entry for each kernel"
    known = {"device": "sm_90", "date": "2026-01-01", "triton": "3.6.0"}
    file = tmp_path / "plans.json"
    monkeypatch.setattr(triton_plans, "FILE", file)
    for kernel, dtype, size, plan in ENTRIES:
        file.write_text(json.dumps({"plans": [{**known, "kernel": kernel, "dtype": dtype, "size": size, "plan": plan}]}))
        triton_plans.table.cache_clear()
        variants = list(judge.measured_variants())
        assert variants, kernel
        for variant in variants:
            assert variant.architectures in ((90,), ())  # sm_80 reads 8-bit tables in another way
            assert set(variant.kernel.arg_names) == set(variant.signature) | set(variant.constants)
            assert variant.num_warps == plan["warps"]
            assert variant.constants.get("ROWS", variant.constants.get("R")) == plan["rows"]
            assert variant.constants.get("BLOCK_D", variant.constants.get("C")) == plan.get("block", plan.get("chunk"))
            assert variant.options.get("maxnreg") == plan.get("registers")
        phases = 1 if kernel != "update" else 2 if dtype == "bfloat16" else 3
        assert len({variant.name for variant in variants if variant.architectures}) >= phases
    triton_plans.table.cache_clear()


def test_an_entry_without_variants_stops_the_gate(judge, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from memrewrite.kernels import triton_lookup, triton_plans

    kernel, dtype, size, plan = ENTRIES[0]
    known = {"device": "sm_90", "date": "2026-01-01", "triton": "3.6.0"}
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"plans": [{**known, "kernel": kernel, "dtype": dtype, "size": size, "plan": plan}]}))
    monkeypatch.setattr(triton_plans, "FILE", file)
    monkeypatch.setattr(triton_lookup, "MEASURED", {})
    with pytest.raises(SystemExit, match="no module has variants for the plans of forward"):
        list(judge.measured_variants())
