"""The models that are compared: one Hugging Face Llama, rewritten by a recipe each. Nothing is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from settings import Setting
from task import Facts
from torch import nn

import memrewrite

WIDTH, BLOCKS, HEADS = 32, 8, 4
HIDDEN = 8 * WIDTH // 3  # as in Llama
KEYS, PEER_KEYS = 128, 96  # per half; PEER has two tables, and about a tenth more parameters, as in the paper
ADDRESS = {"heads": 2, "topk": 8}

Rules = list[dict[str, Any]]


def _memory_plus(setting: Setting) -> Rules:
    options = {**ADDRESS, "qk_norm": setting.qk_norm}
    return [{"where": {"layers": [2, 4, 6]}, "with": "memory_plus", "pool": "shared", "options": options}]


def _pkm(setting: Setting) -> Rules:
    options = {**ADDRESS, "qk_norm": setting.qk_norm}
    return [{"where": {"layers": [4]}, "with": "pkm", "pool": "shared", "options": options}]


MODELS: dict[str, Callable[[Setting], Rules] | None] = {"dense": None, "pkm": _pkm, "memory-plus": _memory_plus}


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
    """The model of a setting: the base, or what its recipe makes of it, with tables of this `gradient`."""
    model = base(setting, facts)
    rules = MODELS[setting.model]
    if rules is None:
        return model
    pool = {"keys": KEYS, "seed": setting.seed, "gradient": gradient} | ({"dtype": setting.dtype} if setting.dtype else {})
    recipe = {
        "memrewrite": 1,
        "pools": {"shared": pool},
        "replace": [{**rule, "init": {"output": setting.output}} for rule in rules(setting)],
        "verify": "off",
    }
    return memrewrite.apply(model, recipe, {"input_ids": facts.inputs[: setting.batch]}).model
