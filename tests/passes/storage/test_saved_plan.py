"""A saved plan is refused unless `memrewrite.plan` can have made it: nothing in it is looked up before it is checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_dirs
import tiny

import memrewrite
from memrewrite.errors import CheckpointError, ModelError
from memrewrite.passes.storage.manifest import read_manifest
from memrewrite.passes.storage.saved_plan import read_plan, read_report
from memrewrite.passes.verify_saved import verify_saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, inputs = tiny.named("llama")
    memrewrite.apply(model, tiny.recipe(verify="off"), inputs)
    return memrewrite.save(model, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def _set(*path: str | int, to: Any) -> Callable[[Any], object]:
    def change(value: Any) -> None:
        for part in path[:-1]:
            value = value[part]
        value[path[-1]] = to

    return change


def _as_peer(plan: Any) -> None:
    plan["substitutions"][0]["kind"] = "peer"
    del plan["substitutions"][0]["options"]["gate"]


FIRST = ("substitutions", 0)
SITE = (*FIRST, "site")
BINDING = (*SITE, "bindings", 0)
NAMES = ["forward", "__class__", "train", "training", "_modules", "x.y", "x y", "", "1", "class", "parameters", "ſ"]
PLANS: dict[str, tuple[Callable[[Any], object], str]] = {
    **{f"root {name!r}": (_set("root", to=name), "cannot be the name") for name in NAMES},
    "root of the model": (_set("root", to="model"), "already has an attribute"),
    "pool named forward": (lambda p: p["pools"].update(forward=p["pools"]["shared"]), "cannot be the name"),
    "pool named record": (lambda p: p["pools"].update(record=p["pools"]["shared"]), "cannot be the name"),
    "unused pool": (lambda p: p["pools"].update(other=p["pools"]["shared"]), "no layer reads"),
    "no pool": (lambda p: p["pools"].clear(), "no pool"),
    "layer without pool": (_set(*FIRST, "pool", to=None), "pool"),
    "unknown kind": (_set(*FIRST, "kind", to="os.system"), "unknown layer kind"),
    "two layers at a site": (lambda p: p["substitutions"].append(p["substitutions"][0]), "one site"),
    "unknown field": (_set("more", to=1), "more"),
    "text for a number": (_set("pools", "shared", "keys", to="8"), "keys"),
    "fraction for a number": (_set("pools", "shared", "keys", to=8.0), "keys"),
    "truth for a number": (_set("pools", "shared", "keys", to=True), "keys"),
    "pool above all sizes": (_set("pools", "shared", "keys", to=2**60), "entries"),
    "inputs that no layer reads": (_set("pools", "shared", "input_dim", to=16), "reads the input weights"),
    "inputs of zero": (_set("pools", "shared", "input_dim", to=0), "input_dim"),
    "inputs above all sizes": (_set("pools", "shared", "input_dim", to=2**60), "entries"),
    "no inputs for a layer that reads them": (_as_peer, "no input weights"),
    "option of another kind": (_set(*FIRST, "options", "nope", to=1), "options"),
    "option of another type": (_set(*FIRST, "options", "heads", to="2"), "options"),
    "option above all sizes": (_set(*FIRST, "options", "heads", to=2**60), "heads"),
    "more topk than keys": (_set(*FIRST, "options", "topk", to=1000), "topk"),
    "dtype hub": (_set(*SITE, "dtype", to="hub"), "no dtype"),
    "dtype of whole numbers": (_set(*SITE, "dtype", to="int8"), "no dtype of weights"),
    "dtype of a method": (_set(*SITE, "dtype", to="__class__"), "no dtype"),
    "axis": (_set(*SITE, "axis", to=10**6), "no axis"),
    "width of zero": (_set(*SITE, "d_model", to=0), "d_model"),
    "width below zero": (_set(*SITE, "d_in", to=-1), "d_in"),
    "width above all sizes": (_set(*SITE, "d_in", to=2**60), "d_in"),
    "another width": (_set(*SITE, "d_in", to=17), "shape"),
    "no parameters": (_set(*SITE, "parameters", to=[]), "no parameters"),
    "parameter of Python": (_set(*SITE, "parameters", to=["__class__.__init__"]), "no path"),
    "parameter that is missing": (_set(*SITE, "parameters", to=["model.nothing"]), "no weight"),
    "parameter that is a module": (_set(*SITE, "parameters", to=["model.layers"]), "no weight"),
    "path with an empty part": (_set(*SITE, "path", to="a..b"), "no path"),
    "path with a line break": (_set(*SITE, "path", to="a\nb"), "no path"),
    "long path": (_set(*SITE, "path", to="a" * 5000), "no path"),
    "no bindings": (_set(*SITE, "bindings", to=[]), "no binding"),
    "exit elsewhere": (_set(*BINDING, "exit", to="model.norm"), "left at"),
    "exit of Python": (_set(*BINDING, "exit", to="__class__"), "no path"),
    "exit that is missing": (lambda p: _both_ends(p, "model.nothing"), "no module"),
    "exit that is no module": (lambda p: _both_ends(p, "config"), "no module"),
    "entries": (_set(*BINDING, "entries", to=[]), "entries"),
    "widths": (_set(*BINDING, "widths", to=[1, 2, 3]), "widths"),
    "takes an expression": (_set(*BINDING, "takes", to="x; import os"), "argument"),
    "takes a far position": (_set(*BINDING, "takes", to=10**9), "takes"),
    "gives": (_set(*BINDING, "gives", to=[5, 2]), "gives"),
    "binding none": (_set(*BINDING, "kind", to="none"), "cannot be edited"),
    "binding graph": (_set(*BINDING, "kind", to="graph"), "graph"),
    "another format": (_set("memrewrite", to=2), "memrewrite"),
}


def _both_ends(plan: Any, path: str) -> None:
    plan["substitutions"][0]["site"]["bindings"][0].update(exit=path, entries=[path])


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_memrewrite_cannot_have_made(case: str, out: Path) -> None:
    change, message = PLANS[case]
    saved_dirs.edit_saved(out, "plan.json", change)
    model = tiny.llama()
    before = tiny.Photograph(model)
    for run in (lambda: memrewrite.load(out), lambda: memrewrite.load(out, model), lambda: verify_saved(out)):
        with pytest.raises(CheckpointError, match=message) as caught:
            run()
        assert caught.value.where
    assert not before.differences(tiny.Photograph(model))


@pytest.mark.parametrize(("axis", "message"), [(0, "was made for"), (1, "was made for"), (3, "axis 3"), (-4, "axis -4")])
def test_a_plan_with_another_axis_is_refused_in_the_forward(axis: int, message: str, out: Path) -> None:
    """It fits the weights: only the input shows that the features are on another axis."""
    saved_dirs.edit_saved(out, "plan.json", _set(*SITE, "axis", to=axis))
    with pytest.raises(ModelError, match=message):
        memrewrite.load(out)(tiny.tokens())


TEXTS = {
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "equal keys": b'{"memrewrite": 1, "memrewrite": 1}',
    "not a number": b'{"memrewrite": NaN}',
    "another encoding": '{"memrewrite": 1}'.encode("utf-16"),
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "a long number": b"9" * 5000,
}


@pytest.mark.parametrize("name", ["plan.json", "report.json", "config.json"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_is_no_json(text: str, name: str, out: Path) -> None:
    (out / name).write_bytes(TEXTS[text])
    saved_dirs.correct_manifest(out)
    with pytest.raises(CheckpointError, match=name):
        memrewrite.load(out)


def test_the_report_is_of_the_plan(out: Path) -> None:
    files = read_manifest(out)
    assert read_report(files).plan == read_plan(files)
    saved_dirs.edit_json(out / "report.json", lambda report: report["plan"].update(captured="otherwise"))
    saved_dirs.correct_manifest(out)
    with pytest.raises(CheckpointError, match="another plan"):
        memrewrite.load(out)


def test_the_plans_of_all_models_are_accepted(tmp_path: Path) -> None:
    for name in tiny.MODELS:
        for placement in ("replace", "parallel"):
            out = memrewrite.save(tiny.rewritten(name, placement)[0], tmp_path / name / placement)
            assert read_plan(read_manifest(out)) == tiny.plan_of(name, placement)
