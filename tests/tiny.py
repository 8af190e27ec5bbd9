"""Small models that tests share: one written by hand, and real architectures from tiny configs; all seeded, all fast.

Every builder returns a model in eval mode; `tokens` and `pixels` give inputs that fit. `recipe` spells the usual wishes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.plans import Plan

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

VOCABULARY = 64
WIDTH = 16
BLOCKS = 3


def recipe(placement: str = "replace", *, where: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Memory+ layers with one pool of 8 × 8 slots; `changes` override top-level fields of the recipe."""
    rule: dict[str, Any] = {"where": where or {"all": True}, "with": "memory_plus", "pool": "shared"}
    rule |= {"placement": placement, "options": {"heads": 2, "topk": 4}}
    return {"memrewrite": 1, "pools": {"shared": {"keys": 8}}, "replace": [rule], **changes}


def tokens(batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    """Random token ids, `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ written by hand


class MLP(nn.Module):
    """`down(act(up(x)))`, one module."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Attention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream after dropout."""

    def __init__(self, d: int, mlp: Callable[[int], nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d), Attention(d)
        self.norm2, self.mlp = nn.LayerNorm(d), mlp(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Loose(Block):
    """A block whose MLP is not a module: two matrices are children of the block, with a function in between."""

    def __init__(self, d: int, dropout: float) -> None:
        super().__init__(d, lambda d: nn.Identity(), dropout)
        del self.mlp
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Tiny(nn.Module):
    """A causal language model: embedding, positions (a buffer), blocks, norm, a head tied to the embedding."""

    def __init__(self, blocks: list[nn.Module], d: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, d)
        self.register_buffer("positions", torch.randn(32, d) / 4)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def modular(mlp: Callable[[int], nn.Module] | None = None, dropout: float = 0.0) -> Tiny:
    """Every MLP is one module."""
    torch.manual_seed(0)
    make = mlp or (lambda d: MLP(d, 2 * d))
    return Tiny([Block(WIDTH, make, dropout) for _ in range(BLOCKS)]).eval()


def sequential() -> Tiny:
    """Every MLP is an `nn.Sequential`."""
    return modular(lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)))


def loose(dropout: float = 0.0) -> Tiny:
    """No MLP is a module: two matrices with a function in between."""
    torch.manual_seed(0)
    return Tiny([Loose(WIDTH, dropout) for _ in range(BLOCKS)]).eval()


def shared() -> Tiny:
    """All blocks call the same MLP; each block has its own name for it."""
    torch.manual_seed(0)
    mlp = MLP(WIDTH, 2 * WIDTH)
    return Tiny([Block(WIDTH, lambda d: mlp, 0.0) for _ in range(BLOCKS)]).eval()


# --------------------------------------------------------------------------------------------- from Hugging Face configs


def _hf(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return built.eval()


def llama(**options: Any) -> Any:
    """Gated MLPs, one module each."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return _hf("LlamaForCausalLM", "LlamaConfig", **{**sizes, **heads, "pad_token_id": 0, **options})


def bert(**options: Any) -> Any:
    """MLPs that span two modules."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS}
    return _hf("BertModel", "BertConfig", **{**sizes, "num_attention_heads": 2, "max_position_embeddings": 64, **options})


def gpt2(**options: Any) -> Any:
    """MLPs of `Conv1D`s with dropout inside; head tied to the embedding."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2, "n_positions": 64}
    return _hf("GPT2LMHeadModel", "GPT2Config", **{**sizes, "bos_token_id": 0, "eos_token_id": 1, **options})


def t5(**options: Any) -> Any:
    """Two towers of MLPs."""
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 2}
    return _hf("T5ForConditionalGeneration", "T5Config", **{**sizes, "decoder_start_token_id": 0, **options})


def albert(**options: Any) -> Any:
    """One MLP, called by every layer."""
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    heads = {"num_hidden_layers": BLOCKS, "num_attention_heads": 2, "max_position_embeddings": 64}
    return _hf("AlbertModel", "AlbertConfig", **{**sizes, **heads, **options})


def vit(**options: Any) -> Any:
    """An image encoder."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _hf("ViTModel", "ViTConfig", **{**sizes, "image_size": 8, "patch_size": 4, **options})


def pixels() -> Tensor:
    """Two images for `vit`."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "modular": (modular, lambda: {"ids": tokens()}),
    "sequential": (sequential, lambda: {"ids": tokens()}),
    "loose": (loose, lambda: {"ids": tokens()}),
    "shared": (shared, lambda: {"ids": tokens()}),
    "llama": (llama, lambda: {"input_ids": tokens(), "use_cache": False}),
    "bert": (bert, lambda: {"input_ids": tokens()}),
    "gpt2": (gpt2, lambda: {"input_ids": tokens(), "use_cache": False}),
    "t5": (t5, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(2, 4, seed=1), "use_cache": False}),
    "albert": (albert, lambda: {"input_ids": tokens()}),
    "vit": (vit, lambda: {"pixel_values": pixels()}),
}


def named(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of the table, and inputs that fit."""
    build, inputs = MODELS[name]
    return build(), inputs()


def values_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first output of one forward without gradients."""
    with torch.no_grad():
        out = model(**inputs)
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """All forward and backward hooks by module name; modules without hooks are omitted."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
        if hooks:
            found[name] = hooks
    return found


class Photograph:
    """Snapshot of a model: every module and tensor by identity and name, every bit, every hook, every mode."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
        self.order = list(self.modules)
        self.modes = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
        self.attributes = {name: sorted(vars(m)) for name, m in model.named_modules(remove_duplicate=False)}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {name: (id(t), t.requires_grad, t.dtype, t.device) for name, t in tensors}
        self.state = {name: t.detach().clone() for name, t in tensors}
        self.keys = list(model.state_dict())
        self.hooks = hooks_of(model)

    def differences(self, other: Photograph) -> list[str]:
        """The names of everything that differs; empty if nothing does."""
        plain = ("modules", "order", "modes", "attributes", "tensors", "keys", "hooks")
        found = [what for what in plain if getattr(self, what) != getattr(other, what)]
        for name in self.state.keys() & other.state.keys():
            a, b = self.state[name], other.state[name]
            if a.shape != b.shape or (not a.is_meta and not torch.equal(a, b)):
                found.append(name)
        return found


@cache
def plan_of(name: str, placement: str = "replace") -> Plan:
    """The plan of `recipe` for a model of the table; cached, since capturing takes most of a test's time."""
    import memrewrite

    model, inputs = named(name)
    return memrewrite.plan(model, recipe(placement), inputs)


def rewritten(name: str, placement: str = "replace") -> tuple[Any, dict[str, Any]]:
    """A rewritten model of the table, not verified, and inputs that fit."""
    from memrewrite.passes.rewrite.edit_module import substitute
    from memrewrite.passes.storage.unwrapped import set_record
    from memrewrite.record import RewriteRecord

    (model, inputs), plan = named(name), plan_of(name, placement)
    substitute(model, plan).commit()
    set_record(model, RewriteRecord(plan=plan.model_dump_json(), recipe="memrewrite: 1\n"))
    return model, inputs


def open_up(model: nn.Module) -> None:
    """Give layers whose output starts at zero a nonzero output."""
    from memrewrite.layers.contract import MemoryLayer

    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, MemoryLayer):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
