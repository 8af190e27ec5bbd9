"""Calls from several threads run one after another; a model in use in another thread is refused; other models are unaffected.

Threads meet at barriers and events, never after a time: `WAIT` only ends a test that hangs.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import ModelError
from memrewrite.passes.models import exclusive

WAIT = 120


class Gate(nn.Module):
    """Stops its forward, in other threads than the one that built it, until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.events = Events()

    def forward(self, x: Tensor) -> Tensor:
        if threading.get_ident() != self.events.builder:
            self.events.inside.set()
            assert self.events.go_on.wait(WAIT)
        return x


class Events:
    """Shared by all copies."""

    def __init__(self) -> None:
        self.builder, self.inside, self.go_on = threading.get_ident(), threading.Event(), threading.Event()

    def __deepcopy__(self, _: Any) -> Events:
        return self


def gated() -> tuple[nn.Module, Events]:
    model = tiny.modular()
    gate = Gate()
    model.blocks[1].gate = gate
    model.blocks[1].register_forward_pre_hook(lambda module, args: (module.gate(*args),))
    return model, gate.events


def apply(model: nn.Module, placement: str = "parallel", inputs: Any = None, **options: Any) -> Any:
    return memrewrite.apply(model, tiny.recipe(placement), inputs or (tiny.tokens(),), **options)


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """The results of functions that begin at the same time, one thread each; the first exception is raised."""
    start = threading.Barrier(len(work))

    def begin(one: Callable[[], Any]) -> Any:
        start.wait(WAIT)
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(WAIT) for future in [pool.submit(begin, one) for one in work]]


def facts(report: Any) -> Any:
    """What must be the same in every thread: the checks, and the outputs with random values in the table's place."""
    model = report.model
    tiny.open_up(model)
    with torch.no_grad():
        return [(c.name, c.outcome, c.number) for c in report.checks], model(tiny.tokens()).tolist()


# ----------------------------------------------------------------------------------------------------- several calls at once

BUILDERS: tuple[Callable[[], nn.Module], ...] = (
    tiny.modular,
    tiny.sequential,
    lambda: tiny.modular(dropout=0.5),
    lambda: tiny.loose(dropout=0.5),
)


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("placement", ["parallel", "replace"])
def test_applies_at_once_have_the_results_of_one_after_another(threads: int, placement: str) -> None:
    builders = BUILDERS[-threads:]
    expected = [facts(apply(build(), placement)) for build in builders]
    streams, state = (sys.stdout, sys.stderr), torch.get_rng_state()
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    for _ in range(3):
        models = [build() for build in builders]
        state = torch.get_rng_state()
        reports = in_threads(*(lambda model=model: apply(model, placement) for model in models))
        assert torch.equal(state, torch.get_rng_state())
        assert (sys.stdout, sys.stderr) == streams
        assert (warnings.filters, logging.root.manager.disable) == (filters, disabled)
        assert [facts(report) for report in reports] == expected


def test_inspect_plan_apply_and_load_at_once(tmp_path: Any) -> None:
    saved = memrewrite.save(apply(tiny.modular()).model, tmp_path / "out")
    models = [tiny.modular() for _ in range(4)]
    inputs = (tiny.tokens(),)
    found, plan, report, loaded = in_threads(
        lambda: memrewrite.inspect(models[0], inputs),
        lambda: memrewrite.plan(models[1], tiny.recipe(), inputs),
        lambda: apply(models[2]),
        lambda: memrewrite.load(saved, models[3]),
    )
    assert (len(found.sites), len(plan.substitutions), report.ok) == (3, 3, True)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), report.model(*inputs))


def test_two_applies_to_one_model_rewrite_it_once() -> None:
    model = tiny.modular()

    def outcome() -> str:
        try:
            return str(apply(model).ok)
        except ModelError as error:
            return error.what

    first, second = sorted(in_threads(outcome, outcome))
    assert first == "True"
    assert "already" in second


def test_after_an_error_others_may_call() -> None:
    with pytest.raises(ModelError):
        memrewrite.inspect(tiny.modular(), (torch.ones(2),))
    assert in_threads(lambda: apply(tiny.modular()).ok) == [True]


def test_a_call_inside_of_a_call_on_the_same_model_is_refused() -> None:
    model = tiny.modular()
    with pytest.raises(ModelError, match="is working on this model already"):
        apply(model, step=lambda _: memrewrite.inspect(model, (tiny.tokens(),)))
    assert not model._forward_pre_hooks
    apply(model, step=lambda _: memrewrite.inspect(tiny.modular(), (tiny.tokens(),)))


# ----------------------------------------------------------------------------------------------- a model in another thread


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, nn.Sequential, lambda m: torch.compile(m, backend="eager")])
def test_a_model_that_runs_in_another_thread_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, events = gated()
    with torch.no_grad():
        expected = model(tiny.tokens())
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(wrap(model), tiny.tokens())
            assert events.inside.wait(WAIT)
            try:
                with pytest.raises(ModelError, match="running in another thread"):
                    apply(model)
            finally:
                events.go_on.set()
            assert torch.equal(running.result(WAIT), expected)
    assert not model._forward_pre_hooks
    assert not hasattr(model, "memory")
    assert apply(model).ok


def test_a_part_that_runs_in_another_thread_is_refused() -> None:
    model, events = gated()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model.blocks[1], torch.zeros(2, 5, tiny.WIDTH))
        assert events.inside.wait(WAIT)
        with pytest.raises(ModelError, match="running in another thread"):
            apply(model)
        events.go_on.set()
        running.result(WAIT)


@pytest.mark.parametrize("stage", ["capturing", "locating", "checking", "substituting", "verifying"])
def test_a_forward_in_another_thread_during_apply_is_refused_and_changes_nothing(stage: str) -> None:
    expected = facts(apply(tiny.modular()))
    model, refused = tiny.modular(), list[ModelError]()

    def forward() -> None:
        with pytest.raises(ModelError, match="while memrewrite works on it in another thread") as caught:
            model(tiny.tokens())
        refused.append(caught.value)

    report = apply(model, step=lambda name: in_threads(forward) if name.startswith(stage) else None)
    assert len(refused) == 1
    assert facts(report) == expected
    assert not model._forward_pre_hooks
    in_threads(lambda: model(tiny.tokens()))  # runs again


def test_a_copy_made_meanwhile_runs_in_every_thread() -> None:
    model, copies = tiny.modular(), list[nn.Module]()
    apply(model, step=lambda name: copies.append(copy.deepcopy(model)) if name.startswith("capturing") else None)
    in_threads(lambda: copies[0](tiny.tokens()))


class Rewriting(nn.Module):
    """Calls memrewrite in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.modular()

    def forward(self, x: Tensor) -> Tensor:
        if "memory" not in self.inner._modules:
            memrewrite.apply(self.inner, tiny.recipe("parallel"), (x,))
        return self.inner(x)


def test_a_forward_may_rewrite_a_part_that_does_not_run() -> None:
    model = Rewriting()
    assert model(tiny.tokens()).shape == (2, 5, tiny.VOCABULARY)
    assert "memory" in model.inner._modules


def test_memrewrite_in_a_forward_of_the_same_model_is_refused() -> None:
    model = tiny.modular()
    model.blocks[0].register_forward_pre_hook(lambda *_: apply(model))
    with pytest.raises(ModelError, match="inside of a forward of this model"):
        model(tiny.tokens())


# ------------------------------------------------------------------------------------------------------ other models, meanwhile


class Other(nn.Module):
    """A model of another thread. It has no GELU: `torch.export` switches oneDNN off in all threads while it traces."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(F.relu(self.up(x))))


@pytest.mark.parametrize("compiled", [False, True])
def test_another_model_computes_the_same_bits_meanwhile(compiled: bool) -> None:
    other, x = Other().eval(), torch.randn(4, 16)
    call = torch.compile(other, backend="eager") if compiled else other
    with torch.no_grad():
        expected = call(x)
    done, wrong, ran = threading.Event(), list[int](), [0]
    graphs = [torch.fx.symbolic_trace(Other().eval()) for _ in range(2)]  # here: compiled code refuses to run meanwhile

    def loop() -> None:
        with torch.no_grad():
            while not done.is_set() or ran[0] < 5:
                ran[0] += 1
                if not torch.equal(call(x), expected):
                    wrong.append(ran[0])

    def rewrite() -> Any:
        try:
            return [facts(apply(tiny.modular())), apply(graphs.pop(), inputs=(x,)).ok]
        finally:
            done.set()

    alone = rewrite()
    done.clear()
    _, together = in_threads(loop, rewrite)
    assert not wrong
    assert together == alone


def test_dropout_and_prints_of_another_thread_work_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    other, x, done = Other().train(), torch.ones(64, 16), threading.Event()
    shares = list[float]()

    def train() -> None:
        while not done.is_set() or len(shares) < 5:
            shares.append(float((other.dropout(x) == 0).float().mean()))
            print("other thread", file=sys.stdout)
            print("other thread", file=sys.stderr)
            warnings.warn("other thread", stacklevel=1)

    def rewrite() -> None:
        try:
            apply(tiny.modular(dropout=0.0))
        finally:
            done.set()

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        in_threads(train, rewrite)
    assert all(0.4 < share < 0.6 for share in shares)
    printed = capsys.readouterr()
    assert (printed.out.count("other thread\n"), printed.err.count("other thread\n")) == (len(shares), len(shares))


def test_compiling_in_another_thread_works_meanwhile() -> None:
    x = torch.randn(4, 16)
    others = [Other().eval() for _ in range(3)]
    with torch.no_grad():
        expected = [other(x) for other in others]

        def compile_all() -> list[Tensor]:
            with torch.no_grad():
                return [torch.compile(other, backend="eager")(x) for other in others]

        outputs, *reports = in_threads(compile_all, lambda: apply(tiny.modular()), lambda: apply(tiny.loose()))
    assert all(map(torch.equal, outputs, expected))
    assert all(report.ok for report in reports)


def test_our_backend_in_another_thread_works_meanwhile() -> None:
    model, plain = tiny.modular(), tiny.modular()
    backend = memrewrite.backend(tiny.recipe("parallel"), model=model, then="eager")

    def run() -> Tensor:
        with torch.no_grad():
            return torch.compile(model, backend=backend)(tiny.tokens())

    out, report = in_threads(run, lambda: apply(plain))
    assert report.ok
    with torch.no_grad():
        assert torch.allclose(out, plain(tiny.tokens()), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- the decorator


def test_every_public_function_that_captures_or_edits_is_exclusive() -> None:
    from memrewrite.passes import pipeline, verify_saved
    from memrewrite.passes.onnx import export
    from memrewrite.passes.onnx.check import check
    from memrewrite.passes.storage.load import load

    functions = [getattr(pipeline, name) for name in ("inspect", "survey", "explain", "plan", "apply")]
    functions += [verify_saved.verify_saved, export.export_onnx, check.check_onnx, load]
    assert all(hasattr(function, "__wrapped__") for function in functions)


@pytest.mark.parametrize("model", [None, nn.Module, torch.relu, "model", 3])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="not an nn"):
        memrewrite.inspect(model, (tiny.tokens(),))


def test_the_guard_of_a_model_is_gone_after_an_interrupt() -> None:
    model = tiny.modular()

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(model, step=interrupt)
    assert not model._forward_pre_hooks
    assert in_threads(lambda: exclusive._LOCK.acquire(blocking=False) and (exclusive._LOCK.release() or "free")) == ["free"]
