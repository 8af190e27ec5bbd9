"""Starts queries from data: centred and whitened on a few batches, with scores of a chosen deviation.

Flow: hooks on every set of product keys → one pass over the batches: mean and covariance of its inputs → new query weights and
biases, all computed before the first is written → a second pass, which counts the slots that are read now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memrewrite.errors import ModelError, UserError
from memrewrite.frozen import Frozen
from memrewrite.layers.product_keys import ProductKeys
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import Inputs, as_inputs, evaluating, on_device_of, on_meta, run

MASK = "attention_mask"  # the keyword argument by which padded batches name their tokens

EQUAL = 1e-20  # times the energy of the mean: a smaller variance is that of rounding in float64


class LayerCalibration(Frozen):
    """What `calibrate` did to one layer, measured on its batches.

    Attributes:
        path: Path of the layer.
        tokens: Tokens it saw.
        slots: Slots of its pool.
        mean_share: Share of the mean in the energy of its inputs, |E x|² / E |x|².
        slots_before: Different slots that the tokens read before.
        slots_after: The same, with the new queries.
        deviation_before: Standard deviation of a token's scores over all slots, averaged over heads and tokens (rms), before.
        deviation_after: The same, with the new queries.
    """

    path: str
    tokens: int
    slots: int
    mean_share: float
    slots_before: int
    slots_after: int
    deviation_before: float
    deviation_after: float


class Calibration(Frozen):
    """The result of `calibrate`: one entry for each layer, in the order of the model's modules."""

    layers: tuple[LayerCalibration, ...]


@exclusive
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, deviation: float | None = 1.0, shrinkage: float = 0.1
) -> Calibration:
    """Set the queries of every product-key layer so that they are spread evenly over the keys; call it before training.

    Most of the energy of a layer's inputs is their mean, and most of the rest lies in few directions. Queries of such inputs
    are almost equal, and so are the slots they select. For every half of every head, with the query q = W x + b and its
    covariance C over the tokens of the batches, this sets `W <- c S^(-1/2) W` with `S = (1 - a) C + a (tr C / m) I` (m is the
    width of a half query), and `b <- -W E[x]`: queries have mean zero, and about the same deviation in every direction. The
    factor c sets the deviation of the scores. Keys, values and all other parameters keep their values, so a layer whose output
    is zero still has an output of zero. Gradients, modes and random states do not change.

    The batches run twice, in eval mode and without gradients. Memory: one float64 matrix [d_model, d_model] for each layer.
    All layers are measured in one pass: where a layer that is not zero comes before another one, call this twice.

    Args:
        model: A rewritten model, with its weights.
        batches: Inputs of the model, each a tensor, a tuple, a dict or a pair `(args, kwargs)`, such as 5 batches of training
            data. In batches that have an `attention_mask` of the shape of the tokens, those with the mask 0 are left out.
        deviation: Standard deviation of a token's scores over all slots, of every head. None: as before, on average over the
            heads of a layer. With `qk_norm` the norms set it, and queries get an rms of 1.
        shrinkage: a, in (0, 1]: the larger, the less are directions of small variance amplified, by at most a^(-1/2). 1:
            queries are centred and scaled, but not whitened.

    Returns:
        Slots in use and deviation of the scores, before and after, for each layer.

    Raises:
        UserError: `batches` has no batch, or is one batch; a number is out of its range.
        ModelError: The model has no product-key layer, or is on meta; a layer got no tokens, inputs that are not finite, or
            only equal inputs; or its dtype cannot hold the new weights. No parameter was changed.

    Example:
        >>> report = memrewrite.apply(model, recipe, batches[0])
        >>> print(memrewrite.calibrate(model, batches).layers[0].slots_after)
    """
    _check_numbers(deviation, shrinkage)
    found = _product_keys(model)
    inputs = _inputs(model, batches)
    before = {path: _Inputs(keys) for path, keys in found.items()}
    _watch(model, found, inputs, before)
    starts = {path: _start(path, found[path], seen, deviation, shrinkage) for path, seen in before.items()}
    with torch.no_grad():
        for path, (weight, bias) in starts.items():
            found[path].query.weight.copy_(weight)
            found[path].query.bias.copy_(bias)
    after = {path: _Reads(keys) for path, keys in found.items()}
    _watch(model, found, inputs, after)
    return Calibration(layers=tuple(_report(path, before[path], after[path]) for path in found))


# ------------------------------------------------------------------------------------------------------------- arguments


def _check_numbers(deviation: float | None, shrinkage: float) -> None:
    if deviation is not None and not 0 < deviation < float("inf"):
        raise UserError(f"`deviation={deviation}`: the deviation of the scores must be positive", hint="1.0, or None")
    if not 0 < shrinkage <= 1:
        raise UserError(f"`shrinkage={shrinkage}` is not in (0, 1]", hint="0.1")


def _product_keys(model: nn.Module) -> dict[str, ProductKeys]:
    """Every set of product keys, by the path of its layer."""
    if on_meta(model):
        raise ModelError("the model is on meta: its layers have no inputs to measure", hint="load its weights first")
    found = {path.rpartition(".")[0]: m for path, m in model.named_modules() if isinstance(m, ProductKeys)}
    if not found:
        hint = "rewrite it with memrewrite.apply, and a kind that reads a pool"
        raise ModelError("this model has no layer with product keys", where=type(model).__name__, hint=hint)
    return found


def _inputs(model: nn.Module, batches: Iterable[Any]) -> list[Inputs]:
    if isinstance(batches, (Tensor, Mapping)):
        raise UserError(f"`batches` is one {type(batches).__name__}, not several batches", hint="give a list: [batch]")
    inputs = [on_device_of(model, as_inputs(batch)) for batch in batches]
    if not inputs:
        raise UserError("`batches` contains no batch", hint="give a list with a few batches of training data")
    return inputs


# ----------------------------------------------------------------------------------------------------------- measurement


class _Moments:
    """Count, mean [d] and scatter matrix [d, d] of tokens that come in parts, in float64 (Chan et al. 1983)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count, self.energy = 0, 0.0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add the tokens `x` [T, d]."""
        x = x.double()
        total = self.count + len(x)
        mean = x.mean(0)
        step = mean - self.mean
        centred = x - mean
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(x) / total)
        self.mean += step * (len(x) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """[d, d], over all tokens."""
        return self.scatter / self.count


class _Reads:
    """Records the calls of one set of product keys: which slots are read, and the variance of the scores."""

    def __init__(self, keys: ProductKeys) -> None:
        device = keys.keys.device
        self.tokens = 0
        self.mask: Tensor | None = None  # of the batch that runs
        self.slots = torch.zeros(keys.keys.shape[2] ** 2, dtype=torch.bool, device=device)
        self._variance = torch.zeros((), dtype=torch.float64, device=device)
        self._spread = _key_covariance(keys)

    def hook(self, keys: ProductKeys, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """A forward hook of the product keys."""
        x, slots = args[0].detach(), output[0]
        if self.mask is not None and self.mask.numel() == len(x):
            real = self.mask.flatten().to(device=x.device, dtype=torch.bool)
            x, slots = x[real], slots[real]
        if len(x):
            self.add(keys, x, slots)

    def add(self, keys: ProductKeys, x: Tensor, slots: Tensor) -> None:
        """Add tokens `x` [T, d] and the slots [T, h·k] that they read."""
        q = keys.query(x).view(len(x), -1, keys.half_dim)
        q = (q if keys.query_norm is None else keys.query_norm(q)).double()
        self._variance += torch.einsum("tam,amn,tan->", q, self._spread, q) / keys.heads
        self.slots[slots.flatten()] = True
        self.tokens += len(x)

    def deviation(self) -> float:
        """Standard deviation of a token's scores over all slots; rms over heads and tokens."""
        return float((self._variance / self.tokens).sqrt())


class _Inputs(_Reads):
    """Records also mean and covariance of the inputs."""

    def __init__(self, keys: ProductKeys) -> None:
        super().__init__(keys)
        self.moments = _Moments(keys.query.in_features, keys.keys.device)

    def add(self, keys: ProductKeys, x: Tensor, slots: Tensor) -> None:
        super().add(keys, x, slots)
        self.moments.add(x)


def _key_covariance(keys: ProductKeys) -> Tensor:
    """The covariance of the half keys [2h, m, m]: the scores of q have the variance `q C q` over the keys of a half."""
    half_keys = keys.keys.flatten(0, 1).detach()
    half_keys = (half_keys if keys.key_norm is None else keys.key_norm(half_keys).detach()).double()  # [2h, √N, m]
    centred = half_keys - half_keys.mean(1, keepdim=True)
    return centred.mT @ centred / half_keys.shape[1]


def _watch(model: nn.Module, found: dict[str, ProductKeys], inputs: list[Inputs], watches: Mapping[str, _Reads]) -> None:
    """Run the batches with the watches' hooks. Raises `ModelError` for layers that got no tokens."""
    with evaluating(model), ExitStack() as hooks:
        for path, watch in watches.items():
            hooks.callback(found[path].register_forward_hook(watch.hook).remove)
        for batch in inputs:
            mask = batch[1].get(MASK)
            for watch in watches.values():
                watch.mask = mask if isinstance(mask, Tensor) else None
            run(model, batch)
    unseen = [path for path, watch in watches.items() if not watch.tokens]
    if unseen:
        raise ModelError("a memory layer got no tokens in these batches", where=unseen[0], hint="give batches that reach it")


# ------------------------------------------------------------------------------------------------------------ the start


class _Query(NamedTuple):
    weight: Tensor
    bias: Tensor


def _start(path: str, keys: ProductKeys, seen: _Inputs, deviation: float | None, shrinkage: float) -> _Query:
    """The query's new weight and bias, in its dtype. Raises `ModelError` where there are none."""
    moments, weight = seen.moments, keys.query.weight.detach()
    covariance = moments.covariance()
    if not bool(covariance.isfinite().all() and moments.mean.isfinite().all()):
        raise ModelError("the inputs of a memory layer are not finite", where=path, hint="look for NaN and inf in the batches")
    halves = weight.double().view(-1, keys.half_dim, weight.shape[1])  # [2h, m, d]
    c = halves @ covariance @ halves.mT  # [2h, m, m]
    level = c.diagonal(dim1=-2, dim2=-1).mean(-1)  # [2h]
    if not bool((level > EQUAL * (halves @ moments.mean).square().mean(-1)).all()):
        what = f"all {seen.tokens} tokens have equal inputs, or its query weights are zero"
        raise ModelError(f"a memory layer cannot be calibrated: {what}", where=path, hint="give more, and different, tokens")
    eye = torch.eye(keys.half_dim, dtype=c.dtype, device=c.device)
    values, vectors = torch.linalg.eigh((1 - shrinkage) * c + shrinkage * level[:, None, None] * eye)
    white = vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT  # S^(-1/2)
    scale = _scale(keys, white @ c @ white, seen.deviation() if deviation is None else deviation)
    new = (scale[:, None, None] * (white @ halves)).view(weight.shape).to(weight.dtype)
    bias = -(new.double() @ moments.mean).to(weight.dtype)  # of the rounded weight: queries have mean zero
    if not bool(new.isfinite().all() and bias.isfinite().all()):
        what = f"the new query weights of a memory layer are too large for {str(weight.dtype).removeprefix('torch.')}"
        raise ModelError(what, where=path, hint="use bfloat16 or float32, or a smaller `deviation`")
    return _Query(new, bias)


def _scale(keys: ProductKeys, covariance: Tensor, deviation: float) -> Tensor:
    """The factor [2h] of queries with this covariance [2h, m, m] for which their scores have the deviation.

    Both halves of a slot's score get the same variance.
    """
    if keys.query_norm is not None:
        return covariance.diagonal(dim1=-2, dim2=-1).mean(-1).rsqrt()
    variance = (covariance * _key_covariance(keys)).sum((-2, -1))  # E q C q, for queries of mean zero
    return deviation / (2 * variance).sqrt()


def _report(path: str, before: _Inputs, after: _Reads) -> LayerCalibration:
    mean = before.moments.mean.square().sum()
    total = mean + before.moments.scatter.diagonal().sum() / before.moments.count
    return LayerCalibration(
        path=path,
        tokens=before.tokens,
        slots=len(before.slots),
        mean_share=float(mean / total),
        slots_before=int(before.slots.sum()),
        slots_after=int(after.slots.sum()),
        deviation_before=before.deviation(),
        deviation_after=after.deviation(),
    )
