"""Modules whose forward becomes a graph, because no submodule starts or ends at the MLP inside."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Block, Up, ids
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_structure

import memrewrite
from memrewrite.errors import CheckpointError, ModelError, SelectError
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost, Trace, _function, _refuse_unknown_weights
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_from_json
from memrewrite.plans import Plan

D, HIDDEN, VOCAB = 32, 48, 64


class Bare(nn.Module):
    """Attention, an MLP of bare parameters with functional dropout, an MLP that is a module; called with more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Parameter(torch.randn(D, HIDDEN) * 0.1), nn.Parameter(torch.randn(HIDDEN, D) * 0.1)
        self.bias, self.mlp = nn.Parameter(torch.randn(HIDDEN) * 0.1), Up()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> tuple[Tensor]:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + scale * self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        hidden = F.gelu(torch.einsum("bsd,df->bsf", self.norm2(x), self.up) + self.bias)
        x = x + torch.einsum("bsf,fd->bsd", F.dropout(hidden, 0.2, self.training), self.down)
        return (x + self.mlp(self.norm3(x)),)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.blocks = nn.ModuleList([Bare(), Bare()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            (x,) = block(x, None, scale=0.5)
        return self.head(x)


def recipe_for(placement: str, **where: Any) -> dict[str, Any]:
    rule = {"where": where or {"all": True}, "with": "memory_plus", "pool": "w", "placement": placement}
    return {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}


def rewritten(placement: str, **where: Any) -> nn.Module:
    model = Model().eval()
    assert memrewrite.apply(model, recipe_for(placement, **where), ids()).ok
    return model


def other_ids() -> Tensor:
    return torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))


def test_inspect_reports_which_module_becomes_a_graph() -> None:
    bindings = {site.path: site.bindings[0] for site in memrewrite.inspect(Model().eval(), ids()).sites}
    assert {path: b.kind for path, b in bindings.items()} == {
        "blocks.0": "graph", "blocks.0.mlp": "module", "blocks.1": "graph", "blocks.1.mlp": "module",
    }  # fmt: skip
    assert bindings["blocks.0"].exit == "blocks.0"
    assert "no single module" in bindings["blocks.0"].why


def test_the_plan_binds_other_mlps_inside_to_the_same_graph() -> None:
    plan = memrewrite.plan(Model().eval(), recipe_for("parallel"), ids())
    assert {s.site.bindings[0].kind for s in plan.substitutions} == {"graph"}
    alone = memrewrite.plan(Model().eval(), recipe_for("parallel", path="*.mlp"), ids())
    assert {s.site.bindings[0].kind for s in alone.substitutions} == {"module"}


def test_in_parallel_no_bit_changes_in_eval_and_train_mode() -> None:
    plain, model = Model().eval(), rewritten("parallel")
    assert set(plain.state_dict()) <= set(model.state_dict())
    for batch in (*ids(), other_ids()):
        assert torch.equal(model(batch), plain(batch))
    torch.manual_seed(3)
    wanted = plain.train()(*ids())
    torch.manual_seed(3)
    assert torch.equal(model.train()(*ids()), wanted)


def test_replaced_weights_are_removed() -> None:
    names = set(rewritten("replace").state_dict())
    assert not {"blocks.0.up", "blocks.0.down", "blocks.0.bias", "blocks.0.mlp.up.weight"} & names
    assert "blocks.0.qkv.weight" in names


def test_only_the_chosen_of_two_is_replaced() -> None:
    names = set(rewritten("replace", regex=r"^blocks\.\d+$").state_dict())
    assert "blocks.0.up" not in names
    assert "blocks.0.mlp.up.weight" in names


def test_the_layers_train_and_so_does_the_rest() -> None:
    model = rewritten("replace").train()
    model(*ids()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters())


def test_a_rewritten_model_is_copied_compiled_and_cast() -> None:
    model = rewritten("parallel")
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        duplicate.blocks[0].up.zero_()
    assert not torch.equal(duplicate(*ids()), model(*ids()))  # each copy reads its own weights
    torch.testing.assert_close(torch.compile(model, backend="eager")(*ids()), model(*ids()))
    assert model.double()(*ids()).dtype == torch.float64


def test_hooks_on_the_module_still_fire() -> None:
    model, seen = rewritten("parallel"), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model(*ids())
    assert seen == [1]


def test_a_call_of_another_form_is_refused() -> None:
    block, x = rewritten("parallel").blocks[0], torch.randn(2, 4, D)
    with pytest.raises(ModelError, match=r"'blocks\.0' is a graph"):
        block(x, torch.ones(2), scale=0.5)
    with pytest.raises(ModelError, match=r"0\.5"):
        block(x, None, scale=0.7)
    with pytest.raises(ModelError, match="form"):
        block(x)


def test_a_failed_edit_is_reverted() -> None:
    model = Model().eval()
    model.blocks[1].memory = nn.Identity()
    before, keys = model(*ids()), set(model.state_dict())
    with pytest.raises(memrewrite.MemrewriteError, match="memory"):
        memrewrite.apply(model, recipe_for("parallel"), ids())
    assert type(model.blocks[0]) is Bare
    assert set(model.state_dict()) == keys
    assert torch.equal(model(*ids()), before)


@pytest.mark.parametrize("placement", ["parallel", "replace"])
def test_saved_and_loaded_without_capturing(placement: str, tmp_path: Path) -> None:
    model = rewritten(placement)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "memory" in name:
                p.add_(0.01)
    memrewrite.save(model, tmp_path / "out")
    loaded = memrewrite.load(tmp_path / "out", Model())
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert torch.equal(loaded(other_ids()), model(other_ids()))
    memrewrite.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / GRAPHS).read_text() == (tmp_path / "out" / GRAPHS).read_text()


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "torch.ops.aten", "math.__loader__", "builtins.eval", "torch.ops.a.b.c"]
)
def test_a_saved_graph_names_only_operators(target: str, tmp_path: Path) -> None:
    memrewrite.save(rewritten("parallel"), tmp_path / "out")
    data = json.loads((tmp_path / "out" / GRAPHS).read_text())
    nodes = data["hosts"][0]["traces"]["eval"]["nodes"]
    next(node for node in nodes if node[1] == "call_function")[2] = target
    with pytest.raises(CheckpointError, match=GRAPHS):
        hosts_from_json(json.dumps(data))


@pytest.mark.parametrize("name", ["two words", "a-b", "0", "naïve"])
def test_a_weight_may_have_any_name_that_source_code_can_have(name: str) -> None:
    host, module = _host_that_reads(name)
    _refuse_unknown_weights(module, host)
    assert torch.equal(_function(host.traces[True].graph)(module)[0], module.get_parameter(f"inner.{name}"))


@pytest.mark.parametrize("name", ['a"b', "a\\", "a\nb", "class", "\uff57", '"); raise SystemExit; ("'])
def test_a_weight_whose_name_source_code_cannot_have_is_refused(name: str) -> None:
    host, module = _host_that_reads(name)
    with pytest.raises(SelectError, match="cannot read a weight of the name"):
        _refuse_unknown_weights(module, host)


@pytest.mark.parametrize("target", ["inner", "inner.a.grad", "inner.__class__", "forward", "nothing", "inner._parameters.a"])
def test_a_graph_reads_only_weights(target: str) -> None:
    host, module = _host_that_reads("a")
    node = next(iter(host.traces[True].graph.nodes))
    node.target = target
    with pytest.raises(SelectError, match="no parameter or buffer"):
        _refuse_unknown_weights(module, host)


def _host_that_reads(name: str) -> tuple[GraphHost, nn.Module]:
    """A module with the weight `inner.name`, and a host whose graph returns it."""
    module = nn.Module()
    module.inner = nn.ParameterDict({name: torch.randn(3)})
    graph = fx.Graph()
    graph.output((graph.create_node("get_attr", f"inner.{name}", (), {}, "weight"),))
    trace = Trace(graph, tree_structure(((), {})), tree_structure(0), (), {})
    return GraphHost("a", {True: trace}, {}, frozenset()), module


def test_a_site_that_the_graph_does_not_contain_is_refused(tmp_path: Path) -> None:
    memrewrite.save(rewritten("parallel"), tmp_path / "out")
    text, model = (tmp_path / "out" / GRAPHS).read_text().replace('"blocks.1": [', '"elsewhere": ['), Model()
    plan = Plan.model_validate_json((tmp_path / "out" / "plan.json").read_text())
    with pytest.raises(SelectError, match=r"does not contain the MLP 'blocks\.1'"):
        substitute(model, plan, hosts=hosts_from_json(text))
    assert type(model.blocks[0]) is Bare


def test_an_mlp_of_the_root_module_cannot_become_a_graph() -> None:
    class Root(Bare):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    kinds = {site.bindings[0].kind for site in memrewrite.inspect(Root().eval(), (torch.randn(2, 5, D),)).sites}
    assert kinds == {"none", "module"}


def test_an_mlp_that_is_a_module_is_rewritten_without_the_graph() -> None:
    class Mixed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.last = Block(Up())

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                (x,) = block(x, None, scale=0.5)
            return self.head(self.last(x))

    model = Mixed().eval()
    before = model(*ids())
    report = memrewrite.apply(model, recipe_for("parallel"), ids())
    assert [s.site.bindings[0].kind for s in report.plan.substitutions].count("module") == 1
    assert torch.equal(model(*ids()), before)


def test_a_rewritten_model_is_not_rewritten_twice() -> None:
    with pytest.raises(ModelError):
        memrewrite.apply(rewritten("parallel"), recipe_for("parallel"), ids())
