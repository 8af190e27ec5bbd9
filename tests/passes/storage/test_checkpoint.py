"""A saved model loads again bit for bit, without capturing; damage is an error; a failed save changes nothing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn

import memrewrite
from memrewrite import atomic_write
from memrewrite.errors import CheckpointError, ModelError
from memrewrite.passes.capture import capture
from memrewrite.passes.rewrite import look
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.sources import python_file
from memrewrite.passes.storage import base_model, checkpoint, manifest, saved_plan, tensor_files
from memrewrite.passes.storage.base_model import Base

HF = ["llama", "bert", "gpt2", "t5", "albert", "vit"]
BY_HAND = {"modular": tiny.modular, "sequential": tiny.sequential, "loose": tiny.loose, "shared": tiny.shared}
PLACEMENTS = ["replace", "parallel"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def rewritten(name: str, placement: str = "replace") -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny.rewritten(name, placement)
    tiny.open_up(model)
    return model, inputs


def blank(build: Callable[[], nn.Module]) -> nn.Module:
    """The same architecture with other weights."""
    model = build()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    return model


def assert_same(one: nn.Module, other: nn.Module, inputs: dict[str, Any]) -> None:
    assert torch.equal(tiny.values_of(one, inputs), tiny.values_of(other, inputs))
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.values(), b.values(), strict=True))


def names_in(folder: Path) -> list[str]:
    return [name for file in sorted(folder.glob("model*.safetensors")) for name in names_of(file)]


def names_of(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", HF)
def test_a_hugging_face_model_loads_again(name: str, placement: str, out: Path) -> None:
    model, inputs = rewritten(name, placement)
    loaded = memrewrite.load(memrewrite.save(model, out))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(model, loaded, inputs)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_model_of_your_own_loads_into_a_base_that_you_pass(name: str, placement: str, out: Path) -> None:
    model, inputs = rewritten(name, placement)
    base = blank(BY_HAND[name])
    loaded = memrewrite.load(memrewrite.save(model, out), base)
    assert loaded is base
    assert_same(model, loaded, inputs)


def test_without_a_base_the_error_names_what_to_pass(out: Path) -> None:
    memrewrite.save(rewritten("modular")[0], out)
    with pytest.raises(CheckpointError, match=r"memrewrite\.load\(directory, model\)"):
        memrewrite.load(out)


CODE = """\
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))

def build():
    return nn.Sequential(Block(), Block())

def inputs():
    return (torch.ones(2, 3, 8),)
"""


@pytest.fixture
def of_code(out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, torch.Tensor]:
    code = out.with_name("model.py")
    code.write_text(CODE)
    model, x = python_file.build_from_file(code, "build"), torch.randn(2, 3, 8)
    memrewrite.apply(model, tiny.recipe(verify="off"), (x,))
    memrewrite.save(model, out, source=Base(kind="python", code=code, builder="build"))
    code.unlink()
    return model.eval(), x


def test_a_python_file_runs_when_it_is_trusted(out: Path, of_code: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = of_code
    assert torch.equal(memrewrite.load(out, trust_code=True)(x), model(x))


@pytest.mark.usefixtures("of_code")
def test_a_python_file_does_not_run_without_trust(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "build_from_file", lambda *_: pytest.fail("it ran"), raising=False)
    with pytest.raises(CheckpointError, match="--trust-code"):
        memrewrite.load(out)


def test_tied_weights_stay_tied_and_are_stored_once(out: Path) -> None:
    model, _ = rewritten("gpt2")
    memrewrite.save(model, out)
    assert not {"transformer.wte.weight", "lm_head.weight"} <= set(names_in(out))
    loaded: Any = memrewrite.load(out)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_weights_tied_later_are_tied_in_a_base_that_did_not(out: Path) -> None:
    model, inputs = rewritten("modular")
    base = blank(tiny.modular)
    base.head.weight = nn.Parameter(torch.zeros_like(base.head.weight))
    loaded: Any = memrewrite.load(memrewrite.save(model, out), base)
    assert loaded.head.weight is loaded.embed.weight
    assert_same(model, loaded, inputs)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_cast_after_it_was_built(name: str, out: Path) -> None:
    """The config still states float32; rotary frequencies, which are in no state, were cast too."""
    model, inputs = tiny.named(name)
    memrewrite.apply(model.to(torch.bfloat16), tiny.recipe(verify="off"), inputs)
    loaded = memrewrite.load(memrewrite.save(model, out))
    assert_same(model, loaded, {**inputs, "input_ids": tiny.tokens(2, 40)})
    assert [b.dtype for b in loaded.buffers()] == [b.dtype for b in model.buffers()]


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a part of another buffer": lambda positions: positions[:8],
    "another buffer": lambda positions: positions,
    "expanded": lambda positions: positions[:1].expand(3, -1),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_buffers_that_share_memory(view: str, fresh: bool, out: Path) -> None:
    model, inputs = rewritten("modular")
    model.register_buffer("view", VIEWS[view](model.positions))
    base: Any = blank(tiny.modular)
    made = VIEWS[view](base.positions)
    base.register_buffer("view", torch.zeros_like(made.contiguous()) if fresh else made)
    assert_same(model, memrewrite.load(memrewrite.save(model, out), base), inputs)


def test_other_dtypes_than_the_bases(out: Path) -> None:
    model, inputs = tiny.named("modular")
    recipe = tiny.recipe(verify="off", pools={"shared": {"keys": 8, "dtype": "bfloat16"}})
    memrewrite.apply(model.double(), recipe, inputs)
    loaded: Any = memrewrite.load(memrewrite.save(model, out), blank(tiny.modular))
    assert_same(model, loaded, inputs)
    assert loaded.memory.shared.values.dtype == torch.bfloat16


def test_shards_and_their_index(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 5000)
    model, inputs = rewritten("llama")
    memrewrite.save(model, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(names_in(out))
    assert all(name in names_of(out / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert len(set(index["weight_map"].values())) > 2
    assert_same(model, memrewrite.load(out), inputs)


def test_a_graph_module_loads_again_when_it_is_trusted(out: Path) -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(torch.export.export(model, (), inputs), tiny.recipe("parallel"), inputs)
    memrewrite.save(report.model, out)
    with pytest.raises(CheckpointError, match="--trust-code"):
        memrewrite.load(out)
    loaded = memrewrite.load(out, trust_code=True)
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))


def test_a_graph_that_returns_a_librarys_class_loads_in_a_process_that_has_not_imported_it(out: Path) -> None:
    model, inputs = tiny.named("bert")
    memrewrite.save(memrewrite.apply(model, tiny.recipe() | {"verify": "off"}, inputs, emit="graph").model, out)
    load = f"memrewrite.load({str(out)!r}, trust_code=True)"
    code = f"import memrewrite, torch; print(type({load}(input_ids=torch.ones(2, 5).long())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BaseModelOutput" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------ after loading


def test_loading_captures_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memrewrite.save(rewritten("llama")[0], out)
    for owner, name in [(capture, "capture"), (look, "capture"), (torch.export, "export")]:
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("it was captured"))
    memrewrite.load(out)


def test_one_table_in_the_file_and_after_loading(out: Path) -> None:
    model, _ = rewritten("llama")
    memrewrite.save(model, out)
    assert [name for name in names_in(out) if "values" in name] == ["memory.shared.values"]
    loaded: Any = memrewrite.load(out)
    pools = {id(layer.mlp.pool) for layer in loaded.model.layers}
    assert pools == {id(loaded.memory.shared)}


def test_what_was_loaded_saves_again(out: Path) -> None:
    model, inputs = rewritten("llama", "parallel")
    memrewrite.save(model, out)
    again = out.with_name("again")
    memrewrite.save(memrewrite.load(out), again)
    assert_same(model, memrewrite.load(again), inputs)
    files = lambda folder: {p.name for p in folder.iterdir()}  # noqa: E731
    assert files(again) == files(out)


def test_a_copy_saves_like_the_original(out: Path) -> None:
    model, inputs = rewritten("loose")
    copied = copy.deepcopy(model)
    memrewrite.save(copied, out)
    assert_same(model, memrewrite.load(out, blank(tiny.loose)), inputs)


def test_recipe_plan_and_report_are_saved_with_the_weights(out: Path) -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, tiny.recipe(), inputs)
    memrewrite.save(model, out)
    assert saved_plan.read_plan(manifest.read_manifest(out)) == report.plan
    assert saved_plan.read_report(manifest.read_manifest(out)).checks == report.checks
    assert memrewrite.plan(tiny.modular(), out / "recipe.yaml", inputs) == report.plan


@pytest.mark.parametrize("name", ["modular", "loose"])
def test_a_state_loads_into_a_second_rewritten_model(name: str) -> None:
    (model, inputs), (other, _) = rewritten(name), tiny.rewritten(name)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(model, other, inputs)


def test_a_loaded_model_can_be_trained(out: Path) -> None:
    model, inputs = rewritten("llama")
    loaded: Any = memrewrite.load(memrewrite.save(model, out)).train()
    loaded(**inputs).logits.square().mean().backward()
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.memory.shared.values.grad.any()


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_model_that_was_not_rewritten_is_not_saved(out: Path) -> None:
    with pytest.raises(ModelError, match="no memory pool"):
        memrewrite.save(tiny.modular(), out)
    assert not out.exists()


def test_a_model_on_meta_is_not_saved(out: Path) -> None:
    model, _ = rewritten("modular")
    with pytest.raises(CheckpointError, match="meta"):
        memrewrite.save(model.to("meta"), out)
    assert not list(out.parent.iterdir())


def test_a_base_on_meta_is_not_filled(out: Path) -> None:
    memrewrite.save(rewritten("modular")[0], out)
    with pytest.raises(CheckpointError, match="to_empty"):
        memrewrite.load(out, tiny.modular().to("meta"))


def test_a_base_of_another_architecture_is_refused(out: Path) -> None:
    memrewrite.save(rewritten("modular")[0], out)
    with pytest.raises(CheckpointError, match="does not fit"):
        memrewrite.load(out, tiny.loose())


def test_a_used_directory_is_refused_and_overwritten_whole(out: Path) -> None:
    model, inputs = rewritten("llama")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        memrewrite.save(model, out)
    for other in ({}, {"overwrite_any": out.parent}):
        with pytest.raises(CheckpointError, match="overwrite_any"):
            memrewrite.save(model, out, overwrite=True, **other)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    memrewrite.save(model, out, overwrite_any=out.parent / ".." / out.parent.name / "out")
    assert not (out / "mine.txt").exists()
    (out / "mine.txt").write_text("mine")
    memrewrite.save(model, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert_same(model, memrewrite.load(out), inputs)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_empty_directory_and_missing_parents_are_accepted(out: Path) -> None:
    model, _ = rewritten("modular")
    out.mkdir()
    memrewrite.save(model, out)
    memrewrite.save(model, out / "deep" / "er")
    assert manifest.is_saved(out / "deep" / "er")


@pytest.mark.parametrize("at", ["save_tensors", "write_manifest", "_set_default_permissions"])
def test_a_failure_changes_nothing(at: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rewritten("llama")
    memrewrite.save(model, out)
    monkeypatch.setattr(checkpoint, at, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match=r"'.*out' cannot be written: .*disk full"):
        memrewrite.save(model, out, overwrite=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert_same(model, memrewrite.load(out), inputs)


def test_after_a_failing_rename_the_old_directory_is_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rewritten("llama")
    memrewrite.save(model, out)
    real, renamed = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) == 3:  # after the attempt to rename onto nothing, and the move of the old directory
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(atomic_write, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="no"):
        memrewrite.save(model, out, overwrite=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert_same(model, memrewrite.load(out), inputs)


# ---------------------------------------------------------------------------------------------------------- damage


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        manifest = json.loads((out / "memrewrite.json").read_text())
        change(manifest)
        (out / "memrewrite.json").write_text(json.dumps(manifest))

    return edit


def _truncate_with_manifest(out: Path) -> None:
    """Truncated weights, and a manifest with their new size."""
    _truncate(out / "model.safetensors")
    size = (out / "model.safetensors").stat().st_size
    _edit_manifest(lambda m: m["files"]["model.safetensors"].update(bytes=size))(out)


def _changed_config(out: Path) -> None:
    (out / "config.json").write_text((out / "config.json").read_text().replace("32", "48"))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (lambda out: _truncate(out / "model.safetensors"), "model.safetensors"),
    "truncated weights, corrected manifest": (_truncate_with_manifest, "not a complete safetensors"),
    "changed plan": (lambda out: (out / "plan.json").write_text((out / "plan.json").read_text() + " "), "plan.json"),
    "changed config": (_changed_config, "config.json"),
    "missing weights": (lambda out: (out / "model.safetensors").unlink(), "missing"),
    "missing plan": (lambda out: (out / "plan.json").unlink(), "missing"),
    "added weights": (lambda out: (out / "x.safetensors").write_bytes((out / "model.safetensors").read_bytes()), "added"),
    "no manifest": (lambda out: (out / "memrewrite.json").unlink(), "memrewrite saved"),
    "empty manifest": (lambda out: (out / "memrewrite.json").write_text(""), "not a manifest"),
    "manifest of numbers": (lambda out: (out / "memrewrite.json").write_text("[1]"), "not a manifest"),
    "manifest without base": (_edit_manifest(lambda m: m.pop("base")), "not a manifest"),
    "manifest without sizes": (_edit_manifest(lambda m: m["files"]["plan.json"].pop("bytes")), "not a manifest"),
    "an unknown base": (_edit_manifest(lambda m: m["base"].update(kind="magic")), "not a manifest"),
    "another format": (_edit_manifest(lambda m: m.update(memrewrite=2)), "format 2"),
    "a file outside": (_edit_manifest(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}})), "no name"),
    "ties to nothing": (_edit_manifest(lambda m: m["tied"].update({"lm_head.weight": "nothing"})), "ties"),
    "ties of nothing": (_edit_manifest(lambda m: m["tied"].update({"nothing": "lm_head.weight"})), "ties"),
    "the weights of another file": (_edit_manifest(lambda m: m["files"].pop("model.safetensors")), "added"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_error(damage: str, out: Path) -> None:
    do, message = DAMAGES[damage]
    memrewrite.save(rewritten("llama")[0], out)
    do(out)
    with pytest.raises(CheckpointError, match=message) as caught:
        memrewrite.load(out)
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert caught.value.hint


def test_one_flipped_bit_in_the_weights_is_found_when_every_bit_is_read(out: Path) -> None:
    memrewrite.save(rewritten("llama")[0], out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    manifest.read_manifest(out)
    with pytest.raises(CheckpointError, match="changed"):
        manifest.read_manifest(out, every_bit=True)


def test_a_missing_tensor_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = rewritten("modular")
    real = checkpoint.named_once

    def without(model: nn.Module) -> Any:
        state, tied = real(model)
        state.pop("norm.bias")
        return state, tied

    monkeypatch.setattr(checkpoint, "named_once", without)
    memrewrite.save(model, out)
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        memrewrite.load(out, tiny.modular())


def test_the_record_of_the_pools_is_saved(out: Path) -> None:
    model, inputs = tiny.named("llama")
    memrewrite.apply(model, tiny.recipe(verify="off"), inputs)
    loaded = memrewrite.load(memrewrite.save(model, out))
    assert pools_of(loaded).record == pools_of(model).record
