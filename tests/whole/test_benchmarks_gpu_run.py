"""The command of the GPU benchmark, rehearsed on the CPU: it runs completely, and whatever fails costs one section only."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
KERNELS = ["forward", "decode", "backward", "topk", "update"]
SECTIONS = ["correctness", "ceilings", *KERNELS, "training step", "memory size", "layer", "compile", "onnx", "sweep"]
COMPLETE = [section for section in SECTIONS if section != "onnx"]  # those that can run here
FAULTS = "GPU_BENCHMARK_FAULTS"
interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux only")


def environment(**env: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHON": sys.executable, **env}


def command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(FOLDER), *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment(**env))


def rehearse(out: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return command("--rehearse", "--out", str(out), *args, **env)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    return found


def statuses(out: Path) -> dict[str, list[str]]:
    """The statuses of every section's rows."""
    found: dict[str, list[str]] = {}
    for row in summary(out)["rows"]:
        found.setdefault(row["section"], []).append(row["status"])
    return found


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []
    return [line for line in map(json.loads, filter(bytes.strip, whole)) if line["kind"] == kind]


def cases(out: Path) -> list[tuple[str, str]]:
    return [(row["section"], row["case"]) for row in summary(out)["rows"]]


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH that makes packages unimportable that a GPU machine does not have."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in ("pydantic", "typer", "yaml", "rich"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('not here', name={name!r})\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, blocked: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole rehearsal by the script, on a machine that has torch and little else, with a broken wheel."""
    out, wheels = tmp_path_factory.mktemp("whole") / "out", tmp_path_factory.mktemp("wheels")
    (wheels / "broken-1.0-py3-none-any.whl").write_text("not a wheel", encoding="utf-8")
    line = ["bash", str(FOLDER / "run.sh"), "--wheels", str(wheels), "--rehearse", "--out", str(out)]
    env = environment(PYTHONPATH=blocked)
    return out, subprocess.run(line, capture_output=True, text=True, check=False, env=env)


# ------------------------------------------------------------------------------------------------------- the whole run


def test_a_whole_rehearsal_runs_without_the_recipe_schema(whole: Any) -> None:
    out, done = whole
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "broken-1.0-py3-none-any.whl is not available" in done.stderr
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "gpu.json", "table.md", "log.txt"}
    record = summary(out)
    assert record["rehearsal"] is True
    assert record["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{12}", record["versions"]["kernels"])
    assert record["unreadable_lines"] == 0
    assert list(statuses(out)) == SECTIONS
    found = {section: set(rows) for section, rows in statuses(out).items()}
    assert found.pop("onnx") == {"ok", "rehearsed"}  # sessions need no recipe schema either
    assert found.pop("correctness") == {"ok"}
    assert found.pop("sweep") == {"not run (the kernels of torch have no plans)"}
    assert set().union(*found.values()) == {"rehearsed"}
    rows = record["rows"]
    assert all(row["ms"] is None and row["of_floor"] is None and not row["ratios"] for row in rows)
    assert {row["section"] for row in rows if row["moved"]} == {*KERNELS, "onnx"}
    for row in rows:  # each result was printed, and is in both tables
        assert row["case"] in done.stdout
    table = done.stdout.split("\n\n")[-1]
    page = (out / "table.md").read_text(encoding="utf-8")
    for section in SECTIONS:
        assert re.search(rf"^{section} ", table, re.MULTILINE)
        assert f"| {section} |" in page


def test_the_summary_can_be_made_again_from_a_record_that_was_cut(whole: Any, tmp_path: Path) -> None:
    out, _ = whole
    text = (out / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(text)
    assert command("--table", str(tmp_path)).returncode == 0
    for name in ("gpu.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    begun = text.index(b'"kind": "begin"', len(text) * 3 // 4)
    (tmp_path / "results.jsonl").write_bytes(text[: text.index(b"\n", begun) + 20])  # a case has begun, and a line is cut
    done = command("--table", str(tmp_path))
    assert done.returncode == 1
    assert summary(tmp_path)["unreadable_lines"] == 1
    found = cases(tmp_path)
    assert set(cases(out)[: len(found) // 2]) <= set(found)
    assert any("the run ended" in row["status"] for row in summary(tmp_path)["rows"])
    none = command("--table", str(tmp_path / "none"))
    assert none.returncode == 2
    assert "there is no results.jsonl" in none.stderr


def test_a_complete_run_has_nothing_to_resume(whole: Any, tmp_path: Path) -> None:
    out, _ = whole
    shutil.copytree(out, tmp_path / "copy")
    chosen = ",".join(COMPLETE)
    done = rehearse(tmp_path / "copy", "--resume", "--sections", chosen)
    assert done.returncode == 0, done.stderr
    assert cases(tmp_path / "copy") == cases(out)
    assert lines(tmp_path / "copy", "begin") == lines(out, "begin")


def test_another_machine_cannot_resume(whole: Any, tmp_path: Path) -> None:
    text = (whole[0] / "results.jsonl").read_text(encoding="utf-8")
    (tmp_path / "results.jsonl").write_text(text.replace(torch.__version__, "1.0"), encoding="utf-8")
    done = rehearse(tmp_path, "--resume")
    assert done.returncode == 2
    assert f"--resume is impossible: torch 1.0, now {torch.__version__}" in done.stderr
    assert len(lines(tmp_path, "run")) == 1


@pytest.mark.parametrize("_", [pytest.param("triton", marks=interpreted)])
def test_a_rehearsal_with_the_triton_kernels(tmp_path: Path, _: str) -> None:
    done = command("--rehearse", "--json", str(tmp_path / "gpu.json"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path)["device"] == {"name": "cpu", "kernels": "triton"}
    found = statuses(tmp_path)
    assert list(found) == SECTIONS
    assert {status for name in COMPLETE for status in found[name]} == {"ok", "rehearsed"}
    rows = summary(tmp_path)["rows"]
    ran = [row["rivals"] for row in rows if row["section"] in ("forward", "decode") and "triton" in row["rivals"]]
    assert {rivals["triton"] for rivals in ran} == {"rehearsed"}  # the comparison kernels run too
    assert "triton, fp32 sums" in {name for row in rows for name, how in row["rivals"].items() if how == "rehearsed"}


# -------------------------------------------------------------------------------------------------------------- options


def test_without_a_gpu_the_error_states_what_to_try(tmp_path: Path) -> None:
    done = command("--json", str(tmp_path / "out" / "gpu.json"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_section_is_an_error_with_the_list() -> None:
    done = command("--sections", "forward,none")
    assert done.returncode == 2
    assert f"there is no section 'none'; the sections are: {', '.join(SECTIONS)}" in done.stderr


def test_a_script_without_torch_says_what_to_try(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    env = {**environment(), "PATH": str(tmp_path), "PYTHON": ""}
    done = subprocess.run(["bash", str(FOLDER / "run.sh")], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "no Python here can import torch" in done.stderr
    assert "try: PYTHON=" in done.stderr


# ---------------------------------------------------------------------------------------------------------- whatever fails


def test_each_failure_costs_one_section(tmp_path: Path) -> None:
    """A wrong kernel, a hang, an error that persists, and a process that ends: all in one run."""
    faults = "correctness:0=wrong,ceilings:1=hang,forward:1=sticky,decode:0=exit,topk:0=crash,training step:0=error"
    chosen = "correctness,ceilings,forward,decode,topk,update,training step"
    done = rehearse(tmp_path, "--sections", chosen, "--seconds", "250", **{FAULTS: faults})
    assert done.returncode == 1
    found = statuses(tmp_path)
    assert list(found) == chosen.split(",")
    wrong, *checked = (status for status in found["correctness"] if status != "ok")
    assert wrong == "WRONG: an injected fault"
    assert not checked
    assert found["ceilings"][0] == "rehearsed"
    assert re.fullmatch(r"FAILED: stopped at the time limit of \d+ s", found["ceilings"][-1])
    assert "copy" in {line["name"] for line in lines(tmp_path, "value")}
    marked = [status for status in found["forward"] if status.startswith("WRONG kernel: times are not comparable (lookup")]
    assert len(marked) >= 2  # the case that was done, and the line that the failed one had given
    assert found["forward"][len(marked)] == "FAILED: RuntimeError: CUDA error: an injected fault that persists"
    rest = found["forward"][len(marked) + 1 :]
    assert rest
    assert all(status.startswith("not run (the device does not work after 'D=") for status in rest)
    assert found["decode"][1] == "FAILED: the process ended early"
    assert set(found["decode"][2:]) == {"not run (the process ended early)"}
    assert found["topk"][1] == "FAILED: the process was ended by SIGSEGV"
    assert set(found["topk"][2:]) == {"not run (the process was ended by SIGSEGV)"}
    assert set(found["update"]) == {"rehearsed"}
    assert "FAILED: RuntimeError: an injected fault" in found["training step"]
    assert found["training step"][-1].startswith(("WRONG kernel", "rehearsed"))
    assert "RuntimeError: an injected fault" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    for section in ("ceilings", "forward", "decode", "topk"):
        assert f"benchmarks/gpu: {section}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sticky", "exit", "crash", "error"])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_failure_in_any_section_loses_that_section_alone(tmp_path: Path, section: str, kind: str, library: Path) -> None:
    other = "update" if section != "update" else "topk"
    options = ("--sections", f"{section},{other}", "--library", str(library))
    assert rehearse(tmp_path, *options, **{FAULTS: f"{section}:0={kind}"}).returncode == 1
    names = {line["section"]: line["names"] for line in lines(tmp_path, "cases")}
    done = {(line["section"], line["of"]) for line in lines(tmp_path, "done")}
    assert {(other, name) for name in names[other]} <= done
    finished = [name for name in names[section] if (section, name) in done]
    if kind == "error":
        assert finished == names[section][1:]
    else:  # the cases of a section may be shared by several processes
        assert names[section][0] not in finished
        assert len(finished) < len(names[section]) * 7 / 8
    status = {line["of"]: line["why"] for line in lines(tmp_path, "failed")}
    assert set(status) == set(names[section]) - set(finished)
    assert status.pop(names[section][0]).startswith("FAILED: ")
    assert all(why.startswith("not run (") for why in status.values())


@linux
@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_run_keeps_what_was_finished_and_can_be_resumed(whole: Any, tmp_path: Path, kills: int) -> None:
    chosen = "correctness,ceilings,forward,update" if kills < 5 else ",".join(COMPLETE)
    line = [sys.executable, str(FOLDER), "--rehearse", "--out", str(tmp_path), "--sections", chosen, "--resume"]
    path, chance = tmp_path / "results.jsonl", random.Random(kills)
    before = b""
    for _ in range(kills):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment(), start_new_session=True)
        wanted = before.count(b"\n") + chance.randint(2, 30 if kills < 5 else 60)
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        seen = path.read_bytes()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        before = path.read_bytes()
        assert before.startswith(seen)
        time.sleep(1)
        assert path.read_bytes() == before  # no process of the killed run writes any more
    finished = {(done["section"], done["of"]) for done in lines(tmp_path, "done")}
    done = rehearse(tmp_path, "--sections", chosen, "--resume")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(before)
    assert cases(tmp_path) == [case for case in cases(whole[0]) if case[0] in chosen.split(",")]
    assert {status for rows in statuses(tmp_path).values() for status in rows} == {"ok", "rehearsed"}
    again = [(done["section"], done["of"]) for done in lines(tmp_path, "done")]
    assert len(again) == len(set(again))  # no finished case was run again
    assert finished <= set(again)


def test_an_interrupted_run_still_writes_its_summary_and_a_new_one_keeps_it(tmp_path: Path) -> None:
    line = [sys.executable, str(FOLDER), "--rehearse", "--out", str(tmp_path), "--sections", "ceilings"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment(**{FAULTS: "ceilings:0=hang"}))
    while process.poll() is None and not lines(tmp_path, "result"):
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 1
    assert cases(tmp_path) == [("ceilings", "copy"), ("ceilings", "copy"), ("ceilings", "matmul")]
    assert statuses(tmp_path)["ceilings"][1:] == ["FAILED: the run ended in this case", "not run (the run ended before)"]
    old = (tmp_path / "results.jsonl").read_bytes()
    assert rehearse(tmp_path, "--sections", "ceilings").returncode == 0
    assert (tmp_path / "results.1.jsonl").read_bytes() == old
    assert cases(tmp_path) == [("ceilings", "copy"), ("ceilings", "bf16 matmul")]


@pytest.mark.slow
def test_the_whole_run_ends_in_time_although_every_section_hangs(tmp_path: Path) -> None:
    names = ["correctness", "ceilings", "topk", "update"]
    faults = ",".join(f"{name}:0=hang" for name in names)
    start = time.monotonic()
    done = rehearse(tmp_path, "--sections", ",".join(names), "--seconds", "60", **{FAULTS: faults})
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    found = statuses(tmp_path)
    assert list(found) == names
    assert all(any("time limit" in status for status in found[name]) for name in names)


@linux
@pytest.mark.slow
def test_a_terminal_that_blocks_does_not_stop_the_clock(tmp_path: Path) -> None:
    line = [
        sys.executable,
        str(FOLDER),
        "--rehearse",
        "--out",
        str(tmp_path),
        "--sections",
        "forward,decode",
        "--seconds",
        "40",
    ]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:  # until the pipe is full
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    start = time.monotonic()
    process = subprocess.Popen(line, stdout=writer, env=environment())
    assert process.wait(60) == 1
    assert time.monotonic() - start < 45
    assert lines(tmp_path, "run")
    os.close(reader)
    os.close(writer)
    assert command("--table", str(tmp_path)).returncode in (0, 1)
