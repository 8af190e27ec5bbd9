"""transformers loads what it or memrewrite saved of a rewritten model, with the memory, or refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

import memrewrite
from memrewrite.layers.pool import find_pools

PLACEMENTS = ["replace", "parallel"]
D, LAYERS = 16, 2

pytestmark = pytest.mark.filterwarnings("ignore")


def _small(config: str, **options: Any) -> Any:
    sizes = {"hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return getattr(transformers, config)(**{**sizes, **options})


def _mixtral() -> Any:
    more = {"vocab_size": tiny.VOCABULARY, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8}
    return transformers.MixtralForCausalLM(_small("MixtralConfig", **more)).eval()


def _qwen() -> Any:
    return transformers.Qwen3ForCausalLM(
        _small("Qwen3Config", vocab_size=tiny.VOCABULARY, num_key_value_heads=2, head_dim=8)
    ).eval()


def _wav2vec2() -> Any:
    more = {
        "conv_dim": (8, 8),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "vocab_size": tiny.VOCABULARY,
    }
    more |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2Model(_small("Wav2Vec2Config", **more)).eval()


def _whisper() -> Any:
    more = {"d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    more |= {
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "vocab_size": tiny.VOCABULARY,
        "num_mel_bins": 4,
        "max_source_positions": 8,
    }
    more |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**more)).eval()


def _clip() -> Any:
    return transformers.CLIPTextModel(_small("CLIPTextConfig", vocab_size=tiny.VOCABULARY, eos_token_id=2)).eval()


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(vocab_size=tiny.VOCABULARY, dim=D, hidden_dim=32, n_layers=2, n_heads=2)
    return transformers.DistilBertForMaskedLM(config).eval()


def _audio() -> dict[str, Any]:
    return {"input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(0))}


def _mels() -> dict[str, Any]:
    features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tiny.tokens(1, 4), "use_cache": False}


CASES: dict[str, tuple[Any, Any, str]] = {
    "llama": (*tiny.MODELS["llama"], "AutoModelForCausalLM"),
    "gpt2": (*tiny.MODELS["gpt2"], "AutoModelForCausalLM"),
    "qwen3": (_qwen, tiny.MODELS["llama"][1], "AutoModelForCausalLM"),
    "mixtral": (_mixtral, tiny.MODELS["llama"][1], "AutoModelForCausalLM"),
    "bert": (*tiny.MODELS["bert"], "AutoModel"),
    "albert": (*tiny.MODELS["albert"], "AutoModel"),
    "distilbert": (_distilbert, tiny.MODELS["bert"][1], "AutoModelForMaskedLM"),
    "clip": (_clip, tiny.MODELS["bert"][1], "AutoModel"),
    "t5": (*tiny.MODELS["t5"], "AutoModelForSeq2SeqLM"),
    "vit": (*tiny.MODELS["vit"], "AutoModel"),
    "wav2vec2": (_wav2vec2, _audio, "AutoModel"),
    "whisper": (_whisper, _mels, "AutoModelForSpeechSeq2Seq"),
}


def rewritten(name: str, placement: str = "parallel", **changes: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = CASES[name][0](), CASES[name][1]()
    memrewrite.apply(model, tiny.recipe(placement, verify="off", **changes), inputs)
    tiny.open_up(model)
    return model, inputs


def auto(name: str) -> Any:
    return getattr(transformers, CASES[name][2])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CASES)
def test_the_auto_class_loads_what_was_saved(name: str, placement: str, tmp_path: Path) -> None:
    model, inputs = rewritten(name, placement)
    expected = tiny.values_of(model, inputs)
    model.save_pretrained(tmp_path / "theirs")
    memrewrite.save(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded = auto(name).from_pretrained(tmp_path / folder)
        assert type(loaded) is type(model)
        assert torch.equal(tiny.values_of(loaded, inputs), expected)
        assert torch.equal(tiny.values_of(memrewrite.load(tmp_path / folder), inputs), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.values_of(auto(name).from_pretrained(tmp_path / "again"), inputs), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CASES)
def test_the_dtype_asked_for_is_that_of_all_parameters(name: str, placement: str, tmp_path: Path) -> None:
    model, inputs = rewritten(name, placement)
    model.save_pretrained(tmp_path)
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or []) | set(
        getattr(model, "_keep_in_fp32_modules", None) or []
    )
    loaded = auto(name).from_pretrained(tmp_path, dtype=torch.bfloat16)
    others = {n for n, p in loaded.named_parameters() if p.dtype != torch.bfloat16}
    assert not [n for n in others if not any(part in n.split(".") for part in kept)]
    assert not [n for n in others if n.startswith("memory.") or ".memory." in n]
    expected = dict(model.named_parameters())
    assert all(torch.equal(p, expected[n].to(p.dtype)) for n, p in loaded.named_parameters())
    half = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    assert tiny.values_of(loaded, half).isfinite().all()


def test_a_model_in_bfloat16_comes_back_in_it(tmp_path: Path) -> None:
    model = tiny.named("llama")[0].bfloat16()
    model.config.dtype = torch.bfloat16
    inputs = tiny.named("llama")[1]
    memrewrite.apply(model, tiny.recipe("replace"), inputs)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))


def test_shards_and_device_map(tmp_path: Path) -> None:
    model, inputs = rewritten("llama")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))
    assert torch.equal(tiny.values_of(memrewrite.load(tmp_path), inputs), tiny.values_of(model, inputs))


def test_another_head_and_none(tmp_path: Path) -> None:
    """The layers are the same; a head that was not saved starts random, as transformers does it."""
    model, inputs = rewritten("llama")
    hidden = model.model(**inputs)[0]
    model.save_pretrained(tmp_path / "causal")
    for kind in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        loaded = getattr(transformers, kind).from_pretrained(tmp_path / "causal")
        inner = loaded if kind == "AutoModel" else loaded.model
        assert torch.equal(inner(**inputs)[0], hidden)
        loaded.save_pretrained(tmp_path / kind)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert torch.equal(back.model(**inputs)[0], hidden)


def test_a_pipeline_runs_the_memory(tmp_path: Path) -> None:
    model, _ = rewritten("llama")
    model.save_pretrained(tmp_path)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path))
    assert find_pools(pipe.model) is not None
    out = pipe("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
    assert out.replace("w", " w").split() == [f"w{i}" for i in ids.tolist()]


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    model, inputs = rewritten("llama")
    data = [{"input_ids": row, "labels": row} for row in tiny.tokens(4, 5)]
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**options), train_dataset=data)
    trainer.train()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model.eval(), inputs))
    assert torch.equal(tiny.values_of(memrewrite.load(tmp_path / "checkpoint-2"), inputs), tiny.values_of(model, inputs))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_module_that_became_a_graph(placement: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=D, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=True
    )
    model, inputs = transformers.BloomForCausalLM(config).eval(), tiny.MODELS["llama"][1]()
    report = memrewrite.apply(model, tiny.recipe(placement), inputs)
    assert {b.kind for s in report.plan.substitutions for b in s.site.bindings} == {"graph"}
    tiny.open_up(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))
    memrewrite.save(model, tmp_path / "ours")
    assert torch.equal(tiny.values_of(memrewrite.load(tmp_path / "ours"), inputs), tiny.values_of(model, inputs))


# ----------------------------------------------------------------------------------------------------- the live config


def test_the_config_of_the_live_model_is_that_of_the_base() -> None:
    model, _ = rewritten("llama")
    base = tiny.named("llama")[0].config
    assert model.config.model_type == "llama"
    assert isinstance(model.config, type(base))
    assert model.config is model.model.config is model.model.layers[0].self_attn.config
    assert set(model.config.to_dict()) == set(base.to_dict())
    assert "substitutions" not in repr(model.config)


def test_a_config_that_two_models_share_carries_nothing_for_the_other(tmp_path: Path) -> None:
    config = tiny.named("llama")[0].config
    one, other = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    memrewrite.apply(one.eval(), tiny.recipe("parallel", verify="off"), tiny.named("llama")[1])
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_saved_with_its_memory(copier: Any, tmp_path: Path) -> None:
    model, inputs = rewritten("llama")
    copier(model).save_pretrained(tmp_path)
    loaded = copier(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CASES)
def test_the_class_itself_loads_the_memory(name: str, placement: str, tmp_path: Path) -> None:
    """Its config class reads all fields of config.json; none of those that load the memory is left."""
    model, inputs = rewritten(name, placement)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))
    assert loaded.config.model_type == model.config.model_type
    assert not {"auto_map", "memrewrite_base_model_type", "quantization_config"} & set(loaded.config.to_dict())


def test_nothing_of_a_quantization_is_left(tmp_path: Path) -> None:
    model, _ = rewritten("llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "quantization_config")
    assert "quantization_config" not in loaded.config.to_dict()
    loaded.half()
    loaded.to(torch.float64)


# ---------------------------------------------------------------------------------------------------------- refusals


def _python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


LOAD = """
import sys, transformers
m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]{})
print(type(m.memory).__name__)
"""


def test_in_another_process(tmp_path: Path) -> None:
    model, _ = rewritten("llama")
    model.save_pretrained(tmp_path)
    alone = _python(LOAD.format(""), tmp_path)
    assert alone.returncode == 1
    assert "trust_remote_code" in alone.stderr
    for code in (
        "import memrewrite, " + LOAD.format("")[7:],
        LOAD.format("").replace("transformers\n", "transformers, memrewrite\n", 1),
    ):
        assert _python(code, tmp_path).stdout.strip() == "Pools"
    assert _python(LOAD.format(", trust_remote_code=True"), tmp_path).stdout.strip() == "Pools"


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = rewritten("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["memory.shared.values"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(memrewrite.MemrewriteError, match=r"'memory\.shared\.values' .* no tensor of the files"):
        memrewrite.load(tmp_path)


def _damage(folder: Path, change: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


DAMAGES = {
    "no plan": lambda d: d["quantization_config"].pop("plan"),
    "a plan of another model": lambda d: d["quantization_config"]["plan"]["substitutions"][0]["site"]["bindings"][0].update(
        exit="nothing"
    ),
    "a pool without limits": lambda d: d["quantization_config"]["plan"]["pools"]["shared"].update(keys=2**40),
    "an unknown base": lambda d: d.update(memrewrite_base_model_type="nonsense"),
    "no base": lambda d: d.pop("memrewrite_base_model_type"),
    "text for a plan": lambda d: d["quantization_config"].update(plan="nothing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_is_refused(damage: str, tmp_path: Path) -> None:
    model, _ = rewritten("llama")
    model.save_pretrained(tmp_path)
    _damage(tmp_path, DAMAGES[damage])
    if damage not in ("an unknown base", "no base"):  # `architectures` names the class
        with pytest.raises(memrewrite.MemrewriteError):
            memrewrite.load(tmp_path)
    with pytest.raises(memrewrite.MemrewriteError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_failed_rewrite_leaves_the_config() -> None:
    model, inputs = tiny.named("llama")
    before = model.config
    with pytest.raises(memrewrite.MemrewriteError):
        memrewrite.apply(model, tiny.recipe("replace", where={"path": "nothing"}), inputs)
    assert model.config is before


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, memrewrite\nprint('transformers' in sys.modules, 'torch' in sys.modules)"
    assert _python(code, Path()).stdout.split() == ["False", "False"]


class Subclass(transformers.LlamaForCausalLM):
    """A model class of the user: no config builds it."""


def test_a_class_of_the_user_is_not_carried(tmp_path: Path) -> None:
    model: nn.Module = Subclass(tiny.named("llama")[0].config).eval()
    memrewrite.apply(model, tiny.recipe("parallel", verify="off"), tiny.named("llama")[1])
    assert type(model.config) is transformers.LlamaConfig


# ----------------------------------------------------------------------------------------- models changed by hand


def _another_activation(model: Any) -> None:
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.relu


def _another_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _another_setting(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.LeakyReLU(0.3)


def _patched_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x))


def _setting_of_a_norm(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def _setting_of_an_activation(model: Any) -> None:
    """Only for models whose config has the same class of activation: LeakyReLU(0.01)."""
    model.model.layers[0].mlp.act_fn.negative_slope = 0.9


def _new_head(model: Any) -> None:
    model.lm_head = nn.Linear(tiny.WIDTH, 5)


def _fewer_layers(model: Any) -> None:
    del model.model.layers[0]


def _weight_norm(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)


def _pruned(model: Any) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", amount=0.5)


def _added(model: Any) -> None:
    model.model.extra = nn.Linear(3, 3)


def _lora(model: Any) -> None:
    import peft

    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


HAND = [
    _another_activation,
    _another_module,
    _another_setting,
    _patched_forward,
    _setting_of_a_norm,
    _setting_of_an_activation,
    _new_head,
    _fewer_layers,
    _weight_norm,
    _pruned,
    _added,
    _lora,
]


@pytest.mark.parametrize("change", HAND, ids=lambda change: change.__name__.strip("_"))
def test_a_model_that_its_config_does_not_build(change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saving says that the base is needed to load it, and with the base it is the same model."""
    options = {"hidden_act": "leaky_relu"} if change is _setting_of_an_activation else {}
    model, inputs = tiny.llama(**options), CASES["llama"][1]()
    change(model)
    memrewrite.apply(model, tiny.recipe("parallel", verify="off", where={"layers": [0, 1]}), inputs)
    tiny.open_up(model)
    with caplog.at_level("WARNING", "memrewrite"):
        memrewrite.save(model, tmp_path / "saved")
    assert "not what its config builds" in caplog.text
    with pytest.raises(memrewrite.MemrewriteError, match="base model"):
        memrewrite.load(tmp_path / "saved")
    base = tiny.llama(**options)
    change(base)
    assert torch.equal(tiny.values_of(memrewrite.load(tmp_path / "saved", base), inputs), tiny.values_of(model, inputs))


@pytest.mark.parametrize("name", CASES)
def test_the_config_builds_every_model_that_nothing_changed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = rewritten(name, "replace")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    memrewrite.save(model.half() if name == "llama" else model, tmp_path / "saved")
    assert "not what its config builds" not in caplog.text


def test_renamings_of_transformers_do_not_hit_layers(tmp_path: Path) -> None:
    """Renamings of a base's tensors, such as a router's, have patterns that fit names of layers too."""
    from safetensors.torch import load_file, save_file

    model, inputs = rewritten("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    blocks = {name.replace("layers", "blocks"): tensor for name, tensor in load_file(file).items()}
    save_file(blocks, file, metadata={"format": "pt"})  # so that every name of the blocks is renamed, and not only kept
    renaming = {r"\.gate\.": ".mlp.gate.", "blocks": "layers"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping=renaming)
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))


def test_an_8_bit_table_keeps_its_dtype(tmp_path: Path) -> None:
    model, inputs = CASES["llama"][0](), CASES["llama"][1]()
    recipe = tiny.recipe("parallel", verify="off", pools={"shared": {"keys": 8, "dtype": "float8_e4m3fn", "gradient": "fused"}})
    memrewrite.apply(model, recipe, inputs)
    tiny.open_up(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.memory.shared.values.dtype == torch.float8_e4m3fn
    assert torch.equal(loaded.memory.shared.values.view(torch.uint8), model.memory.shared.values.view(torch.uint8))


def test_a_class_that_other_types_use_too(tmp_path: Path) -> None:
    """Several types have the model class of another; their configs are of another class than the model's."""
    config = transformers.LlamaConfig(**{**tiny.named("llama")[0].config.to_diff_dict(), "model_type": "llama"})
    model, inputs = transformers.MistralForCausalLM(transformers.MistralConfig(**config.to_dict())).eval(), CASES["llama"][1]()
    memrewrite.apply(model, tiny.recipe("parallel", verify="off"), inputs)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)  # of a type that the config does not name
    assert saved["memrewrite_base_model_type"] == "mistral"
    assert {k: tuple(v.shape) for k, v in loaded.state_dict().items()} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }
