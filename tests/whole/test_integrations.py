"""A rewritten model still supports what models do: generate, save, copy, compile, export, train, gradient checkpointing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn
from torch.func import functional_call

import memrewrite
from memrewrite.layers.contract import MemoryLayer
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import substitute

PLACEMENTS = ["replace", "parallel"]
BOTH_KINDS = ["modular", "loose"]  # an MLP that is one module, and one that spans several


def rewritten(name: str, placement: str = "replace") -> tuple[Any, dict[str, Any]]:
    """A rewritten model whose layers all have nonzero output."""
    model, inputs = tiny.rewritten(name, placement)
    tiny.open_up(model)
    return model, inputs


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    out = model(**inputs)
    (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- generating


def generated(model: Any, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(tiny.tokens(), max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    return tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_in_parallel_the_same_text_is_generated(name: str) -> None:
    before = generated(tiny.named(name)[0])
    assert torch.equal(generated(tiny.rewritten(name, "parallel")[0]), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_cache_changes_no_token(name: str, placement: str) -> None:
    model, _ = rewritten(name, placement)
    assert torch.equal(generated(model), generated(model, use_cache=False))


# --------------------------------------------------------------------------------------------------- saving, copying


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_save_pretrained_writes_one_table(placement: str, tmp_path: Path) -> None:
    model, _ = rewritten("llama", placement)
    model.save_pretrained(tmp_path)
    names = list(safe_open(tmp_path / "model.safetensors", "pt").keys())
    assert [name for name in names if "values" in name] == ["memory.shared.values"]
    assert set(names) == set(model.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["modular", "sequential", "loose", "shared", "bert"])
def test_a_copy_is_independent_and_still_shares_its_table(name: str, placement: str, copier: Any) -> None:
    model, inputs = rewritten(name, placement)
    before, copied = tiny.values_of(model, inputs), copier(model)
    assert torch.equal(tiny.values_of(copied, inputs), before)
    assert {id(m.pool) for m in copied.modules() if isinstance(m, MemoryLayer)} == {id(copied.memory.shared)}
    with torch.no_grad():
        copied.memory.shared.values.neg_()
    assert torch.equal(tiny.values_of(model, inputs), before)
    assert not torch.equal(tiny.values_of(copied, inputs), before)


def test_after_a_failed_forward_a_model_can_be_copied() -> None:
    model, inputs = rewritten("loose", "parallel")
    before = tiny.values_of(model, inputs)
    handle = model.blocks[1].up.register_forward_hook(lambda *_: 1 / 0)  # after the input was passed on
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()
    assert torch.equal(tiny.values_of(copy.deepcopy(model), inputs), before)


# -------------------------------------------------------------------------------------------------- compile, export


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["modular", "loose", "llama", "bert"])
def test_compiles_whole_and_once(name: str, placement: str) -> None:
    model, inputs = rewritten(name, placement)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(tiny.values_of(compiled, inputs), tiny.values_of(model, inputs))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradients() -> None:
    model, inputs = rewritten("loose", "parallel")
    expected = gradients(copy.deepcopy(model), inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_inductor(placement: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(tiny.Block(8, lambda d: tiny.MLP(d, 16), 0.0), tiny.Loose(8, 0.0)).eval()
    x = torch.randn(2, 3, 8)
    memrewrite.apply(model, tiny.recipe(placement, verify="off"), (x,))
    tiny.open_up(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["modular", "loose", "bert"])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exports_with_one_table(name: str, placement: str, strict: bool) -> None:
    model, inputs = rewritten(name, placement)
    program = torch.export.export(model, (), inputs, strict=strict)
    assert torch.equal(tiny.values_of(program.module(), inputs), tiny.values_of(model, inputs))
    assert [key for key in program.state_dict if key.endswith("values")] == ["memory.shared.values"]
    copy.deepcopy(model)  # tracing must not leave objects that cannot be copied


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_trainer(placement: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, _ = rewritten("llama", placement)
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": row, "labels": row} for row in tiny.tokens(4)]
    options = {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to=[], **options)
    result = Trainer(model, arguments, train_dataset=data).train()
    assert result.global_step == 2
    after = model.state_dict()
    assert not [name for name in after if "memory" in name and torch.equal(before[name], after[name])]
    names = list(safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt").keys())
    assert [name for name in names if "values" in name] == ["memory.shared.values"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, placement: str, reentrant: bool) -> None:
    model, inputs = rewritten(name, placement)
    model.config.hidden_dropout_prob = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    expected = gradients(copy.deepcopy(model), inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, inputs)
    for name_, grad in expected.items():
        torch.testing.assert_close(found[name_], grad)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_alone_learns_with_checkpointing(dtype: torch.dtype, reentrant: bool) -> None:
    """A frozen base, a fused table, clipping: recomputed activations change no bit; in bf16 parameters and tables are bf16."""
    results = []
    for recomputed in (False, True):
        model = tiny.llama().to(dtype)
        pool = {"keys": 8, "gradient": "fused"}
        recipe = tiny.recipe("parallel", pools={"shared": pool}, train="memory_only", verify="off")
        memrewrite.apply(model, recipe, {"input_ids": tiny.tokens()})
        tiny.open_up(model)
        if recomputed:
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(memrewrite.param_groups(model, 1e-2))
        memrewrite.fuse(optimizer, model)
        base = model.model.embed_tokens.weight.clone()
        for seed in range(3):
            ids = tiny.tokens(seed=seed)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            memrewrite.clip_grad_norm_(model, 1e-2)
            optimizer.step()
        assert torch.equal(model.model.embed_tokens.weight, base)
        results.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())
    assert results[0]["memory.shared.values"].dtype == dtype


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_after_gradient_checkpointing_a_model_can_be_copied(name: str) -> None:
    model, inputs = rewritten(name, "parallel")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    gradients(model, inputs)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_autocast(name: str) -> None:
    for placement in PLACEMENTS:
        model, inputs = rewritten(name, placement)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, inputs)
        assert all(grad is not None and grad.isfinite().all() for grad in found.values())
        assert {grad.dtype for grad in found.values() if grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_functional_call(name: str) -> None:
    model, inputs = rewritten(name)
    other = {key: (value * 2).detach().requires_grad_() for key, value in model.named_parameters()}
    out = functional_call(model, other, (), inputs)
    out.square().mean().backward()
    model.load_state_dict(other, strict=False)
    expected = gradients(model, inputs)
    assert torch.equal(out, model(**inputs))
    assert all(torch.equal(value.grad, expected[key]) for key, value in other.items())


def test_state_and_optimizer_load_with_weights_only() -> None:
    model, inputs = rewritten("modular")
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, 1e-3))
    gradients(model, inputs)
    optimizer.step()
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other, _ = tiny.rewritten("modular")
    other.load_state_dict(saved["model"])
    resumed = torch.optim.AdamW(memrewrite.param_groups(other, 1e-3))
    resumed.load_state_dict(saved["optimizer"])
    for each, opt in ((model, optimizer), (other, resumed)):
        opt.zero_grad()
        gradients(each, inputs)
        opt.step()
    assert torch.equal(tiny.values_of(model, inputs), tiny.values_of(other, inputs))


def test_built_on_meta_and_filled() -> None:
    model, inputs = rewritten("llama")
    with torch.device("meta"):
        empty = tiny.llama()
    substitute(empty, tiny.plan_of("llama"), initialise=False).commit()
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(tiny.values_of(empty, inputs), tiny.values_of(model, inputs))
    assert empty.model.layers[0].mlp.pool.values is empty.memory.shared.values


def test_moves_to_another_dtype_as_a_whole() -> None:
    model, inputs = rewritten("loose", "parallel")
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert tiny.values_of(model, inputs).dtype == torch.float64


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_two_models_of_one_plan_are_independent(name: str) -> None:
    (one, inputs), (other, _) = rewritten(name, "parallel"), rewritten(name, "parallel")
    expected = tiny.values_of(one, inputs)
    other(ids=tiny.tokens(1, 3))
    assert torch.equal(tiny.values_of(one, inputs), expected)
    assert pools_of(one) is not pools_of(other)
