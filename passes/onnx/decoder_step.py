"""One generation step of a causal language model: from new tokens and the old cache to logits and the new cache.

Flow: one forward shows which cache the model returns, and so which argument takes it → `DecoderStep`, a module whose inputs and
outputs are tensors only → example inputs for it. Runtimes of exported decoders expect the names `past_key_values.0.key` and
`present.0.key`; the file uses them whatever the model's own argument is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import ExportError
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs, run

BATCH, PAST, NEW = 2, 5, 3  # sizes of the example; distinct, so that axes can be distinguished by size
LENGTHS = {PAST: "past_sequence", PAST + NEW: "past_sequence + sequence"}
CACHE_ARGUMENTS = ("cache", "past_key_values")  # the name since transformers 5.24, and the name before
Pairs = list[dict[str, Tensor]]  # "key" and "value" of each layer, [batch, heads, tokens, width] each


class DecoderStep(nn.Module):
    """One step of a causal language model: `[batch, sequence]` new tokens after `past_sequence` old ones.

    The model must take a cache as `cache_argument` and must store keys and values of every token in every layer.
    """

    def __init__(self, model: nn.Module, cache_argument: str) -> None:
        super().__init__()
        self.model, self.cache_argument = model, cache_argument

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Pairs, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """Every tensor output of the model, and `present`: keys and values of old and new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache([(pair["key"], pair["value"]) for pair in past_key_values])
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, self.cache_argument: cache, "use_cache": True}
        out = self.model(**kwargs) if position_ids is None else self.model(**kwargs, position_ids=position_ids)
        tensors = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        layers: list[Any] = cache.layers
        return {**tensors, "present": [{"key": layer.keys, "value": layer.values} for layer in layers]}


def step_of(model: Any) -> tuple[DecoderStep, Inputs]:
    """The model as a `DecoderStep`, and example inputs for it: 5 old tokens, 3 new ones, a batch of 2.

    Raises `ExportError` if the model has no such cache.
    """
    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in ("input_ids", "attention_mask", "use_cache") if name not in accepted]
    if missing:
        raise _refused(model, f"its forward takes no {missing[0]!r}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _refused(model, "it is an encoder and a decoder, which are two files with two caches")
    ids = example_inputs(model)[1]["input_ids"][:BATCH, :PAST].to(model.device)
    output = run(model, ((), {"input_ids": ids, "use_cache": True}))
    cache_argument, past = _cache_of(model, output, accepted)
    mask = torch.ones(BATCH, PAST + NEW, dtype=torch.int64, device=ids.device)
    inputs: dict[str, Any] = {"input_ids": ids[:, :NEW].contiguous(), "attention_mask": mask, "past_key_values": past}
    if "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(PAST, PAST + NEW, device=ids.device).repeat(BATCH, 1)
    return DecoderStep(model, cache_argument), ((), inputs)


def _cache_of(model: Any, output: Any, accepted: Collection[str]) -> tuple[str, Pairs]:
    """The name of the forward's argument that takes a cache, and the keys and values of the cache in `output`.

    The cache is the field of `output` that has layers. The argument usually has the name of that field; the two differ when
    the model's code is older than the installed transformers, which renames the field.
    """
    fields = dict(output) if isinstance(output, Mapping) else {}
    found = {name: layers for name, value in fields.items() if (layers := getattr(value, "layers", None))}
    if not found:
        others = [type(value).__name__ for value in fields.values() if not isinstance(value, Tensor)]
        raise _refused(model, f"it returns no cache with layers (outputs that are no tensors: {', '.join(others) or 'none'})")
    field, layers = next(iter(found.items()))
    argument = next((name for name in (field, *CACHE_ARGUMENTS) if name in accepted), None)
    if argument is None:
        raise _refused(model, f"it returns its cache as {field!r}, and its forward takes no argument for it")
    return argument, [_pair(model, layer) for layer in layers]


def _pair(model: Any, layer: Any) -> dict[str, Tensor]:
    """A layer's keys and values for `PAST` tokens. A sliding window narrower than that drops tokens, and is refused."""
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(key, Tensor) or not isinstance(value, Tensor) or key.dim() != 4 or key.shape[2] != PAST:
        raise _refused(model, f"a {type(layer).__name__} does not keep keys and values of every token")
    return {"key": key.detach().clone(), "value": value.detach().clone()}


def _refused(model: Any, why: str) -> ExportError:
    return ExportError(
        f"this model cannot be exported with its cache: {why}", where=type(model).__name__, hint="export it without --with-past"
    )
