"""A live model as one graph, compared with the live model: `emit="graph"`, and ONNX."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import mixtures
import pytest
import torch
from families import VOCAB, Block, Fused, Stack, Up
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import CaptureError, CheckpointError, ExportError

INPUTS = {"ids": families.tokens(2, 5)}


class LastToken(Stack):
    """Selects by a list of numbers, which is a constant tensor of the graph, and adds a tensor made in the forward."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x[:, [-1]] + torch.tensor([0.5] * VOCAB)


class Scoring(mixtures.AllExperts):
    """A mixture that also returns its router's probabilities, as models do that add a loss of them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, mixtures.D)
        scores = self.router(flat).softmax(-1)
        weights, chosen = scores.topk(mixtures.CHOSEN, -1)
        return self.routed(flat, weights, chosen).view(x.shape), scores


class Scores(Block):
    """A block that returns its mixture's scores, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x + self.attention(self.norm1(x))
        mixed, scores = self.mlp(self.norm2(x))
        return x + mixed, scores


class WithScores(Stack):
    """Returns logits, and what else its blocks return."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, scores = self.embed(ids), []
        for block in self.blocks:
            x, found = block(x)
            scores.append(found)
        return self.head(x), torch.stack(scores)


MODELS: dict[str, Any] = {
    "constants": lambda: LastToken(lambda: Block(Up())),
    "one matrix for attention and MLP": lambda: Stack(Fused),
    "one matrix, gated": lambda: Stack(lambda: Fused(gated=True)),
    "scores are returned": lambda: WithScores(lambda: Scores(Scoring())),
}


def made(build: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build()
    return model.eval()


def recipe(placement: str) -> dict[str, Any]:
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "shared", "placement": placement}
    return {"memrewrite": 1, "pools": {"shared": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}


def values(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        out = model(**copy.deepcopy(INPUTS))
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("placement", ["parallel", "replace"])
@pytest.mark.parametrize("name", MODELS)
def test_what_else_reads_inside_of_an_mlp_stays(name: str, placement: str, tmp_path: Path) -> None:
    model = made(MODELS[name])
    before = values(model)
    report = memrewrite.apply(model, recipe(placement), INPUTS, emit="graph")
    assert report.ok
    assert len(report.plan.substitutions) == 2
    after = values(report.model)
    assert torch.equal(after[0], before[0]) == (placement == "parallel")
    assert [t.shape for t in after] == [t.shape for t in before]
    assert report.checks[0].name == "capture"
    assert report.checks[0].number == 0
    memrewrite.save(report.model, tmp_path / "saved")
    again = values(memrewrite.load(tmp_path / "saved", trust_code=True))
    assert all(torch.equal(x, y) for x, y in zip(again, after, strict=True))
    memrewrite.export_onnx(report.model, tmp_path / "model.onnx", INPUTS)


class Penalized(Block):
    """An MLP on flattened tokens, whose flat output is also read by a penalty that the block returns."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x + self.attention(self.norm1(x))
        flat = self.mlp(self.norm2(x).flatten(0, 1))
        return x + flat.view(x.shape), flat.square().mean(-1)


@pytest.mark.parametrize("placement", ["parallel", "replace"])
def test_all_readers_of_the_output_read_the_layer(placement: str) -> None:
    """The flat output and its view are one value; the rewritten graph computes what the rewritten module computes."""
    wanted = recipe(placement)
    wanted["replace"][0]["init"] = {"output": 0.5}
    outputs = []
    for emit in ("module", "graph"):
        report = memrewrite.apply(made(lambda: WithScores(lambda: Penalized(Up()))), wanted, INPUTS, emit=emit)  # type: ignore[arg-type]
        outputs.append(values(report.model))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


class Asks(Stack):
    """Computes something else while it is traced."""

    def __init__(self, change: float) -> None:
        super().__init__(lambda: Block(Up()))
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits * (1 + self.change) if torch.compiler.is_exporting() else logits


def test_a_program_that_computes_something_else_than_the_model_is_refused_unless_allowed(tmp_path: Path) -> None:
    model = made(lambda: Asks(0.22))
    file = tmp_path / "model.onnx"
    for call in (
        lambda: memrewrite.apply(model, recipe("parallel"), INPUTS, emit="graph"),
        lambda: memrewrite.export_onnx(model, file, INPUTS),
    ):
        with pytest.raises((CaptureError, ExportError), match=r"something else than the model: its outputs are 2\.2e-01 away"):
            call()
    assert not file.exists()
    report = memrewrite.apply(model, recipe("parallel"), INPUTS, emit="graph", allow_inexact=True)
    assert (report.checks[0].name, report.checks[0].outcome) == ("capture", "skipped")
    assert "2.2e-01 away" in report.checks[0].sentence
    assert "exported program's" in report.checks[-1].sentence
    memrewrite.export_onnx(model, file, INPUTS, allow_inexact=True)
    assert file.exists()


def test_a_program_that_differs_by_rounding_is_accepted_and_says_so() -> None:
    report = memrewrite.apply(made(lambda: Asks(1e-6)), recipe("parallel"), INPUTS, emit="graph")
    assert report.checks[0].outcome == "passed"
    assert 0 < report.checks[0].number < 1e-5
    assert "by rounding from the live model's" in report.checks[0].sentence
    assert report.checks[-1].sentence == "the rewritten model's outputs are bit-equal to the exported program's"


class OfOneLength(Stack):
    """Cannot be exported with a dynamic sequence, or, where `batch` is fixed too, with any dynamic axis."""

    def __init__(self, *, batch: bool) -> None:
        super().__init__(lambda: Block(Up()))
        self.batch = batch

    def forward(self, ids: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # so that strict export, to which every size looks like an int, refuses it
        for size in ids.shape[1 - self.batch :]:
            if not isinstance(size, int):
                raise RuntimeError("no symbols, please")
        return super().forward(ids)


@pytest.mark.parametrize("batch", [False, True])
def test_where_torch_cannot_fewer_axes_are_dynamic(batch: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made(lambda: OfOneLength(batch=batch))
    report = memrewrite.apply(model, recipe("parallel"), INPUTS, emit="graph")
    assert report.plan.captured.endswith("non-strict" if batch else "dynamic first axes")
    assert report.model(ids=INPUTS["ids"]).shape == (2, 5, VOCAB)
    if not batch:
        assert report.model(ids=families.tokens(7, 5)).shape == (7, 5, VOCAB)
    exported = memrewrite.export_onnx(model, tmp_path / "model.onnx", INPUTS)
    assert exported.inputs[0].shape == ((2, 5) if batch else ("batch", 5))


@pytest.mark.parametrize(("dynamic", "shape"), [("all", ("batch", "sequence")), ("batch", ("batch", 5)), ("none", (2, 5))])
def test_fewer_dynamic_axes_on_request(dynamic: Any, shape: tuple[Any, ...], tmp_path: Path) -> None:
    exported = memrewrite.export_onnx(made(lambda: Stack(Fused)), tmp_path / "m.onnx", INPUTS, dynamic=dynamic)
    assert exported.inputs[0].shape == shape


def test_an_unknown_word_for_the_dynamic_axes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="`dynamic` is 'sequence'"):
        memrewrite.export_onnx(made(lambda: Stack(Fused)), tmp_path / "m.onnx", INPUTS, dynamic="sequence")  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "shape"), [(1, ("batch", 5)), (0, (2, 5))])
def test_where_torch_cannot_translate_fewer_axes_are_dynamic(
    most: int, shape: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    translate = torch.onnx.export

    def limited(program: Any, **options: Any) -> Any:
        if len(program.range_constraints) > most:
            raise RuntimeError("too many symbols")
        return translate(program, **options)

    monkeypatch.setattr(torch.onnx, "export", limited)
    exported = memrewrite.export_onnx(made(lambda: Stack(Fused)), tmp_path / "m.onnx", INPUTS)
    assert exported.inputs[0].shape == shape
    assert "too many symbols; fewer are tried" in caplog.text


def test_what_torch_can_translate_with_no_axes_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refused(program: Any, **_: Any) -> Any:
        tried.append(program)
        raise RuntimeError("no")

    monkeypatch.setattr(torch.onnx, "export", refused)
    with pytest.raises(ExportError, match="cannot translate the model"):
        memrewrite.export_onnx(made(lambda: OfOneLength(batch=True)), tmp_path / "m.onnx", INPUTS)
    assert len(tried) == 1


class Sparse(Stack):
    """Multiplies its logits by a sparse matrix, which is an attribute, a buffer, or a buffer that is not saved."""

    def __init__(self, how: str) -> None:
        super().__init__(lambda: Block(Up()))
        mix = torch.eye(VOCAB).mul(0.5).to_sparse()
        if how == "attribute":
            self.mix = mix
        else:
            self.register_buffer("mix", mix, persistent=how == "persistent")

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return torch.sparse.mm(self.mix, logits.reshape(-1, VOCAB).T).T.reshape(logits.shape)


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("how", ["attribute", "persistent", "computed"])
def test_sparse_tensors(how: str, emit: Any, tmp_path: Path) -> None:
    model = made(lambda: Sparse(how))
    before = values(model)
    report = memrewrite.apply(model, recipe("parallel"), INPUTS, emit=emit)
    assert torch.equal(values(report.model)[0], before[0])
    if emit == "graph":
        return
    if how == "persistent":
        with pytest.raises(CheckpointError, match=r"'mix' has the layout torch\.sparse_coo"):
            memrewrite.save(report.model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    else:
        memrewrite.save(report.model, tmp_path / "saved")
        loaded = memrewrite.load(tmp_path / "saved", made(lambda: Sparse(how)))
        assert torch.equal(values(loaded)[0], values(report.model)[0])
