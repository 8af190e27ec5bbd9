"""PEER: a mixture of experts with one hidden neuron each ("Mixture of A Million Experts", He 2024, arXiv 2407.04153; MoME).

Flow: x → slots and weights → each weight times gelu(u_i · x) → the weighted sum of values v_i → a projection, only where `Pkm`
has one.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from memrewrite.cost import Cost
from memrewrite.errors import UserError
from memrewrite.layers.contract import LayerOptions, options_as
from memrewrite.layers.pkm import Pkm, PkmOptions
from memrewrite.layers.pool import PoolSpec
from memrewrite.layers.product_key_layer import needed, rows_cost


class PeerOptions(PkmOptions):
    """Options of `peer`; the defaults are those of Memory+, as for the baseline PEER of arXiv 2412.09764."""


class Peer(Pkm):
    """`output = sum over heads and slots i of s_i gelu(u_i · x) v_i`: Algorithm 1 of arXiv 2407.04153.

    It is `pkm` with the weights `s_i gelu(u_i · x)`: s_i is the softmax of the scores of one head, gelu the exact one, u_i row
    i of the pool's `inputs` and v_i of its values. The PEER paper also normalizes queries, by a batch norm, which mixes tokens:
    `qk_norm` is the choice here.
    """

    kind = "peer"
    Options = PeerOptions
    reads_inputs = True
    gated = True

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` as `Pkm.check`, and for a pool whose rows u are missing or not `d_model` wide."""
        super().check(d_model, d_out, options_as(PeerOptions, options), pool)
        width = needed(pool).input_dim
        if width != d_model:
            found = "the pool has no input weights" if width is None else f"the pool's input weights are {width} wide"
            raise UserError(f"{found}, and the layer's input is {d_model} wide", hint=f"PoolSpec(input_dim={d_model})")

    @classmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Cost of `Pkm`, and of the rows u."""
        values = super().cost(d_model, d_out, options, pool, itemsize, zero_output=zero_output)
        return values + rows_cost(options_as(PeerOptions, options), needed(pool), d_model, itemsize)

    def weights(self, tokens: Tensor, slots: Tensor, s: Tensor) -> Tensor:
        """`s_i gelu(u_i · x)`, [T, heads·topk], fp32 or wider; while the layer is watched, its gate is gelu(u_i · x)."""
        hidden = F.gelu(self._pool()(slots, tokens, table="inputs"))
        if self.counter is not None:
            self.counter.count_gate(hidden)
        return s * hidden
