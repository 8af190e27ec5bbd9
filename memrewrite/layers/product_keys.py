"""Product keys: from a token to the slots it reads and their weights, without the full N × n key matrix.

Flow: query projection → scores of both halves with their √N keys → exact top-k of all sums → softmax per head.
It depends on torch and the kernels only, so that it can be used and measured without the recipe schema.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.kernels import ops
from memrewrite.layers.linear import empty_linear, scale_


class ProductKeys(nn.Module):
    """`(I, s)` of eq. (1) by product keys (§2.1): for every token and head, the k best slots and their softmax weights.

    Per head, slot i·√N + j has the key [K1_i, K2_j]; its score q·K is the sum of the two halves' scores. `keys` is
    [heads, 2, √N, key_dim / 2]. As in the paper, scores are not scaled by 1/√key_dim. With `qk_norm`, both halves of query
    and key go through an RMSNorm; the scale of the keys starts at (key_dim/2)^-1/2, so that scores start with unit variance.

    Args:
        d_model: Width of a token.
        n_keys: Keys per half (√N).
        heads: Independent queries per token (h).
        topk: Slots that each head selects (k).
        key_dim: Width of a query, both halves together (n); even.
        qk_norm: Normalize queries and keys.
        query_dropout: Dropout probability on the query in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        n_keys: int,
        *,
        heads: int,
        topk: int,
        key_dim: int,
        qk_norm: bool = True,
        query_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.topk, self.half_dim = heads, topk, key_dim // 2
        self.query_dropout = query_dropout
        self.query = empty_linear(d_model, heads * key_dim, device, dtype)
        self.keys = nn.Parameter(torch.empty(heads, 2, n_keys, self.half_dim, device=device, dtype=dtype))
        self.query_norm = nn.RMSNorm(self.half_dim, device=device, dtype=dtype) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.half_dim, device=device, dtype=dtype) if qk_norm else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Keys from U(±key_dim^-1/2), query Xavier-uniform, as in the paper.

        The query bias starts at zero: the paper does not specify it, and with a random bias all tokens would prefer the
        same slots at the start of training.
        """
        bound = (2 * self.half_dim) ** -0.5
        nn.init.uniform_(self.keys, -bound, bound, generator=generator)
        nn.init.xavier_uniform_(self.query.weight, generator=generator)
        nn.init.zeros_(self.query.bias)
        if self.query_norm is not None and self.key_norm is not None:
            nn.init.ones_(self.query_norm.weight)
            nn.init.constant_(self.key_norm.weight, self.half_dim**-0.5)

    def forward(self, x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """[T, d_model] -> slots (int64) and weights (fp32 or wider; their sum per head is 1), both [T, heads·k]."""
        q, keys = self._queries_and_keys(x)
        s, slots = ops.product_keys(q, keys, self.topk, backend=backend)  # [h, T, k]
        return slots.transpose(0, 1).flatten(1), s.transpose(0, 1).flatten(1)

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of queries [T, 2h, n/2] and keys [2h, √N, n/2], normalized with `qk_norm`."""
        q = F.dropout(self.query(x), self.query_dropout, self.training)
        q = q.view(-1, 2 * self.heads, self.half_dim)
        keys = self.keys.flatten(0, 1)
        if self.query_norm is not None and self.key_norm is not None:
            return self.query_norm(q), self.key_norm(keys)
        return q, keys

    @torch.no_grad()
    def score_std(self, x: Tensor) -> Tensor:
        """The standard deviation of a query's scores over all N slots: [T, d_model] -> [T], fp32 or wider.

        The scores of slot (i, j) are s1_i + s2_j, so their variance is the sum of the halves' variances; it is averaged over
        the heads.
        """
        q, keys = self._queries_and_keys(x)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("tad,and->tan", q.to(wide), keys.to(wide))  # [T, 2h, √N]
        variance = scores.var(-1, correction=0)  # [T, 2h]
        return (variance.sum(-1) / self.heads).sqrt()

    @torch.no_grad()
    def scale_scores(self, factor: float) -> None:
        """Multiply all scores by `factor`: the query projection, or with `qk_norm` the scale of the keys."""
        if self.key_norm is not None:
            self.key_norm.weight.mul_(factor)
            return
        scale_(self.query, factor)
