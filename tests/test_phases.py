"""The phases of a call: each is measured from its beginning to the next one's, and they are in every report."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

import memrewrite
from memrewrite.phases import Phases
from memrewrite.report import Report


def test_a_phase_ends_where_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, processor = iter([1.0, 3.0, 3.0, 7.0]), iter([10.0, 11.0, 11.0, 19.0])
    monkeypatch.setattr("memrewrite.phases.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("memrewrite.phases.time.process_time", lambda: next(processor))
    begun: list[str] = []
    with Phases(begun.append) as phases:
        phases("one")
        phases("two")
        assert [phase.name for phase in phases.ended] == ["one"]
    assert begun == ["one", "two"]
    assert [(p.name, p.seconds, p.cpu_seconds) for p in phases.ended] == [("one", 2.0, 1.0), ("two", 4.0, 8.0)]
    phases.end()
    assert len(phases.ended) == 2


def test_an_error_ends_the_last_phase() -> None:
    phases = Phases()

    def fails() -> None:
        with phases:
            phases("one")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    assert [phase.name for phase in phases.ended] == ["one"]


@pytest.mark.parametrize("options", [{}, {"emit": "graph"}], ids=["module", "graph"])
def test_the_report_of_a_rewrite_has_its_phases(options: dict[str, Any]) -> None:
    model, inputs = tiny.named("modular")
    steps: list[str] = []
    report = memrewrite.apply(model, tiny.recipe("parallel"), inputs, step=steps.append, **options)
    names = [phase.name for phase in report.phases]
    assert names == steps
    after = {"coverage", "untouched", "frame", "sharing", "tokenwise", "gradient", "identity"}
    assert {f"check {name}" for name in {"null_train", "locality", *after}} <= set(names)
    assert all(phase.seconds >= 0 and phase.cpu_seconds >= 0 for phase in report.phases)
    assert sum(phase.seconds for phase in report.phases) <= report.seconds
    assert Report.model_validate_json(report.model_dump_json()).phases == report.phases


def test_a_report_of_an_earlier_version_has_no_phases() -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, tiny.recipe("parallel") | {"verify": "off"}, inputs)
    assert report.phases
    assert Report.model_validate(report.model_dump(exclude={"phases"})).phases == ()
