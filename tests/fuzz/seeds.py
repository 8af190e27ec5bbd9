"""The valid files from which cases are made, one function for each group of kinds. They are written once in a run.

Besides files of the present version there are directories that earlier versions saved (`tests/whole/saved`).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
SAVED = TESTS / "whole" / "saved"
sys.path[:0] = [str(TESTS), str(TESTS / "whole")]


@cache
def bare_base() -> Any:
    """The base of the saved directories whose blocks became graphs."""
    from saved.make import bare

    return bare()


def _opened(model: Any) -> Any:
    import tiny

    tiny.open_up(model)
    return model


def saved(folder: Path) -> None:
    """Saved directories: Hugging Face models, one in shards; blocks that became graphs."""
    import tiny

    import memrewrite
    from memrewrite.passes.storage import tensor_files

    for name, model in (("hf", "llama"), ("hf-span", "bert")):
        memrewrite.save(_opened(tiny.rewritten(model)[0]), folder / name)
    with_shards = tensor_files.SHARD_BYTES
    tensor_files.SHARD_BYTES = 12_000
    memrewrite.save(_opened(tiny.rewritten("llama")[0]), folder / "hf-shards")
    tensor_files.SHARD_BYTES = with_shards
    for name in ("huggingface-parallel", "huggingface-span"):
        shutil.copytree(SAVED / name, folder / f"hf-old-{name}")


def graphs(folder: Path) -> None:
    """Saved directories with modules that became graphs, of this version and of an earlier one."""
    import tiny

    import memrewrite

    for placement in ("replace", "parallel"):
        model = bare_base.__wrapped__()
        memrewrite.apply(model, tiny.recipe(placement) | {"verify": "off"}, {"ids": tiny.tokens()})
        memrewrite.save(_opened(model), folder / f"graphs-{placement}")
    shutil.copytree(SAVED / "module-graph", folder / "graphs-old")


def pretrained(folder: Path) -> None:
    """Hugging Face directories that memrewrite did not write."""
    import tiny

    for name, options in (("llama", {}), ("gpt2", {}), ("shards", {"max_shard_size": "12KB"})):
        model = tiny.llama() if name == "shards" else tiny.named(name)[0]
        model.save_pretrained(folder / name, **options)


def onnx(folder: Path) -> None:
    """Exported files: of memory layers alone, in each form; one whose weights are a second file; one that names its source."""
    import onnx
    import onnx_files
    import tiny

    import memrewrite

    model, inputs = onnx_files.layers()
    for op in ("both", "standard"):
        (folder / op).mkdir(parents=True)
        memrewrite.export_onnx(model, folder / op / "model.onnx", inputs, op=op, notes={"source": "zqx_evil.py"})
    (folder / "external").mkdir()
    loaded = onnx.load(folder / "both" / "model.onnx")
    onnx.save(
        loaded, folder / "external" / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    named = _opened(tiny.rewritten("llama")[0])
    (folder / "named").mkdir()
    memrewrite.save(named, folder / "named" / "saved")
    memrewrite.export_onnx(named, folder / "named" / "model.onnx", notes={"source": "saved"})


def arrays(folder: Path) -> None:
    """Archives of arrays, as `check --inputs` takes them, each with the ONNX file that it belongs to."""
    import numpy
    import onnx_files

    import memrewrite

    for name, save in (("stored", numpy.savez), ("packed", numpy.savez_compressed)):
        (folder / name).mkdir()
        generator = numpy.random.default_rng(0)
        save(folder / name / "inputs.npz", x=generator.standard_normal((2, 5, 16)).astype("float32"))
        memrewrite.export_onnx(onnx_files.layers()[0], folder / name / "model.onnx", onnx_files.layers()[1])


def tokenizers(folder: Path) -> None:
    """A tokenizer, as Hugging Face directories contain it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(32 + number): number for number in range(64)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for name, special in (("padded", {"pad_token": " ", "padding_side": "left"}), ("plain", {})):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special).save_pretrained(folder / name)


def recipes(folder: Path) -> None:
    """The recipes of the gallery, and of the tests."""
    from memrewrite.recipes.gallery_index import gallery

    texts = dict(gallery().items())
    texts["test"] = (SAVED / "huggingface" / "recipe.yaml").read_text()
    texts["many"] = (
        "memrewrite: 1\npools:\n  a: {keys: 8, dtype: float32}\n  b: {keys: 4}\nreplace:\n"
        "  - {where: {layers: [0]}, with: memory_plus, pool: a, placement: parallel, options: {heads: 2, topk: 4}}\n"
        "  - {where: {layers: [1, 2]}, with: pkm, pool: b, placement: replace, options: {heads: 1, topk: 2}}\nverify: off\n"
    )
    for name, text in texts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "recipe.yaml").write_text(text)


def programs(folder: Path) -> None:
    """Exported programs: a file, and a saved graph."""
    (folder / "file").mkdir(parents=True)
    shutil.copy(SAVED / "graph" / "model.pt2", folder / "file" / "model.pt2")
    shutil.copytree(SAVED / "graph", folder / "saved")


def gguf(folder: Path) -> None:
    """A file of llama.cpp's format."""
    import numpy
    import tiny
    from gguf import GGUFWriter

    model = tiny.llama()
    (folder / "gguf").mkdir(parents=True)
    writer = GGUFWriter(str(folder / "gguf" / "model.gguf"), "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, value in model.state_dict().items():
        renamed = name.replace("model.layers.", "blk.")
        for old, new in names.items():
            renamed = renamed.replace(old, new)
        writer.add_tensor(renamed, value.detach().numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GROUPS: dict[str, Callable[[Path], None]] = {
    "saved": saved,
    "graphs": graphs,
    "pretrained": pretrained,
    "onnx": onnx,
    "arrays": arrays,
    "tokenizers": tokenizers,
    "recipes": recipes,
    "programs": programs,
    "gguf": gguf,
}
