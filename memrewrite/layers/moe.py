"""MoE: a mixture of experts, each an MLP; the baseline of "Memory Layers at Scale" (arXiv 2412.09764, section 4).

Flow: x → router → each expert's tokens in groups of equal size → the experts as batched products → their outputs, weighted by
the router's probabilities and summed for each token.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from memrewrite.cost import Cost, dense_cost
from memrewrite.errors import ModelError, UserError
from memrewrite.layers.contract import LayerOptions, MemoryLayer, options_as
from memrewrite.layers.linear import empty_linear, scale_
from memrewrite.layers.mlp import MlpOptions, check_mlp, completed, shape_of
from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.layers.routing import by_experts, by_tokens, capacity_of
from memrewrite.site import Site


class MoeOptions(MlpOptions):
    """Options of `moe`; the defaults are those of the paper's baseline at 1.3b (arXiv 2412.09764, section 4).

    Attributes:
        experts: Number of experts.
        routing: "expert_choice": in training each expert takes its best tokens of the batch (arXiv 2202.09368);
            "token_choice": each token takes its best experts (arXiv 1701.06538). In eval mode tokens choose, with either.
        topk: Experts of each token, where tokens choose.
        capacity_factor: Expert choice: each expert takes `capacity_factor * tokens / experts` tokens.
    """

    experts: int = Field(4, ge=2, le=2**12, description="Number of experts.")
    routing: Literal["expert_choice", "token_choice"] = Field(
        "expert_choice",
        description="'expert_choice': in training each expert takes its best tokens of the batch, and in eval mode each token "
        "takes its best experts, as in the paper; 'token_choice': each token takes its best experts.",
    )
    topk: int = Field(1, ge=1, le=2**12, description="Experts of each token, where tokens choose.")
    capacity_factor: float = Field(
        1.0, ge=0.01, le=2**12, description="Expert choice: each expert takes capacity_factor × tokens / experts tokens."
    )


class Routing:
    """Statistics of one layer's last forward in train mode: a plain object that copies and saved files do not contain."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None  # [T, E]
        self.load: Tensor | None = None  # [E]

    def __getstate__(self) -> dict[str, None]:
        """Without statistics: they are part of one forward's graph."""
        return {"logits": None, "load": None}


class ExpertLinear(nn.Module):
    """One linear per expert, with uninitialized entries: `weight` [experts, d_in, d_out], `bias` [experts, d_out] or None."""

    def __init__(
        self,
        experts: int,
        d_in: int,
        d_out: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in, d_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, d_out, device=device, dtype=dtype)) if bias else None

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        experts, d_in, d_out = self.weight.shape
        return f"experts={experts}, in_features={d_in}, out_features={d_out}, bias={self.bias is not None}"

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """[G, n, d_in] -> [G, n, d_out]: group g by the expert `experts[g]`, or by the expert g if that is None."""
        weight = self.weight if experts is None else self.weight.index_select(0, experts)
        if self.bias is None:
            return torch.bmm(x, weight)
        bias = self.bias if experts is None else self.bias.index_select(0, experts)
        return torch.bmm(x, weight) + bias[:, None]


class Moe(MemoryLayer):
    """`output = sum_e p_e(x) * expert_e(x)` over the experts e that x is assigned to, `p = softmax(x Wr)` over all experts.

    Each expert is an MLP as `dense`. Expert choice (Zhou et al. 2022, arXiv 2202.09368; training in the paper): an expert takes
    the C tokens of the batch with the largest p_e, so all experts do the same work; a token may get several experts or none,
    and which depends on the whole batch, later tokens included. In eval mode each token takes its `topk` best experts (one in
    the paper), so its output depends on no other token. Token choice does so in training too; no token is dropped.
    Where tokens choose, a forward copies the weights of the experts in use, at most twice each.

    The router and the matrices start from N(0, fan_in^-1/2), the biases at zero. With `zero_output`, the experts' last
    matrices start at zero. The probabilities are computed in fp32 or wider. On CUDA devices training repeats bit for bit under
    `torch.use_deterministic_algorithms(True)`.
    """

    kind = "moe"
    Options = MoeOptions
    uses_pool = False
    regroups = True

    def __init__(
        self,
        d_model: int,
        d_out: int,
        options: LayerOptions,
        pool: Pool | None = None,
        *,
        zero_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.check(d_model, d_out, options, None)
        super().__init__(d_model, d_out, options, pool, zero_output=zero_output, device=device, dtype=dtype)
        mine = options_as(MoeOptions, options)
        self.shape, self.experts, self.topk = shape_of(mine), mine.experts, mine.topk
        self.expert_choice, self.capacity_factor = mine.routing == "expert_choice", mine.capacity_factor
        self.routing = Routing()

        def experts(d_in: int, width: int) -> ExpertLinear:
            return ExpertLinear(mine.experts, d_in, width, bias=self.shape.bias, device=device, dtype=dtype)

        self.router = empty_linear(d_model, mine.experts, device, dtype, bias=False)
        self.gate = experts(d_model, self.shape.d_hidden) if self.shape.gated else None
        self.up = experts(d_model, self.shape.d_hidden)
        self.down = experts(self.shape.d_hidden, d_out)

    @classmethod
    def complete(cls, options: LayerOptions, site: Site) -> LayerOptions:
        """The experts' width, gate, activation and biases as in the MLP, where the options do not say otherwise."""
        return completed(options_as(MoeOptions, options), site)

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` for more chosen experts than there are, or options of the other routing."""
        mine = options_as(MoeOptions, options)
        check_mlp(mine)
        if mine.topk > mine.experts:
            raise UserError(f"`topk: {mine.topk}` is more than {mine.experts} experts", hint=f"topk: {mine.experts} or less")
        if mine.routing == "token_choice" and mine.capacity_factor != 1:
            what = "`capacity_factor` is for expert choice: with `routing: token_choice` no token is dropped"
            raise UserError(what, hint="remove `capacity_factor`, or `routing: expert_choice`")
        if mine.capacity_factor > mine.experts:
            what = f"`capacity_factor: {mine.capacity_factor:g}` is more than {mine.experts} experts"
            raise UserError(what, hint="1, as in the paper: a token gets one expert on average")

    @classmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Cost of the router and all experts, of which a token uses `topk`.

        In training with expert choice it uses `capacity_factor` of them, on average.
        """
        mine = options_as(MoeOptions, options)
        weights, biases = shape_of(mine).size(d_model, d_out)
        one = dense_cost(weights, biases, itemsize)
        experts = Cost(
            parameters=mine.experts * one.parameters,
            parameter_bytes=mine.experts * one.parameter_bytes,
            flops=mine.topk * one.flops,
            bytes_read=mine.topk * one.bytes_read,
        )
        return dense_cost(d_model * mine.experts, 0, itemsize) + experts

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, fan_in^-1/2), biases zero; with `zero_output`, `down` is zero. No effect on meta tensors."""
        if self.router.weight.is_meta:
            return
        nn.init.normal_(self.router.weight, 0.0, self.d_model**-0.5, generator=generator)
        for linear in (self.gate, self.up, self.down):
            if linear is None:
                continue
            nn.init.normal_(linear.weight, 0.0, linear.weight.shape[1] ** -0.5, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.zero_output:
            nn.init.zeros_(self.down.weight)

    def scale_output(self, factor: float) -> None:
        """Multiply the experts' `down`, and so the layer's output, by `factor`."""
        scale_(self.down, factor)

    @property
    def load(self) -> Tensor | None:
        """Token choice: the assignments of each expert in the last forward in train mode, [experts] int64; else None."""
        return self.routing.load

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_out]; in eval mode, and with token choice, each token independently."""
        tokens = self.tokens_of(x)  # [T, d]
        logits = self.router(tokens)  # [T, E]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.softmax(-1)
        if self.training and self.expert_choice:
            out = self._by_experts(tokens, scores)
        else:
            out = self._by_tokens(tokens, scores, logits)
        return out.reshape(*x.shape[:-1], self.d_out)

    def _by_experts(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """[T, d] -> [T, d_out]: every expert takes its best tokens."""
        capacity = capacity_of(tokens.shape[0], self.experts, self.capacity_factor)
        weights, chosen = by_experts(scores, capacity)  # [E, C]
        rows = chosen.flatten()
        taken = tokens.index_select(0, rows).view(self.experts, capacity, self.d_model)
        y = self._mlps(taken, None)  # [E, C, d_out]
        y = y * weights.to(y.dtype)[..., None]
        return y.new_zeros(tokens.shape[0], self.d_out).index_add(0, rows, y.flatten(0, 1))

    def _by_tokens(self, tokens: Tensor, scores: Tensor, logits: Tensor) -> Tensor:
        """[T, d] -> [T, d_out]: every token takes its best experts."""
        best = scores.topk(self.topk, dim=1)  # [T, k]
        blocks = by_tokens(best.indices, self.experts)
        if self.training and not torch.compiler.is_exporting():
            self.routing.logits, self.routing.load = logits, blocks.load
        copies = tokens[:, None].expand(-1, self.topk, -1).flatten(0, 1)  # [T·k, d]
        rows = tokens.new_zeros(blocks.experts.shape[0], blocks.size, self.d_model).index_put(blocks.places, copies)
        y = self._mlps(rows, blocks.experts)[blocks.places]  # [T·k, d_out]
        y = y.view(-1, self.topk, self.d_out)
        return (y * best.values.to(y.dtype)[..., None]).sum(1)

    def _mlps(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """[G, n, d] -> [G, n, d_out], each group by one expert."""
        gate = None if self.gate is None else self.gate(x, experts)
        return self.down(self.shape.hidden(self.up(x, experts), gate), experts)  # type: ignore[no-any-return]


def aux_loss(model: nn.Module, *, balance: float = 0.01, z: float = 0.001) -> Tensor:
    """The auxiliary loss of the mixtures of experts with token choice, for their last forward in train mode.

    Of each layer `balance * E * sum_e f_e * P_e` (Switch, arXiv 2101.03961, eq. 4: f_e is the share of assignments that
    expert e got, P_e its mean probability; 1 for an even load) and `z * mean(logsumexp(logits)²)` (ST-MoE, arXiv 2202.08906,
    eq. 5), summed over the layers. Add it to the loss before `backward()`.

    Args:
        model: A rewritten model.
        balance: Weight of the load-balancing loss; 0.01 in both papers.
        z: Weight of the router z-loss; 0.001 in ST-MoE.

    Returns:
        A scalar, differentiable.

    Raises:
        ModelError: The model has no such layer, or one did not run in train mode since it was made, loaded or copied.

    Example:
        >>> loss = model(**batch).loss + memrewrite.aux_loss(model)
    """
    layers = [m for m in model.modules() if isinstance(m, Moe) and not m.expert_choice]
    if not layers:
        raise ModelError(
            "the model has no mixture of experts with token choice",
            hint="expert choice needs no auxiliary loss: every expert gets equally many tokens",
        )
    terms: list[Tensor] = []
    for layer in layers:
        logits, load = layer.routing.logits, layer.routing.load
        if logits is None or load is None:
            raise ModelError("a mixture of experts has not run in train mode yet", hint="model.train(), then one forward")
        count = max(logits.shape[0], 1)  # of no token the loss is 0, not 0/0
        shares, means = load / load.sum().clamp(min=1), logits.softmax(-1).sum(0) / count
        terms.append(balance * layer.experts * (shares * means).sum() + z * logits.logsumexp(-1).square().sum() / count)
    return torch.stack(terms).sum()
