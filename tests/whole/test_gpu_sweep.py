"""The sweep of plans: its rounds, a candidate that computes something else, and the winners in the table of plans."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
]
PLAN = {"rows": 8, "block": 256, "warps": 1, "registers": 72, "cache": ""}
RUN = {"kind": "run", "device": {"name": "H100"}, "date": "2026-01-02T03:04:05+00:00", "versions": {"triton": "3.6.0"}}


def line(plan: Any, ms: float, own: float = 1.0, kernel: str = "forward", **other: Any) -> dict[str, Any]:
    """A line of the record: both patterns take `ms`."""
    times, before = {"uniform": ms, "zipf": ms}, {"uniform": own, "zipf": own}
    extra = {"kernel": kernel, "dtype": "bfloat16", "size": [1024], "plan": plan, "times": times, "own": before}
    return {"kind": "result", "section": "sweep", "case": "forward", "status": "ok", "extra": extra, **other}


def entry(plan: dict[str, Any], kernel: str = "forward", device: str = "H100") -> dict[str, Any]:
    known = {"device": device, "date": "2025-01-01", "triton": "3.6.0", "dtype": "bfloat16", "size": [1024]}
    return {**known, "kernel": kernel, "plan": plan}


def test_the_fastest_plan_of_each_kernel_replaces_the_entry_of_its_device(bench: Any, tmp_path: Path) -> None:
    results, plans = tmp_path / "results.jsonl", tmp_path / "plans.json"
    lines = [
        RUN,
        line(None, 1.0),
        line({**PLAN, "rows": 4}, 0.9),
        line(PLAN, 0.4, own=0.5),  # a later round: another time of the own plan
        line({**PLAN, "rows": 2}, 0.85),
        line({**PLAN, "rows": 1}, 0.1, status="WRONG: relative error 1"),
        line({**PLAN, "rows": 16}, 0.1, section="forward"),
        line(PLAN, 0.99, kernel="token_dots"),  # too little
    ]
    results.write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"kind": "res')
    old = [entry({**PLAN, "rows": 32}), entry(PLAN, "token_dots"), entry({**PLAN, "rows": 32}, device="H200")]
    plans.write_text(json.dumps({"plans": old}))
    assert bench("sweep_plans").main([str(results), "--plans", str(plans)]) == 0
    found = {(each["device"], each["kernel"]): each for each in json.loads(plans.read_text())["plans"]}
    assert {key: each["plan"] for key, each in found.items()} == {
        ("H100", "forward"): PLAN, ("H100", "token_dots"): PLAN, ("H200", "forward"): {**PLAN, "rows": 32},
    }  # fmt: skip
    new = found["H100", "forward"]
    assert (new["date"], new["triton"], new["ms"], new["default_ms"]) == ("2026-01-02", "3.6.0", 0.8, 1.0)
    assert found["H100", "token_dots"]["date"] == "2025-01-01"


def test_a_plan_that_no_kernel_can_use_does_not_replace_the_table(bench: Any, tmp_path: Path) -> None:
    results, plans = tmp_path / "results.jsonl", tmp_path / "plans.json"
    results.write_text("".join(json.dumps(each) + "\n" for each in (RUN, line({**PLAN, "rows": 3}, 0.5))))
    plans.write_text('{"plans": []}')
    with pytest.raises(ValueError, match="power of two"):
        bench("sweep_plans").main([str(results), "--plans", str(plans)])
    assert plans.read_text() == '{"plans": []}'


def test_without_triton_the_sweep_is_not_run(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sweep", "sweep_subjects"):
        sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    sweep, harness = bench("sweep"), bench("harness")
    b = harness.Bench(rehearse=True, triton=False)
    (case,) = sweep.cases(b)
    assert [result.status for result in case.run(b)] == ["not run (the kernels of torch have no plans)"]


def test_without_time_no_candidate_is_run(bench: Any) -> None:
    b = bench("harness").Bench(rehearse=True, triton=False, end=time.time())
    with pytest.raises(bench("results").Skip, match="no time left"):
        bench("sweep").check_time(b)
    b.end += 60
    bench("sweep").check_time(b)


@pytest.mark.parametrize("_", [pytest.param("triton", marks=interpreted)])
def test_a_candidate_with_other_results_is_reported(bench: Any, monkeypatch: pytest.MonkeyPatch, _: str) -> None:
    from memrewrite.kernels import triton_topk
    from memrewrite.kernels.triton_plans import tuned

    monkeypatch.setattr(triton_topk, "FEW_ROWS", 2)  # plans are used for more rows

    sweep, harness, subjects = bench("sweep"), bench("harness"), bench("sweep_subjects")
    b = harness.Bench(rehearse=True, triton=True)
    right, *_rest = (subject for subject in subjects.subjects(True) if subject.kernel == "topk_half")
    plans = [{"rows": rows, "chunk": 16, "group": 1, "warps": 1} for rows in (16, 32)]
    impossible = {"rows": 16, "chunk": 16, "group": 16, "warps": 1}  # there are only 2 groups of 16 scores

    def inputs(device: Any, pattern: str) -> Any:
        given = right.inputs(device, pattern)

        def outputs() -> Any:
            plan = tuned("topk_half", device, right.dtype, *right.size)
            scores, indices = given.outputs()
            return scores + (plan is not None and plan["rows"] == 32), indices

        return replace(given, outputs=outputs)

    subject = replace(right, inputs=inputs, candidates=[*plans, impossible])
    ((number, same, part),) = sweep.rounds([subject])
    own, good, wrong, refused = sweep._sweep(b, same, part)
    assert (number, own.status, good.status) == (1, "rehearsed", "rehearsed")
    assert good.extra["plan"] == plans[0]
    assert good.extra["same_bits"]
    assert wrong.status.startswith("WRONG: relative error")
    assert wrong.extra["plan"] == plans[1]
    assert refused.status.startswith("not run (PlanError: ")


@pytest.mark.parametrize("_", [pytest.param("triton", marks=interpreted)])
def test_all_candidates_are_valid_plans_and_each_is_in_one_round(bench: Any, _: str) -> None:
    from memrewrite.kernels import triton_plans, triton_topk_plans

    sweep, subjects = bench("sweep"), list(bench("sweep_subjects").subjects(False))
    assert {subject.kernel for subject in subjects} == set(triton_plans.KERNELS)
    found: dict[str, list[Any]] = {subject.name: [] for subject in subjects}
    turns = list(sweep.rounds(subjects))
    assert [subject.name for _number, subject, _plans in turns[: len(subjects)]] == list(found)
    for _number, subject, plans in turns:
        found[subject.name] += plans
    assert len(found) == len(subjects)
    for subject in subjects:
        assert found[subject.name] == subject.candidates
        for plan in subject.candidates:
            triton_plans.complete(subject.kernel, plan)
        if subject.kernel == "update":
            phased = {"rows": 2, "block": 256, "pieces": 2, "warps": 1, "registers": 80, "cache": "evict_last"}
            assert (phased in subject.candidates) == (subject.size[0] >= 2048)
        if subject.kernel == "topk_half":
            n, k = subject.size
            full = [triton_topk_plans.Plan(**plan) for plan in subject.candidates]
            top, vec = triton_topk_plans.triton.next_power_of_2(k), 16 // subject.dtype.itemsize
            assert all(triton_topk_plans.check_halves(plan, top, n, vec) is None for plan in full)
            assert {16, 32} <= {plan.rows for plan in full}
