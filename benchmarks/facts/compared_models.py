"""The models that are compared: one Hugging Face Llama, rewritten by a recipe each. Nothing is written by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scales import SCALES, Scale
from settings import Json, Setting
from tasks.sequences import Sequences
from torch import nn

import memrewrite
from memrewrite.layers.memory_plus import MemoryPlus
from memrewrite.layers.pool import PoolSpec
from memrewrite.plans import Plan

EVERYWHERE = {"all": True}
EXAMPLES = 1024  # sequences, at most, on which the start of a layer is measured
FLOAT32 = 4  # bytes of a weight
DENSE = 2  # times the arithmetic of the blocks, in `dense-2x`


def _dense(setting: Setting, scale: Scale) -> None:
    """The base model itself."""


def _wide(setting: Setting, scale: Scale) -> Json:
    """Every MLP so wide that a block, attention included, has twice the arithmetic."""
    attention, mlp = 4 * scale.width**2, 3 * scale.width * scale.hidden
    hidden = round((DENSE * (attention + mlp) - attention) / (3 * scale.width))
    return {"where": EVERYWHERE, "with": "dense", "options": {"d_hidden": hidden}}


def _moe(setting: Setting, scale: Scale) -> Json:
    """Every MLP a mixture, with the fewest experts that have more parameters than Memory+, as in the paper."""
    mlp = 3 * scale.width * scale.hidden
    pool = PoolSpec(keys=scale.keys[1], value_dim=scale.width)
    options = MemoryPlus.Options(**_options(setting))
    layer = MemoryPlus.cost(scale.width, scale.width, options, pool, FLOAT32, zero_output=False)
    memory = pool.cost().parameters + 3 * (layer.parameters - mlp)
    experts = (memory + scale.blocks * mlp) // (scale.blocks * (mlp + scale.width)) + 1
    return {"where": EVERYWHERE, "with": "moe", "options": {"experts": experts}}


def _pkm(setting: Setting, scale: Scale) -> Json:
    return _memory("pkm", (scale.middle,), setting)


def _peer(setting: Setting, scale: Scale) -> Json:
    return _memory("peer", (scale.middle,), setting)


def _memory_plus(setting: Setting, scale: Scale) -> Json:
    return _memory("memory_plus", scale.three, setting)


def _memory(kind: str, blocks: tuple[int, ...], setting: Setting) -> Json:
    return {"where": {"layers": list(blocks)}, "with": kind, "options": _options(setting)}


def _options(setting: Setting) -> Json:
    return {"heads": setting.heads, "topk": setting.topk, "qk_norm": setting.qk_norm}


MODELS: dict[str, Callable[[Setting, Scale], Json | None]] = {
    "dense": _dense,
    "dense-2x": _wide,
    "moe": _moe,
    "pkm": _pkm,
    "peer": _peer,
    "memory-plus-small": _memory_plus,
    "memory-plus": _memory_plus,
    "memory-plus-large": _memory_plus,
}
MAIN = ("dense", "pkm", "peer", "memory-plus")


def keys_of(setting: Setting) -> int:
    """Keys per half of a setting's pool. PEER has two tables, and a little more parameters than Memory+, as in the paper."""
    small, medium, large = SCALES[setting.scale].keys
    of_model = {"memory-plus-small": small, "memory-plus-large": large, "peer": 3 * medium // 4}
    return setting.keys or of_model.get(setting.model, medium)


def base(setting: Setting, vocabulary: int) -> nn.Module:
    """A Llama whose weights start from N(0, width^-1/2), as the paper's do, where the setting says nothing else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(setting.seed)
    scale = SCALES[setting.scale]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=scale.width,
        intermediate_size=scale.hidden,
        num_hidden_layers=scale.blocks,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=setting.initializer_range or scale.width**-0.5,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def recipe(setting: Setting, gradient: str) -> Json | None:
    """The recipe that makes the model of a setting of the base, with tables of this `gradient`; None for the base itself."""
    rule = MODELS[setting.model](setting, SCALES[setting.scale])
    if rule is None:
        return None
    rule["init"] = {"output": setting.output, "scores": setting.scores}
    blocks = rule["where"].get("layers")
    if blocks is None:
        return {"memrewrite": 1, "replace": [rule], "verify": "off"}
    names = [f"pool_{block}" if setting.separate else "shared" for block in blocks]
    pool = {"keys": keys_of(setting), "seed": setting.seed, "gradient": gradient}
    pools = {name: pool | ({"dtype": setting.dtype} if setting.dtype else {}) for name in names}
    rules = [rule | {"where": {"layers": [block]}, "pool": name} for block, name in zip(blocks, names, strict=True)]
    return {"memrewrite": 1, "pools": pools, "replace": rules, "verify": "off"}


def built(setting: Setting, task: Sequences, gradient: str) -> tuple[nn.Module, Plan | None]:
    """The model of a setting, and the plan by which its recipe made it of the base; None for the base itself."""
    model, wanted = base(setting, task.vocabulary), recipe(setting, gradient)
    if wanted is None:
        return model, None
    report = memrewrite.apply(model, wanted, {"input_ids": task.train[: min(setting.batch, EXAMPLES), :-1]})
    return report.model, report.plan
