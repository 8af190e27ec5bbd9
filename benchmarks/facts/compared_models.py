"""The models that are compared: one Hugging Face Llama, rewritten by a recipe each. Nothing is written by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from settings import Setting
from task import Facts
from torch import nn

import memrewrite

WIDTH, BLOCKS, HEADS = 32, 8, 4
HIDDEN = 8 * WIDTH // 3  # as in Llama


class Memory(NamedTuple):
    """Which layers replace the MLPs of which blocks, and the keys per half of their pool."""

    kind: str
    blocks: tuple[int, ...]
    keys: int = 128


MODELS: dict[str, Memory | None] = {
    "dense": None,
    "pkm": Memory("pkm", (4,)),
    "peer": Memory("peer", (4,), keys=96),  # two tables, and about a tenth more parameters, as in the paper
    "memory-plus": Memory("memory_plus", (2, 4, 6)),
}


def base(setting: Setting, facts: Facts) -> nn.Module:
    """A Llama with the initial weights of Transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(setting.seed)
    config = LlamaConfig(
        vocab_size=facts.vocabulary,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        initializer_range=setting.initializer_range,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def built(setting: Setting, facts: Facts, gradient: str) -> nn.Module:
    """The model of a setting: the base, or what its recipe makes of it, with a table of this `gradient`."""
    model, memory = base(setting, facts), MODELS[setting.model]
    if memory is None:
        return model
    return memrewrite.apply(model, _recipe(setting, memory, gradient), {"input_ids": facts.inputs[: setting.batch]}).model


def _recipe(setting: Setting, memory: Memory, gradient: str) -> dict[str, Any]:
    pool = {"keys": memory.keys, "seed": setting.seed, "gradient": gradient}
    rule = {
        "where": {"layers": list(memory.blocks)},
        "with": memory.kind,
        "pool": "shared",
        "init": {"output": setting.output},
        "options": {"heads": 2, "topk": 8, "qk_norm": setting.qk_norm},
    }
    pools = {"shared": pool | ({"dtype": setting.dtype} if setting.dtype else {})}
    return {"memrewrite": 1, "pools": pools, "replace": [rule], "verify": "off"}
