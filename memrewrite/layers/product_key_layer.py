"""The layers that read a pool through product keys: their common options, base class, checks and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from memrewrite.cost import Cost, dense_cost
from memrewrite.errors import UserError
from memrewrite.kernels.backends import BACKENDS
from memrewrite.layers.contract import LayerOptions, MemoryLayer, options_as
from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.layers.product_keys import ProductKeys
from memrewrite.layers.references import ModuleAt
from memrewrite.site import dtype_named, itemsize_of

if TYPE_CHECKING:
    from memrewrite.usage.counter import ReadCounter

MAX_HEADS, MAX_WIDTH = 2**12, 2**16  # the paper: 4 heads, 32 slots, keys of at most 1024; larger numbers are mistakes


class ProductKeyOptions(LayerOptions):
    """How a layer addresses its pool: options shared by all product-key layers; heads, topk and key_dim as in arXiv 2412.09764.

    Attributes:
        heads: Independent queries per token; the values they read are summed.
        topk: Slots that each head reads (k), from 1 to the pool's keys per half.
        key_dim: Width of a query, both halves together; even. None: half of d_model, as in Memory+, and 4 at least.
        qk_norm: Normalize queries and keys (RMSNorm with a learned scale). The paper does so "when needed"; it is the
            default, because small models learn much less without it (measured in docs/knowledge.md).
        query_dropout: Dropout probability on the query in training, in [0, 1).
        dropout: Dropout probability on the values read (y) in training, in [0, 1).
    """

    heads: int = Field(4, gt=0, le=MAX_HEADS, description="Independent queries per token; the values they read are summed.")
    topk: int = Field(32, gt=0, le=MAX_WIDTH, description="Slots that each head reads (k); at most the pool's keys per half.")
    key_dim: int | None = Field(
        None,
        gt=0,
        le=MAX_WIDTH,
        description="Width of a query, both halves together; even. Default: half of d_model, as in Memory+, and 4 at least.",
    )
    qk_norm: bool = Field(
        True, description="Normalize queries and keys (RMSNorm, learned scale): small models learn much less without it."
    )
    query_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the query in training.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the values read (y) in training.")

    def query_width(self, d_model: int) -> int:
        """`key_dim`, or its default: half of d_model, rounded down to an even number, at least 4."""
        return self.key_dim or max(4, d_model // 4 * 2)


class ProductKeyLayer(MemoryLayer):
    """Base class of the kinds that read a pool through product keys: selects the slots and reads `y = s V_I`, eq. (1).

    Attributes:
        gated: True if the kind multiplies what it reads by a gate, and calls `counter.count_gate` with it.
        backend: Which kernels select the slots: that of the pool.
    """

    gated: ClassVar[bool] = False
    has_scores = True
    _pool: ModuleAt

    def __init__(
        self,
        d_model: int,
        d_out: int,
        options: ProductKeyOptions,
        pool: Pool | None,
        *,
        zero_output: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        spec = None if pool is None else pool.spec
        self.check(d_model, d_out, options, spec)
        super().__init__(d_model, d_out, options, pool, zero_output=zero_output, device=device, dtype=dtype)
        self.dropout, self.backend = options.dropout, needed(spec).backend
        self.product_keys = ProductKeys(
            d_model,
            needed(spec).keys,
            heads=options.heads,
            topk=options.topk,
            key_dim=options.query_width(d_model),
            qk_norm=options.qk_norm,
            query_dropout=options.query_dropout,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def check_trainable(cls, d_model: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` where the weights or the normalized queries are constant, so that queries and keys do not learn."""
        mine = options_as(ProductKeyOptions, options)
        if mine.topk == 1:
            what = "`topk: 1` cannot be trained: the softmax over one slot is always 1, so queries and keys get no gradient"
            raise UserError(what, hint="topk: 2 or more; 32, as in the paper")
        key_dim = mine.query_width(d_model)
        if mine.qk_norm and key_dim == 2:
            what = f"`qk_norm` with `key_dim: {key_dim}` cannot be trained: a norm keeps only the sign of one entry"
            raise UserError(what, hint="key_dim: 4 or more, or qk_norm: false")

    @classmethod
    def check_device(cls, options: LayerOptions, pool: PoolSpec | None, device: torch.device, dtype: torch.dtype) -> None:
        """Raise `UserError` if the pool names a backend that does not support this layer's calls on `device`."""
        mine, spec = options_as(ProductKeyOptions, options), needed(pool)
        backend = next((one for one in BACKENDS if spec.backend == one.NAME), None)
        if backend is None:  # "auto"
            return
        one = torch.empty(1, 1, device=device)  # expanded: the shapes of a call without its memory
        stored = dtype if spec.dtype is None else dtype_named(spec.dtype)
        values, scale = one.to(stored).expand(spec.slots, spec.value_dim), one[0].expand(spec.slots)
        indices = one.long().expand(1, mine.heads * mine.topk)
        weights = one.to(torch.float64 if stored == torch.float64 else torch.float32).expand_as(indices)
        scores = one.to(dtype).expand(mine.heads, spec.keys)
        reason = backend.supports(values, indices, weights, scale if stored.itemsize == 1 else None)
        reason = reason or backend.supports_topk(scores, scores, mine.topk)
        if reason:
            what = f"`backend: {spec.backend}` cannot run this layer on {device}: {reason}"
            raise UserError(what, hint="backend: auto, which selects the fastest that can")

    def score_std(self, x: Tensor) -> Tensor:
        """As `ProductKeys.score_std`."""
        return self.product_keys.score_std(x)

    def scale_scores(self, factor: float) -> None:
        """As `ProductKeys.scale_scores`."""
        self.product_keys.scale_scores(factor)

    def read(self, tokens: Tensor) -> Tensor:
        """`y`: [T, d_model] -> [T, d_v], in the dtype of the tokens; one lookup sums the rows of all heads."""
        slots, s = self.select(tokens)
        y: Tensor = self._pool()(slots, self.weights(tokens, slots, s), tokens.dtype).to(tokens.dtype)
        return F.dropout(y, self.dropout, self.training)

    def select(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (int64) and weights, both [T, heads·topk], of tokens [T, d_model]; counted while the layer is watched."""
        slots, s = self.product_keys(tokens, self.backend)
        if self.counter is not None:
            self.counter.count(slots, s)
        return slots, s

    def read_counter(self) -> ReadCounter:
        """A new counter of the slots that `select` returns."""
        from memrewrite.usage.counter import ReadCounter

        keys, n = self.product_keys, self.product_keys.keys.shape[2]
        return ReadCounter((n, n), keys.heads, keys.topk, gated=self.gated, device=keys.keys.device)

    def weights(self, tokens: Tensor, slots: Tensor, s: Tensor) -> Tensor:
        """The weights of the rows that `read` sums: by default the softmax weights themselves.

        Args:
            tokens: [T, d_model].
            slots: The slots of each token, [T, heads·topk].
            s: Their softmax weights, [T, heads·topk].

        Returns:
            [T, heads·topk].
        """
        return s


def needed(pool: PoolSpec | None) -> PoolSpec:
    """`pool` itself. Raises `UserError` if it is None."""
    if pool is None:
        raise UserError("this layer reads a pool, and none is set", hint="name one of the recipe's `pools`")
    return pool


def check_product_keys(d_model: int, options: ProductKeyOptions, pool: PoolSpec | None) -> None:
    """Raise `UserError` for a missing pool, an odd `key_dim`, or a `topk` above the pool's keys."""
    keys, key_dim = needed(pool).keys, options.query_width(d_model)
    if key_dim % 2:
        raise UserError(f"`key_dim: {key_dim}` is odd: a key has two equal halves", hint=f"key_dim: {key_dim + 1}")
    if options.topk < 1:
        raise UserError(f"`topk: {options.topk}`: a head must read at least one slot", hint="topk: 32, as in the paper")
    if options.topk > keys:
        raise UserError(
            f"`topk: {options.topk}` is more than the pool's {keys} keys per half",
            hint=f"topk: {keys} or less, or a pool with more `keys`",
        )


def product_key_cost(d_model: int, options: ProductKeyOptions, pool: PoolSpec | None, itemsize: int) -> Cost:
    """Cost of query, half keys and lookup: d·h·n + h·√N·n + h·k·d_v multiply-adds per token, with n = key_dim.

    Softmax, top-k and norms are not counted.
    """
    spec, key_dim = needed(pool), options.query_width(d_model)
    queries = options.heads * key_dim
    scales = key_dim if options.qk_norm else 0  # the two norms' scales, key_dim / 2 each
    dense = dense_cost(d_model * queries + queries * spec.keys, queries + scales, itemsize)
    return dense + rows_cost(options, spec, spec.value_dim, itemsize)


def rows_cost(options: ProductKeyOptions, pool: PoolSpec, width: int, itemsize: int) -> Cost:
    """Cost of one multiply-add per entry of the rows that a token reads from a table of the pool, whose rows have `width`."""
    entries = options.heads * options.topk * width
    row_itemsize = itemsize if pool.dtype is None else itemsize_of(pool.dtype)
    return Cost(flops=2 * entries, bytes_read=entries * row_itemsize)
