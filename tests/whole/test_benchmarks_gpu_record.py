"""Record, processes and summary of the GPU benchmark: whatever breaks, finished results are found and the rest is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def measured(bench: Any, tmp_path: Path) -> Any:
    """Runs cases as the process of a section does, in this process; returns the contents of the record."""
    sections, record = bench("sections"), bench("record").Record(tmp_path)

    def measure(cases: Any, *, share: tuple[int, int] = (0, 1), name: str = "topk") -> Any:
        module = type(sys)("cases_of_a_test")
        module.cases = cases if callable(cases) else lambda _: cases  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        section = sections.Section(name, 1, module.__name__)
        bench("section_process").measure(section, record, bench("harness").Bench(rehearse=True, triton=False), share)
        return record.read()

    return measure


def results_of(contents: Any) -> dict[str, list[str]]:
    return {of: [r.case for r in case.results] for cases in contents.cases.values() for of, case in cases.items()}


def states(contents: Any) -> dict[str, tuple[str, str]]:
    return {of: (case.state, case.why) for cases in contents.cases.values() for of, case in cases.items()}


# ------------------------------------------------------------------------------------------------------------ the cases


def test_a_case_that_dies_keeps_its_lines_and_the_others_still_run(bench: Any, measured: Any, capsys: Any) -> None:
    Case, Result = bench("harness").Case, bench("harness").Result

    def three(_: Any) -> Any:
        yield from (Result("topk", f"line {i}") for i in range(3))
        raise RuntimeError("the reason\nand more")

    def lacking(_: Any) -> Any:
        raise ModuleNotFoundError("no", name="pydantic")

    def ours_lacks(_: Any) -> Any:
        raise ModuleNotFoundError("no module", name="memrewrite.none")

    def skipped(_: Any) -> Any:
        raise bench("harness").Skip("no NVLink")

    def wrong(_: Any) -> Any:
        raise bench("harness").Stop("off by 2")

    last = [Result("topk", "last", extra={"plan": {"warps": 4}, "path": Path("a")})]
    runs = {"a": three, "b": lacking, "c": ours_lacks, "d": skipped, "e": wrong, "f": lambda _: last}
    contents = measured([Case(name, run) for name, run in runs.items()])
    assert results_of(contents) == {"a": ["line 0", "line 1", "line 2"], "b": [], "c": [], "d": [], "e": [], "f": ["last"]}
    assert states(contents) == {
        "a": ("failed", "FAILED: RuntimeError: the reason"),
        "b": ("failed", "not run (pydantic is not installed)"),
        "c": ("failed", "FAILED: memrewrite.none is not installed"),
        "d": ("failed", "not run (no NVLink)"),
        "e": ("failed", "WRONG: off by 2"),
        "f": ("done", ""),
    }
    assert "RuntimeError: the reason" in capsys.readouterr().err
    assert contents.cases["topk"]["f"].results[0].extra == {"plan": {"warps": 4}, "path": "a"}


def test_a_device_that_no_longer_works_ends_the_section(bench: Any, measured: Any) -> None:
    harness, faults = bench("harness"), bench("faults")
    ok = harness.Case("ok", lambda _: [harness.Result("topk", "fine")])
    broken = harness.Case("broken", lambda b: faults.fault(b, "sticky"))
    contents = measured([ok, broken, harness.Case("later", ok.run), harness.Case("last", ok.run)])
    persists = "RuntimeError: CUDA error: an injected fault that persists"
    rest = ("failed", f"not run (the device does not work after 'broken': {persists})")
    assert states(contents) == {"ok": ("done", ""), "broken": ("failed", f"FAILED: {persists}"), "later": rest, "last": rest}


def test_an_error_that_shows_only_afterwards_belongs_to_its_case(bench: Any, measured: Any) -> None:
    harness = bench("harness")

    def asynchronous(b: Any) -> Any:
        yield harness.Result("topk", "timed")
        b.sync = lambda: (_ for _ in ()).throw(RuntimeError("CUDA error"))

    contents = measured([harness.Case("a", asynchronous), harness.Case("b", asynchronous)])
    assert states(contents)["a"] == ("failed", "FAILED: RuntimeError: CUDA error")
    assert states(contents)["b"][1].startswith("not run (the device does not work after 'a'")
    assert results_of(contents)["a"] == ["timed"]


def test_cases_that_cannot_be_listed_are_one_line(bench: Any, measured: Any) -> None:
    def cases(_: Any) -> Any:
        raise bench("harness").Skip("onnxruntime-gpu is not installed")

    contents = measured(cases)
    assert states(contents) == {"": ("failed", "not run (onnxruntime-gpu is not installed)")}
    (line,) = bench("report").all_results(contents)
    assert (line.section, line.case, line.status) == ("topk", "all cases", "not run (onnxruntime-gpu is not installed)")
    harness = bench("harness")
    assert states(measured([harness.Case("a", lambda _: [])])) == {"a": ("done", "")}  # later it runs


def test_finished_cases_are_not_run_again_and_failed_ones_come_last(bench: Any, measured: Any) -> None:
    harness, ran = bench("harness"), []

    def case(name: str, good: bool = True) -> Any:
        def run(_: Any) -> Any:
            ran.append(name)
            yield harness.Result("topk", f"{name} of attempt {len(ran)}")
            yield harness.Result("topk", name)
            assert good

        return harness.Case(name, run)

    measured([case("a"), case("b", good=False), case("c")], share=(0, 2))
    contents = measured([case("a"), case("b", good=False), case("c"), case("d")], share=(1, 2))
    assert ran == ["a", "c", "b", "d"]
    assert states(contents)["b"][0] == "failed"
    ran.clear()
    contents = measured([case("a"), case("b"), case("c"), case("d"), case("e")])
    assert ran == ["e", "b"]
    assert {state for state, _ in states(contents).values()} == {"done"}
    assert results_of(contents)["b"] == ["b of attempt 2", "b"]  # those of the failed attempt are replaced


def test_cases_of_one_name_are_told_apart(bench: Any, measured: Any) -> None:
    harness = bench("harness")
    contents = measured([harness.Case("a", lambda _, i=i: [harness.Result("topk", f"line {i}")]) for i in range(3)])
    assert results_of(contents) == {"a": ["line 0"], "a (2)": ["line 1"], "a (3)": ["line 2"]}


def test_rates_travel_to_the_processes_of_other_sections(bench: Any, measured: Any) -> None:
    harness, seen = bench("harness"), []

    def rate(b: Any) -> Any:
        b.keep("copy", 2e12)
        return []

    def reader(b: Any) -> Any:
        seen.append((b.copy, b.matmul))
        return []

    measured([harness.Case("copy", rate)], name="ceilings")
    contents = measured([harness.Case("reader", reader)])
    assert contents.values == {"copy": 2e12}
    assert seen[0][0] == 2e12
    assert seen[0][1] != seen[0][1]  # NaN: not measured


def test_without_a_copy_rate_the_floor_is_not_decided(bench: Any) -> None:
    harness = bench("harness")
    b = harness.Bench(rehearse=True, triton=False)
    b.rehearse = False
    line = b.result("s", "c", {"ours": harness.Timing(2.0, 1.0, 3)}, moved=10**9, targets=[harness.Target("floor", 0.85)])
    assert (line.moved, line.gbps, line.of_floor, line.targets) == (10**9, 500.0, None, [("≥ 85% of floor", None)])
    assert "not decided" in bench("report").table([line])


# ----------------------------------------------------------------------------------------------------------- the record


def test_a_record_is_read_wherever_it_was_cut(bench: Any, tmp_path: Path) -> None:
    Record, Result = bench("record").Record, bench("results").Result
    whole = Record(tmp_path)
    whole.append("run", device={"name": "é"}, versions={}, rehearsal=True, date="2026-01-01")
    whole.append("cases", section="topk", names=["a", "b"])
    for name in ("a", "b"):
        whole.append("begin", section="topk", of=name)
        whole.result("topk", name, Result("topk", f"{name} ×", ms=1.5, targets=[("≥ 1", None)], rivals={"torch": 2.0}))
        whole.append("done", section="topk", of=name, seconds=1)
    text = whole.path.read_bytes()
    (tmp_path / "cut").mkdir()
    cut = Record(tmp_path / "cut")
    lines = text.count(b"\n")
    for end in range(len(text)):
        cut.path.write_bytes(text[:end])
        contents = cut.read()
        full = text[:end].count(b"\n")
        assert contents.torn == (not text[:end].endswith(b"\n") and end > 0)
        found = [r for case in contents.cases.get("topk", {}).values() for r in case.results]
        assert len(found) == (full >= 4) + (full >= 7)
        if end % 40 == 0:  # a later line is not swallowed, and the summary can be made
            cut.append("end", seconds=1.0)
            assert cut.read().seconds == 1.0
            bench("report").conclude(cut.path.parent, cut.read())
    cut.path.write_bytes(text)
    assert asdict(cut.read().cases["topk"]["b"]) == asdict(whole.read().cases["topk"]["b"])
    assert lines == 8


def test_lines_that_lack_something_end_nothing(bench: Any, tmp_path: Path) -> None:
    record = bench("record").Record(tmp_path)
    record.append("result", section="topk", of="a", case="a", targets=[1])
    record.append("value")
    record.append("end", seconds=2.0)
    contents = record.read()
    assert (contents.torn, contents.seconds) == (2, 2.0)
    assert bench("report").progress({"kind": "result", "section": "topk"}) == '{"kind": "result", "section": "topk"}'


def test_the_record_of_a_run_that_was_killed_names_what_is_missing(bench: Any, tmp_path: Path) -> None:
    record = bench("record").Record(tmp_path)
    record.append("cases", section="topk", names=["a", "b"])
    record.append("begin", section="topk", of="a")
    record.result("topk", "a", bench("results").Result("topk", "line", ms=2.0))
    found = [(r.case, r.status) for r in bench("report").all_results(record.read())]
    assert found == [
        ("line", "kernel not checked"),
        ("a", "FAILED: the run ended in this case"),
        ("b", "not run (the run ended before)"),
    ]


def test_a_page_for_the_docs_has_device_date_and_versions(bench: Any, tmp_path: Path) -> None:
    record, Result = bench("record").Record(tmp_path), bench("results").Result
    record.append("run", device={"name": "H100"}, versions={"torch": "2.11"}, rehearsal=False, date="2026-01-02T03:04:05")
    record.append("value", name="copy", value=3.1e12)
    record.append("cases", section="correctness", names=["topk a", "topk b", "lookup"])
    for name in ("topk a", "topk b", "lookup"):
        record.append("done", section="correctness", of=name, seconds=0)
    record.append("cases", section="topk", names=["a"])
    record.result("topk", "a", Result("topk", "a|b", ms=2.0, gbps=9.0, of_floor=0.5, targets=[("≥ 1", True), ("≥ 9", None)]))
    record.append("done", section="topk", of="a", seconds=1)
    record.append("end", seconds=99.5)
    assert bench("report").conclude(tmp_path, record.read(), tmp_path / "also" / "gpu.json") == 0
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    for text in ("2026-01-02", "name H100", "torch 2.11", "copy 3100.0 GB/s", "1 met, 0 missed, 1 not decided"):
        assert text in page
    assert "| topk | a\\|b | 2.000 | 9 | 50% |  | ≥ 1 | yes |  |" in page
    summary = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert summary == json.loads((tmp_path / "also" / "gpu.json").read_text(encoding="utf-8"))
    assert summary["ceilings"] == {"copy_gbps": 3100.0, "matmul_tflops": None}
    assert summary["targets"] == {"met": 1, "missed": 0, "open": 1}


# -------------------------------------------------------------------------------------------------------- the processes

HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def eventually(condition: Any) -> bool:
    return any(condition() or time.sleep(0.1) for _ in range(300))


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("print('fine')", ""),
        ("raise SystemExit(3)", "the process ended with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "the process was ended by signal 40"),
        (HANGING, "stopped at the time limit of 5 s"),
    ],
    ids=["fine", "exit", "crash", "signal", "hang"],
)
def test_how_a_process_ended_is_known(bench: Any, code: str, how: str) -> None:
    why, printed = bench("processes").output([sys.executable, "-c", code], 5 if "limit" in how else 60)
    assert why == how
    if "limit" in how and sys.platform == "linux":
        assert eventually(lambda: not alive(int(printed)))  # the process that it started has ended too


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the children on Linux only")
def test_a_process_ends_with_its_parent(bench: Any, tmp_path: Path) -> None:
    folder, file = Path(bench("processes").__file__).parent, tmp_path / "pid"
    child = (
        "import os, sys, time; import processes; processes.end_with_parent(int(sys.argv[1]));"
        f"open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(folder)})
    assert eventually(lambda: file.exists() and file.read_text(encoding="utf-8"))
    pid = int(file.read_text(encoding="utf-8"))
    assert alive(pid)
    process.kill()
    process.wait()
    assert eventually(lambda: not alive(pid))


# --------------------------------------------------------------------------------------------------------- the sections


def test_sections_are_chosen_by_name(bench: Any) -> None:
    chosen = bench("sections").chosen
    assert chosen("") == bench("sections").SECTIONS
    assert [section.name for section in chosen("memory size, forward")] == ["forward", "memory size"]
    with pytest.raises(ValueError, match="no section 'bakward'; the sections are: correctness, ceilings, forward"):
        chosen("forward,bakward")


def test_the_process_that_starts_the_others_needs_no_torch(bench: Any) -> None:
    folder = str(Path(bench("processes").__file__).parent)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import run; assert not {'torch', 'memrewrite'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0
