"""The project's table of model families: how to build a tiny model of each, and where its MLPs are.

The entries come from the models' sources (the parameters of each MLP, its widths, its number of calls), never from the output
of the locator; `test_locate.py` compares the locator with them, and them with the shapes of the parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, HIDDEN, VOCAB, TOKENS, BATCH = 32, 48, 64, 8, 2


@dataclass(frozen=True)
class Mlp:
    """An MLP that must be found at `path`. `leaves`: the modules or parameters under it that belong to it; empty: all."""

    path: str
    pattern: str
    d_model: int
    d_hidden: int
    activation: str
    calls: int = 1
    leaves: tuple[str, ...] = ()

    def parameters(self, model: nn.Module) -> frozenset[str]:
        """The names of the parameters inside, in the model's order."""
        prefix = f"{self.path}." if self.path else ""
        starts = tuple(prefix + leaf for leaf in self.leaves) or (self.path,)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return frozenset(n for n in names if any(n == start or n.startswith(f"{start}.") for start in starts))


@dataclass(frozen=True)
class Family:
    """A model and its MLPs. `misses`: paths at which a near miss must be reported, each with a word of its reason."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    mlps: tuple[Mlp, ...]
    misses: Mapping[str, str] = field(default_factory=dict)


def each(numbers: Iterable[int], mlp: Mlp) -> tuple[Mlp, ...]:
    """One `Mlp` per block; `{}` in the path is the block number."""
    return tuple(Mlp(**{**vars(mlp), "path": mlp.path.format(i)}) for i in numbers)


def tokens(*shape: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Token ids."""
    return torch.randint(4, vocab, shape or (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))


def states(*shape: int, seed: int = 0) -> Tensor:
    """Hidden states."""
    return torch.randn(shape or (BATCH, TOKENS, D), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- transformers, from configs


def pretrained(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A builder of the `transformers` class `name` with random weights."""

    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = kind(kind.config_class(**config)).eval()
        return model

    return build


BASE = {
    "hidden_size": D,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
GPT = {"n_embd": D, "n_inner": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 32, "use_cache": False}
SEQ2SEQ = {
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": D,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
T5 = {"d_model": D, "d_kv": 8, "d_ff": HIDDEN, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "use_cache": False}
CONV = {"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2}


def text() -> Any:
    return {"input_ids": tokens()}


def text_pair() -> Any:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(BATCH, 5, seed=1)}


def image(side: int = 16) -> Callable[[], Any]:
    return lambda: {"pixel_values": states(1, 3, side, side)}


def gated(path: str, activation: str = "silu") -> tuple[Mlp, ...]:
    return each(range(2), Mlp(path, "gated", D, HIDDEN, activation))


def packed(path: str, activation: str = "silu") -> tuple[Mlp, ...]:
    return each(range(2), Mlp(path, "gated_packed", D, HIDDEN, activation))


def plain(path: str, activation: str = "gelu", *leaves: str, d_hidden: int = HIDDEN) -> tuple[Mlp, ...]:
    return each(range(2), Mlp(path, "plain", D, d_hidden, activation, leaves=leaves))


BERT_LEAVES = ("intermediate.dense", "output.dense")
FC = ("fc1", "fc2")

PRETRAINED: dict[str, Family] = {
    # decoders
    "gpt2": Family(pretrained("GPT2Model", **GPT), text, plain("h.{}.mlp", "gelu_tanh")),
    "gptj": Family(pretrained("GPTJModel", **GPT, rotary_dim=4), text, plain("h.{}.mlp", "gelu_tanh")),
    "gpt_bigcode": Family(pretrained("GPTBigCodeModel", **GPT), text, plain("h.{}.mlp", "gelu_tanh")),
    "gpt_neox": Family(pretrained("GPTNeoXModel", **BASE), text, plain("layers.{}.mlp")),
    "llama": Family(pretrained("LlamaModel", **GROUPED), text, gated("layers.{}.mlp")),
    "mistral": Family(pretrained("MistralModel", **GROUPED), text, gated("layers.{}.mlp")),
    "qwen2": Family(pretrained("Qwen2Model", **GROUPED), text, gated("layers.{}.mlp")),
    "gemma": Family(pretrained("GemmaModel", **GROUPED, head_dim=8), text, gated("layers.{}.mlp", "gelu_tanh")),
    "gemma2": Family(pretrained("Gemma2Model", **GROUPED, head_dim=8), text, gated("layers.{}.mlp", "gelu_tanh")),
    "olmo2": Family(pretrained("Olmo2Model", **GROUPED), text, gated("layers.{}.mlp")),
    "cohere": Family(pretrained("CohereModel", **GROUPED), text, gated("layers.{}.mlp")),
    "phi": Family(pretrained("PhiModel", **GROUPED), text, plain("layers.{}.mlp", "gelu_tanh")),
    "phi3": Family(pretrained("Phi3Model", **GROUPED), text, packed("layers.{}.mlp")),
    "glm4": Family(pretrained("Glm4Model", **GROUPED, head_dim=8), text, packed("layers.{}.mlp")),
    "nemotron": Family(pretrained("NemotronModel", **GROUPED), text, plain("layers.{}.mlp", "relu2")),
    "opt": Family(
        pretrained("OPTModel", **BASE, ffn_dim=HIDDEN, word_embed_proj_dim=D),
        text,
        plain("decoder.layers.{}", "relu", *FC),
    ),
    "falcon": Family(pretrained("FalconModel", **BASE, ffn_hidden_size=HIDDEN), text, plain("h.{}.mlp")),
    "falcon, serial": Family(
        pretrained("FalconModel", **BASE, ffn_hidden_size=HIDDEN, parallel_attn=False), text, plain("h.{}.mlp")
    ),
    "mpt": Family(
        pretrained("MptModel", d_model=D, n_heads=4, n_layers=2, vocab_size=VOCAB, max_seq_len=32),
        text,
        plain("blocks.{}.ffn", d_hidden=4 * D),
    ),
    "bloom": Family(
        pretrained("BloomModel", hidden_size=D, n_layer=2, n_head=4, vocab_size=VOCAB, use_cache=False),
        text,
        plain("h.{}.mlp", "gelu_tanh", d_hidden=4 * D),
    ),
    "xlnet": Family(
        pretrained("XLNetModel", d_model=D, d_inner=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCAB),
        text,
        plain("layer.{}.ff", "gelu", "layer_1", "layer_2"),
    ),
    "mamba": Family(  # per block one region with the shape of a gated MLP, but with a scan over the tokens inside
        pretrained("MambaModel", hidden_size=D, state_size=4, num_hidden_layers=2, vocab_size=VOCAB, use_cache=False),
        text,
        (),
        {"layers.0.mixer.out_proj": ""},
    ),
    # encoders
    "bert": Family(pretrained("BertModel", **BASE), text, plain("encoder.layer.{}", "gelu", *BERT_LEAVES)),
    "bert, chunked": Family(
        pretrained("BertModel", **BASE, chunk_size_feed_forward=4),
        text,
        each(range(2), Mlp("encoder.layer.{}", "plain", D, HIDDEN, "gelu", TOKENS // 4, BERT_LEAVES)),
    ),
    "bert, with its head": Family(
        pretrained("BertForMaskedLM", **BASE),
        text,
        plain("bert.encoder.layer.{}", "gelu", *BERT_LEAVES),
        {"cls.predictions.decoder": "residual"},
    ),
    "roberta, pre-norm": Family(
        pretrained("RobertaPreLayerNormModel", **BASE), text, plain("encoder.layer.{}", "gelu", *BERT_LEAVES)
    ),
    "albert": Family(
        pretrained("AlbertModel", **{**BASE, "embedding_size": 16, "num_hidden_layers": 3}),
        text,
        (
            Mlp(
                "encoder.albert_layer_groups.0.albert_layers.0",
                "plain",
                D,
                HIDDEN,
                "gelu_tanh",
                calls=3,
                leaves=("ffn", "ffn_output"),
            ),
        ),
    ),
    "modernbert": Family(
        pretrained("ModernBertModel", **BASE, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        text,
        packed("layers.{}.mlp", "gelu"),
    ),
    "deberta": Family(
        pretrained("DebertaV2Model", **BASE, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        text,
        plain("encoder.layer.{}", "gelu", *BERT_LEAVES),
    ),
    "distilbert": Family(
        pretrained("DistilBertModel", dim=D, hidden_dim=HIDDEN, n_layers=2, n_heads=4, vocab_size=VOCAB),
        text,
        plain("transformer.layer.{}.ffn"),
    ),
    "esm": Family(pretrained("EsmModel", **BASE, mask_token_id=3), text, plain("encoder.layer.{}", "gelu", *BERT_LEAVES)),
    "squeezebert": Family(
        pretrained("SqueezeBertModel", **BASE, embedding_size=D, intermediate_groups=1, output_groups=1),
        text,
        plain("encoder.layers.{}", "gelu", "intermediate.conv1d", "output.conv1d"),
    ),
    "funnel": Family(
        pretrained("FunnelBaseModel", d_model=D, d_inner=HIDDEN, n_head=4, d_head=8, block_sizes=[1, 1], vocab_size=VOCAB),
        text,
        plain("encoder.blocks.{}.0.ffn", "gelu_tanh", "linear_1", "linear_2"),
    ),
    "mobilebert": Family(  # three MLPs per block, inside a bottleneck of half the width
        pretrained(
            "MobileBertModel",
            **BASE,
            embedding_size=16,
            intra_bottleneck_size=16,
            true_hidden_size=16,
            num_feedforward_networks=3,
        ),
        text,
        (
            *each(range(2), Mlp("encoder.layer.{}.ffn.0", "plain", 16, HIDDEN, "relu", leaves=BERT_LEAVES)),
            *each(range(2), Mlp("encoder.layer.{}.ffn.1", "plain", 16, HIDDEN, "relu", leaves=BERT_LEAVES)),
            *each(range(2), Mlp("encoder.layer.{}", "plain", 16, HIDDEN, "relu", leaves=BERT_LEAVES)),
        ),
    ),
    # encoder and decoder
    "t5": Family(
        pretrained("T5Model", **T5, num_decoder_layers=2, decoder_start_token_id=0),
        text_pair,
        (
            *plain("encoder.block.{}.layer.1.DenseReluDense", "relu"),
            *plain("decoder.block.{}.layer.2.DenseReluDense", "relu"),
        ),
    ),
    "t5, gated": Family(
        pretrained("T5EncoderModel", **T5, feed_forward_proj="gated-gelu"),
        text,
        gated("encoder.block.{}.layer.1.DenseReluDense", "gelu_tanh"),
    ),
    "bart": Family(
        pretrained("BartModel", **SEQ2SEQ),
        text_pair,
        (*plain("encoder.layers.{}", "gelu", *FC), *plain("decoder.layers.{}", "gelu", *FC)),
    ),
    "blenderbot": Family(
        pretrained("BlenderbotModel", **SEQ2SEQ),
        text_pair,
        (*plain("encoder.layers.{}", "gelu", *FC), *plain("decoder.layers.{}", "gelu", *FC)),
    ),
    "whisper": Family(
        pretrained("WhisperModel", **SEQ2SEQ, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
        lambda: {"input_features": states(1, 8, 16), "decoder_input_ids": tokens(1, 5)},
        (*plain("encoder.layers.{}", "gelu", *FC), *plain("decoder.layers.{}", "gelu", *FC)),
    ),
    # images and sound
    "vit": Family(pretrained("ViTModel", **VISION), image(), plain("layers.{}.mlp")),
    "dinov2": Family(pretrained("Dinov2Model", **VISION, mlp_ratio=2), image(), plain("encoder.layer.{}.mlp", d_hidden=2 * D)),
    "dinov2, gated": Family(
        pretrained("Dinov2Model", **VISION, mlp_ratio=2, use_swiglu_ffn=True), image(), gated("encoder.layer.{}.mlp")
    ),
    "clip, text": Family(
        pretrained("CLIPTextModel", **BASE, bos_token_id=1, eos_token_id=2),
        text,
        plain("encoder.layers.{}.mlp", "quick_gelu"),
    ),
    "swin": Family(  # stages of one and three blocks, twice as wide in the second
        pretrained(
            "SwinModel",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 3],
            num_heads=[2, 4],
            window_size=4,
            mlp_ratio=3.0,
        ),
        image(32),
        (
            Mlp("encoder.layers.0.blocks.0.mlp", "plain", 16, 48, "gelu"),
            *each(range(3), Mlp("encoder.layers.1.blocks.{}.mlp", "plain", 32, 96, "gelu")),
        ),
    ),
    "segformer": Family(  # every MLP contains a depthwise convolution over the image
        pretrained(
            "SegformerModel",
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            sr_ratios=[2, 1],
            num_attention_heads=[2, 4],
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
        ),
        image(),
        (),
        {"stages.0.blocks.0.mlp.fc2": "token", "stages.1.blocks.0.mlp.fc2": "token"},
    ),
    "wav2vec2, conformer": Family(  # per block two MLPs, and between them a gated convolution that is not an MLP
        pretrained(
            "Wav2Vec2ConformerModel",
            **{k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")},
            **CONV,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=3,
            position_embeddings_type="relative",
            mask_time_prob=0.0,
        ),
        lambda: {"input_values": states(1, 200)},
        (*plain("encoder.layers.{}.ffn1"), *plain("encoder.layers.{}.ffn2")),
        {"encoder.layers.0.conv_module.pointwise_conv2": "token"},
    ),
}


# ------------------------------------------------------------------------------------------------------ written by hand


class Attention(nn.Module):
    """Causal self-attention over [B, T, D]."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Stack(nn.Module):
    """Blocks created by `make`, between an embedding and a head."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), mlp
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Parallel(Block):
    """Attention and MLP read the same normalized value; three terms are summed."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        return x + self.attention(normed) + self.mlp(normed)


class PostNorm(Block):
    """The norm is after the sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Sandwich(Block):
    """A norm before the MLP and another after it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.norm3 = nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.norm3(self.mlp(self.norm2(x)))


class HalfStep(Block):
    """The MLP's output is halved."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + 0.5 * self.mlp(self.norm2(x))


class Scaled(Block):
    """The MLP's output is multiplied by a parameter, per feature."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.scale = nn.Parameter(torch.full((D,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x)) * self.scale


class Flattened(Block):
    """Batch and tokens are one axis around the MLP and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        flat = x.reshape(-1, D)
        return (flat + self.mlp(self.norm2(flat))).view(x.shape)


class Checkerboard(Block):
    """The MLP runs on slices of the tokens in sequence."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return torch.cat([part + self.mlp(self.norm2(part)) for part in x.split(4, dim=1)], dim=1)


class Twice(nn.Module):
    """Two MLPs whose matrices are all children of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2, self.b1, self.b2 = (nn.Linear(*s) for s in ((D, HIDDEN), (HIDDEN, D)) * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a2(self.a1(x).relu())
        return x + self.b2(F.silu(self.b1(x)))


class Up(nn.Module):
    """`down(act(up(x)))` with a module for each part."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, HIDDEN, bias=bias), nn.Linear(HIDDEN, D, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Residual(Up):
    """Norm, MLP and the sum in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(super().forward(self.norm(x)), 0.1, self.training)


class Bare(nn.Module):
    """Weights are parameters without `nn.Linear` modules, multiplied by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(D, HIDDEN) / 6), nn.Parameter(torch.zeros(HIDDEN))
        self.w2, self.b2 = nn.Parameter(torch.randn(HIDDEN, D) / 7), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,df->btf", x, self.w1) + self.b1)
        return torch.einsum("btf,fd->btd", hidden, self.w2) + self.b2


class Tied(nn.Module):
    """One matrix is used up and, transposed, down."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, D) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w.T) @ self.w


class Packed(nn.Module):
    """Gate and value packed in one matrix; `cut` is how they are split."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.both, self.down, self.cut = nn.Linear(D, 2 * HIDDEN), nn.Linear(HIDDEN, D), cut

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.cut(self.both(x))
        return self.down(F.silu(gate) * value)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return first, second


def interleaved(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def paired(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second


def stacked(x: Tensor) -> tuple[Tensor, Tensor]:
    both = x.view(*x.shape[:-1], 2, -1)
    return both.select(-2, 0), both.select(-2, 1)


class Gated(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, HIDDEN, bias=bias), nn.Linear(D, HIDDEN, bias=bias)
        self.down, self.act = nn.Linear(HIDDEN, D, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Clamped(Gated):
    """Gate and value are clamped and shifted before their product."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).clamp(max=7.0), self.up(x).clamp(-7.0, 7.0)
        return self.down(gate * torch.sigmoid(1.702 * gate) * (value + 1))


class NormInside(Up):
    """A norm with weights between the two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x))))


class Pixels(nn.Module):
    """1×1 convolutions on [B, C, H, W] after a depthwise one, added to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, D, 3, padding=1), nn.BatchNorm2d(D)
        self.up, self.down = nn.Conv2d(D, HIDDEN, 1), nn.Conv2d(HIDDEN, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.down(F.gelu(self.up(self.norm(x))))


# --------------------------------------------------------------------------------- how a block returns to its stream


class Returning(Block):
    """Pre-norm attention, then `how(block, stream, mlp of its norm)`."""

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__(Up())
        self.how, self.scale, self.gate = how, nn.Parameter(torch.ones(D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.how(self, x, self.mlp(self.norm2(x)))


def highway(block: Any, x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(block.gate(x))
    return gate * y + (1 - gate) * x


def in_place(block: Any, x: Tensor, y: Tensor) -> Tensor:
    kept = x.clone()
    kept[:, :].add_(y)
    return kept


RETURNS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "stream scaled": lambda block, x, y: block.norm1(1.7 * x + y),
    "both scaled by parameters": lambda block, x, y: x * block.scale + y * block.scale,
    "highway": highway,
    "gated by the stream": lambda block, x, y: x + torch.sigmoid(block.gate(x)) * y,
    "interpolated": lambda block, x, y: torch.lerp(x, y, block.scale * 0.1),
    "on the sphere": lambda block, x, y: F.normalize(x + block.scale * (F.normalize(y, dim=-1) - x), dim=-1),
    "addcmul": lambda block, x, y: torch.addcmul(x, y, block.scale),
    "subtracted from": lambda block, x, y: torch.rsub(x, y),
    "out of place": lambda block, x, y: torch.add(x, y, out=torch.empty_like(x)),
    "through a view, in place": in_place,
    "sum of a stack": lambda block, x, y: torch.stack([x, y]).sum(0),
    "weighted stack": lambda block, x, y: torch.einsum("sbtd,s->btd", torch.stack([x, y]), block.scale[:2]),
    "index_add": lambda block, x, y: x.index_add(1, torch.arange(TOKENS), y),
    "in another type": lambda block, x, y: (x.double() + y.double()).float(),
    "masked": lambda block, x, y: torch.where(x[..., :1] > 0, x + y, x),
}


class SomeTokens(Block):
    """The MLP runs on the tokens that a mask selects."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mask = x[..., 0] > 0
        picked, out = x[mask], x.clone()
        out[mask] = picked + self.mlp(self.norm2(picked))
        return out


class SomeDepth(Block):
    """The MLP runs on the few tokens with the highest score."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.score = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        at = self.score(x).topk(4, 1).indices.expand(-1, -1, D)
        return x.scatter_add(1, at, self.mlp(self.norm2(x.gather(1, at))))


class Reversible(nn.Module):
    """Two streams: a function of each is added to the other."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(2 * D, VOCAB)
        self.f = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), Attention()) for _ in range(depth))
        self.norms, self.mlps = (nn.ModuleList(make() for _ in range(depth)) for make in (lambda: nn.LayerNorm(D), Up))

    def forward(self, ids: Tensor) -> Tensor:
        both = torch.cat([self.embed(ids)] * 2, -1)
        for f, norm, mlp in zip(self.f, self.norms, self.mlps, strict=True):
            a, b = both.chunk(2, -1)
            a = a + f(b)
            both = torch.cat([a, b + mlp(norm(a))], -1)
        return self.head(both)


class Streams(nn.Module):
    """Four streams; every module reads a learned mix of them, and its output is added to each with a learned weight."""

    def __init__(self, by: str, depth: int = 3) -> None:
        super().__init__()
        self.by, self.embed, self.head = by, nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.parts = nn.ModuleList(part for _ in range(depth) for part in (Attention(), Up()))
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in self.parts)
        self.weigh = nn.ModuleList(nn.Linear(4 * D, 24) for _ in self.parts)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, 4, -1)
        for part, norm, weigh in zip(self.parts, self.norms, self.weigh, strict=True):
            read, write, mix = weigh(F.rms_norm(x.flatten(2), (4 * D,))).split([4, 4, 16], -1)
            mix = mix.unflatten(-1, (4, 4)).softmax(-1)
            if self.by == "einsum":
                y = part(norm(torch.einsum("btn,btnd->btd", read.sigmoid(), x)))
                x = torch.einsum("btij,btjd->btid", mix, x) + torch.einsum("btn,btd->btnd", write, y)
            else:
                y = part(norm((read.sigmoid().unsqueeze(-1) * x).sum(2)))
                x = mix @ x + write.unsqueeze(-1) * y.unsqueeze(2)
        return self.head(x.sum(2))


class Neighbours(nn.Module):
    """A depthwise convolution and a norm before the MLP, on an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near = nn.Conv2d(3, D, 1), nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.down(F.gelu(self.up(self.norm(self.near(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


class FeaturesFirst(nn.Module):
    """The stream is [B, D, T]; weights are the left operands."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(D, D), nn.GroupNorm(1, D)
        self.w1, self.w2 = nn.Parameter(torch.randn(HIDDEN, D) / 6), nn.Parameter(torch.randn(D, HIDDEN) / 7)
        self.b1, self.b2 = nn.Parameter(torch.zeros(HIDDEN, 1)), nn.Parameter(torch.zeros(D, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        return x + (self.w2 @ F.gelu(self.w1 @ self.norm(x) + self.b1) + self.b2)


# ------------------------------------------------------------------------------------------- how its matrices are written


class InParts(Up):
    """A sum of products of input slices, each with its columns of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, total = self.act(self.up(x)), torch.zeros_like(x)
        for start in range(0, HIDDEN, HIDDEN // 4):
            part = slice(start, start + HIDDEN // 4)
            total = total + F.linear(hidden[..., part], self.down.weight[:, part])
        return total + self.down.bias


class ByRows(Up):
    """A concatenation of products, each with its rows of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([F.linear(x, rows) for rows in self.up.weight.chunk(3)], -1) + self.up.bias
        return self.down(self.act(hidden))


class Batched(Up):
    """A batched product with the weight repeated for each item."""

    def forward(self, x: Tensor) -> Tensor:
        up = self.up.weight.t().expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.down.bias, self.act(torch.bmm(x, up) + self.up.bias), self._down(x))

    def _down(self, x: Tensor) -> Tensor:
        return self.down.weight.t().unsqueeze(0).repeat(x.shape[0], 1, 1)


class GroupedConvolutions(nn.Module):
    """Every group of channels has its own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, HIDDEN, 1, groups=4), nn.Conv1d(HIDDEN, D, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class TwoInOne(nn.Module):
    """Gate and value are two matrices of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Parameter(torch.randn(2, D, HIDDEN) / 6), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.einsum("btd,cdf->cbtf", x, self.both)
        return self.down(F.silu(gate) * value)


class LargerHalf(nn.Module):
    """The elementwise maximum of two products, and no other nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.both(x).unflatten(-1, (-1, 2)).amax(-1))


class Fused(nn.Module):
    """One matrix computes queries, keys, values and the MLP's hidden features; the other matrices are separate."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(D), nn.Linear(D, 3 * D + HIDDEN * (1 + gated))
        self.out, self.down, self.gated = nn.Linear(D, D), nn.Linear(HIDDEN, D), gated

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, hidden = self.fused(self.norm(x)).split((D, D, D, HIDDEN * (1 + self.gated)), -1)
        mixed = F.scaled_dot_product_attention(*(part.unsqueeze(1) for part in (q, k, v)), is_causal=True).squeeze(1)
        return x + self.out(mixed) + self.down(F.glu(hidden) if self.gated else F.gelu(hidden))


class Adapted(Block):
    """An adapter, a bottleneck with a sum around it, follows the MLP."""

    def __init__(self) -> None:
        super().__init__(Up())
        self.narrow, self.widen = nn.Linear(D, 4), nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.widen(F.gelu(self.narrow(x)))


class DepthAttention(Block):
    """The MLP reads an attention over the embedding and the current state of each token; its output is added to the state."""

    def __init__(self) -> None:
        super().__init__(Up())
        self.query = nn.Parameter(torch.randn(1, 1, 1, D) / 6)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x, x + self.attention(self.norm1(x))], -2)
        mixed = F.scaled_dot_product_attention(self.query.expand(*x.shape[:2], -1, -1), both, both)
        return both[..., 1, :] + self.mlp(self.norm2(mixed.squeeze(-2)))


class Rounded(nn.Linear):
    """Normalizes and rounds its input, and rounds its weight; gradients ignore the rounding (straight-through)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:])
        scale, size = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5), self.weight.abs().mean()
        weight = self.weight + ((self.weight / size).round().clamp(-1, 1) * size - self.weight).detach()
        return F.linear(x + ((x * scale).round() / scale - x).detach(), weight)


class RoundedGated(Gated):
    """Every matrix has its own rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Rounded(D, HIDDEN, bias=False), Rounded(D, HIDDEN, bias=False)
        self.down = Rounded(HIDDEN, D, bias=False)


class Recurrent(Block):
    """The MLP's output is the input of a recurrent cell whose state is the residual stream."""

    def __init__(self) -> None:
        super().__init__(Up())
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.cell(self.mlp(self.norm2(x)).reshape(-1, D), x.reshape(-1, D)).view_as(x)


def by_numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., torch.arange(0, 2 * HIDDEN, 2)], x.index_select(-1, torch.arange(1, 2 * HIDDEN, 2))


def two_first(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, value = x.unflatten(-1, (-1, 2)).permute(3, 0, 1, 2)
    return gate, value


def few(x: Tensor) -> Tensor:
    """Only the largest features are kept."""
    top = x.topk(8, -1)
    return torch.zeros_like(x).scatter(-1, top.indices, top.values)


def stack(block: Callable[[nn.Module], nn.Module], mlp: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder of a two-block model."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Stack(lambda: block(mlp())).eval()

    return build


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder that calls `make` with a fixed seed."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


def ids() -> Any:
    return (tokens(),)


def torch_encoder(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, 4, HIDDEN, batch_first=True, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    return build


AT = "blocks.{}.mlp"
LINEARS = ("linear1", "linear2")

BY_HAND: dict[str, Family] = {
    "pre-norm": Family(stack(Block, Up), ids, plain(AT)),
    "post-norm": Family(stack(PostNorm, Up), ids, plain(AT)),
    "parallel": Family(stack(Parallel, Up), ids, plain(AT)),
    "sandwich": Family(stack(Sandwich, Gated), ids, gated(AT)),
    "half step": Family(stack(HalfStep, Up), ids, plain(AT)),
    "layer scale": Family(stack(Scaled, Gated), ids, gated(AT)),
    "flattened tokens": Family(stack(Flattened, Up), ids, plain(AT)),
    "chunked": Family(stack(Checkerboard, Up), ids, each(range(2), Mlp(AT, "plain", D, HIDDEN, "gelu", TOKENS // 4))),
    "residual inside": Family(stack(lambda mlp: mlp, Residual), ids, plain("blocks.{}", "gelu", "up", "down")),
    "two in one module": Family(
        stack(lambda mlp: mlp, Twice), ids, (*plain("blocks.{}", "relu", "a1", "a2"), *plain("blocks.{}", "silu", "b1", "b2"))
    ),
    "sequential": Family(
        stack(Block, lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.Mish(), nn.Dropout(0.1), nn.Linear(HIDDEN, D))),
        ids,
        plain(AT, "mish"),
    ),
    "einsum": Family(stack(Block, Bare), ids, plain(AT)),
    "tied": Family(stack(Block, Tied), ids, plain(AT, "relu")),
    "no bias": Family(stack(Block, lambda: Up(F.relu, bias=False)), ids, plain(AT, "relu")),
    "packed halves": Family(stack(Block, lambda: Packed(halves)), ids, packed(AT)),
    "packed halves, gate second": Family(stack(Block, lambda: Packed(lambda x: halves(x)[::-1])), ids, packed(AT)),
    "packed interleaved": Family(stack(Block, lambda: Packed(interleaved)), ids, packed(AT)),
    "packed in pairs": Family(stack(Block, lambda: Packed(paired)), ids, packed(AT)),
    "packed by an axis of two": Family(stack(Block, lambda: Packed(stacked)), ids, packed(AT)),
    "clamped gate": Family(stack(Block, Clamped), ids, gated(AT, "?")),
    "norm inside": Family(stack(Block, NormInside), ids, plain(AT, "?")),
    "1×1 convolutions": Family(
        seeded(Pixels), lambda: (states(1, 3, 8, 8),), (Mlp("", "plain", D, HIDDEN, "gelu", leaves=("up", "down")),)
    ),
    **{
        f"returns: {name}": Family(stack(lambda mlp: mlp, lambda how=how: Returning(how)), ids, plain(AT))  # type: ignore[misc]
        for name, how in RETURNS.items()
    },
    "some tokens": Family(stack(SomeTokens, Up), ids, plain(AT)),
    "some depth": Family(stack(SomeDepth, Up), ids, plain(AT)),
    "reversible": Family(seeded(Reversible), ids, each(range(5), Mlp("mlps.{}", "plain", D, HIDDEN, "gelu"))),
    "four streams": Family(
        seeded(lambda: Streams("einsum")), ids, each((1, 3, 5), Mlp("parts.{}", "plain", D, HIDDEN, "gelu"))
    ),
    "four streams, by sums": Family(
        seeded(lambda: Streams("sum")), ids, each((1, 3, 5), Mlp("parts.{}", "plain", D, HIDDEN, "gelu"))
    ),
    "after a depthwise convolution": Family(
        seeded(Neighbours), lambda: (states(1, 3, 8, 8),), (Mlp("", "plain", D, HIDDEN, "gelu", leaves=("up", "down")),)
    ),
    "features first": Family(
        seeded(FeaturesFirst),
        lambda: (states(),),
        (Mlp("", "plain", D, HIDDEN, "gelu", leaves=("w1", "b1", "w2", "b2")),),
    ),
    "in parts": Family(stack(Block, InParts), ids, plain(AT)),
    "by rows": Family(stack(Block, ByRows), ids, plain(AT)),
    "batched": Family(stack(Block, Batched), ids, plain(AT)),
    "two in one parameter": Family(stack(Block, TwoInOne), ids, packed(AT)),
    "packed by numbers": Family(stack(Block, lambda: Packed(by_numbers)), ids, packed(AT)),
    "packed, two axes first": Family(stack(Block, lambda: Packed(two_first)), ids, packed(AT)),
    "packed, beside each other": Family(stack(Block, lambda: Packed(lambda x: x.tensor_split(2, -1))), ids, packed(AT)),
    "fused with attention": Family(stack(lambda mlp: mlp, Fused), ids, plain("blocks.{}", "gelu", "fused", "down")),
    "fused with attention, gated": Family(
        stack(lambda mlp: mlp, lambda: Fused(gated=True)),
        ids,
        each(range(2), Mlp("blocks.{}", "gated_packed", D, HIDDEN, "sigmoid", leaves=("fused", "down"))),
    ),
    "adapter": Family(
        stack(lambda mlp: mlp, Adapted), ids, plain(AT), misses={"blocks.0.widen": "bottleneck", "blocks.1.widen": "bottleneck"}
    ),
    "rounded": Family(stack(Block, RoundedGated), ids, gated(AT, "?")),
    "recurrent cell": Family(stack(lambda mlp: mlp, Recurrent), ids, plain(AT)),
    "attention over depth": Family(stack(lambda mlp: mlp, DepthAttention), ids, plain(AT)),
    "larger half": Family(stack(Block, LargerHalf), ids, packed(AT, "?")),
    "few features": Family(stack(Block, lambda: Up(few)), ids, plain(AT, "?")),
    "torch's encoder": Family(torch_encoder(), lambda: (states(),), plain("layers.{}", "relu", *LINEARS)),
    "torch's encoder, pre-norm": Family(
        torch_encoder(norm_first=True, activation="gelu"), lambda: (states(),), plain("layers.{}", "gelu", *LINEARS)
    ),
}

FAMILIES: dict[str, Family] = {**PRETRAINED, **BY_HAND}
