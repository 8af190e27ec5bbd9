"""Why a place is an MLP or is not: one verdict for each path, with the rule, the node and the source line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import UserError
from memrewrite.explanation import Explanation
from memrewrite.passes.explain.explain import explained
from memrewrite.passes.graphs.provenance import line_at
from memrewrite.passes.rewrite.look import look_at

HERE = Path(__file__).name


class Leaky(tiny.MLP):
    """Hands its inner value out."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.act(self.up(x))
        return self.down(self.seen) + 0 * self.seen[..., : x.shape[-1]]


class Mixing(nn.Module):
    """Lets each token see its neighbours between the matrices."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(d, 2 * d), nn.Conv1d(2 * d, 2 * d, 3, padding=1), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.mix(self.up(x).transpose(1, 2)).transpose(1, 2)))


class Odd(nn.Module):
    """A gate of another width than the last matrix reads."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(d, 3 * d), nn.Linear(d, 1), nn.Linear(3 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Straight(nn.Module):
    """Two matrices and nothing between them; a third that never runs, and a module that computes nothing."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down, self.unused, self.drop = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, d), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.up(x)))


class Strange(tiny.Tiny):
    """A block of each kind, and a head that looks like an MLP and returns to nothing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        kinds: list[Any] = [lambda d: tiny.MLP(d, 2 * d), lambda d: Leaky(d, 2 * d), Mixing, Odd, Straight]
        super().__init__([tiny.Block(tiny.WIDTH, kind, 0.1) for kind in kinds])
        self.head = nn.Sequential(nn.Linear(tiny.WIDTH, 8), nn.GELU(), nn.Linear(8, tiny.VOCABULARY))  # type: ignore[assignment]


@cache
def seen(name: str) -> Any:
    """A model, its capture and what was located in it."""
    model, inputs = (Strange().eval(), {"ids": tiny.tokens()}) if name == "strange" else tiny.named(name)
    return (model, *look_at(model, inputs, lambda _: None)[:2])


def explanation(path: str, name: str = "strange") -> Explanation:
    return explained(*seen(name), path)


# ---------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("path", ["blocks.1.mlp", "blocks.2.mlp"])
def test_an_mlp(path: str) -> None:
    answer = explanation(path, "modular")
    assert answer.verdict == "mlp"
    assert [site.path for site in answer.sites] == [path]
    assert answer.sites[0].pattern == "plain"
    assert {finding.outcome for finding in answer.findings} == {"site"}


@pytest.mark.parametrize(
    "path", ["blocks.1.mlp.up", "blocks.1.mlp.act", "blocks.1.mlp.down.weight", "blocks.1.mlp.up.bias", "gelu_1", "linear_6"]
)
def test_part_of_an_mlp(path: str) -> None:
    """A matrix, what runs between them, a parameter, a graph node."""
    answer = explanation(path, "modular")
    assert answer.verdict == "part"
    assert [site.path for site in answer.sites] == ["blocks.1.mlp"]
    assert "`blocks.1.mlp`" in answer.summary


@pytest.mark.parametrize(("path", "count"), [("", 3), ("(root)", 3), ("blocks", 3), ("blocks.2", 1)])
def test_what_contains_mlps(path: str, count: int) -> None:
    answer = explanation(path, "modular")
    assert answer.verdict == "holds"
    assert len(answer.sites) == count


def test_an_mlp_spread_over_modules() -> None:
    assert explanation("blocks.0", "loose").verdict == "mlp"
    assert explanation("blocks.0", "loose").sites[0].bindings[0].kind == "span"
    for path in ("blocks.0.up", "blocks.0.down"):
        assert explanation(path, "loose").verdict == "part"
    assert explanation("blocks.0.attention", "loose").verdict == "no candidate"


def test_every_name_of_a_shared_module() -> None:
    for i in range(tiny.BLOCKS):
        answer = explanation(f"blocks.{i}.mlp", "shared")
        assert answer.verdict == "mlp"
        assert answer.sites[0].calls == tiny.BLOCKS


@pytest.mark.parametrize(
    ("path", "rule", "words"),
    [
        ("blocks.1.mlp", "closed", "also read outside"),
        ("blocks.2.mlp", "token by token", "`conv1d` is not known"),
        ("blocks.3.mlp", "arrangement", "not gated:"),
        ("head", "residual", "does not return to the residual stream"),
    ],
)
def test_refused(path: str, rule: str, words: str) -> None:
    """The rule, in words, the node it stopped at, the line of the model that made it, and what one could do."""
    answer = explanation(path)
    assert answer.verdict == "refused"
    assert words in answer.summary
    refused = next(f for f in answer.findings if f.outcome == "refused")
    assert refused.rule == rule
    assert refused.advice
    assert refused.node in {node.name for view in seen("strange")[1].segments for node in view.graph.nodes}
    if path != "head":
        assert HERE in refused.source
        assert refused.line in Path(__file__).read_text(encoding="utf-8")
        assert refused.line


def test_a_first_matrix_reports_the_outcome_of_the_last() -> None:
    answer = explanation("blocks.2.mlp.up")
    assert answer.verdict == "refused"
    assert [f.path for f in answer.findings if f.outcome == "refused"] == ["blocks.2.mlp.down"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("blocks.4.mlp", "with nothing nonlinear between"),
        ("blocks.0.attention.qkv", "computed from the input `ids`"),
        ("blocks.1.attention.qkv", "a sum of two streams"),
        ("blocks.0.attention.out", "`scaled_dot_product_attention` mixes several values"),
        ("blocks.0.norm1", "it computes no product with a weight"),
        ("embed", "`embedding` uses a weight, and is no product"),
        ("gelu", ""),
        ("add", "it is a `add`"),
    ],
)
def test_no_candidate(path: str, words: str) -> None:
    answer = explanation(path)
    assert answer.verdict == ("part" if path == "gelu" else "no candidate")
    assert words in answer.summary or any(words in f.reason for f in answer.findings)
    assert all(f.rule and f.advice and f.node for f in answer.findings if f.outcome == "never")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("blocks.4.mlp.unused", "did not run on these inputs"),
        ("blocks.4.mlp.unused.weight", "is not used in this forward"),
        ("blocks.4.mlp.drop", ""),
    ],
)
def test_not_run(path: str, words: str) -> None:
    answer = explanation(path)
    assert answer.verdict == ("no candidate" if path.endswith("drop") else "not run")
    assert words in answer.summary


# -------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("path", "near"), [("mlp", "'blocks.0.mlp'"), ("blocks.9.mlp", "did you mean"), ("blocks.0.mlp.upp", "blocks.0.mlp.up")]
)
def test_an_unknown_path(path: str, near: str) -> None:
    with pytest.raises(UserError, match="there is no module, parameter or graph node") as raised:
        explanation(path, "modular")
    assert near in str(raised.value.hint)


def test_the_public_verb_and_its_json() -> None:
    model, inputs = tiny.named("modular")
    answer = memrewrite.explain(model, "blocks.0", inputs)
    assert Explanation.model_validate_json(answer.model_dump_json()) == answer


def test_an_exported_program_has_modules_parameters_and_nodes_too() -> None:
    model, inputs = tiny.named("modular")
    program = torch.export.export(model, (), inputs)
    before, locations, _ = look_at(program, None, lambda _: None)
    verdicts = {
        path: explained(program, before, locations, path).verdict for path in ("blocks.0.mlp", "blocks", "blocks.1.norm1")
    }
    assert verdicts == {"blocks.0.mlp": "mlp", "blocks": "holds", "blocks.1.norm1": "no candidate"}
    assert explained(program, before, locations, "blocks.0.mlp.up.weight").verdict == "part"


class Untraceable(tiny.Tiny):
    """Blocks that trace, in a model that does not."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if float(x.sum()) < 1e9 else x
        return self.head(self.norm(x))


def test_block_by_block() -> None:
    """Paths inside and outside of the blocks are explained by the graph that contains them."""
    torch.manual_seed(0)
    model = Untraceable([tiny.Block(tiny.WIDTH, lambda d: tiny.MLP(d, 2 * d), 0.0) for _ in range(2)]).eval()
    before, locations, _ = look_at(model, {"ids": tiny.tokens()}, lambda _: None)
    assert len(before.segments) > 1
    verdicts = {path: explained(model, before, locations, path).verdict for path in ("blocks.1.mlp", "blocks", "norm")}
    assert verdicts == {"blocks.1.mlp": "mlp", "blocks": "holds", "norm": "no candidate"}


def test_source_lines_are_read_where_they_can_be(tmp_path: Path) -> None:
    file = tmp_path / "odd:name.py"
    file.write_text("first\n  second  \n")
    assert line_at(f"{file}:2") == "second"
    assert [line_at(text) for text in (f"{file}:9", "nowhere.py:1", "<string>:3", "", "no number:x")] == [""] * 5


def test_every_near_miss_and_site_is_explained_as_located() -> None:
    """What `inspect` lists, `--why` gives: the same verdicts, the same reasons."""
    _, _, locations = seen("strange")
    assert locations.located.near_misses
    for miss in locations.located.near_misses:
        assert any(miss.reason in f.reason for f in explanation(miss.path).findings)
    assert all(explanation(site.path).verdict == "mlp" for site in locations.sites)
