"""A causal language model as one step of generation: new tokens and the cache of the old ones in, logits and cache out.

Flow: one forward shows which cache the model keeps → `DecoderStep`, a module whose inputs and outputs are tensors alone →
example inputs for it. Names are those that runtimes of exported decoders know: `past_key_values.0.key`, `present.0.key`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import ExportError
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs, first_run

BATCH, PAST, NEW = 2, 5, 3  # of the example; distinct, so that no axis is taken for another
LENGTHS = {PAST: "past_sequence", PAST + NEW: "past_sequence + sequence"}
Pairs = list[dict[str, Tensor]]  # a layer's "key" and "value", [batch, heads, tokens, width] each


class DecoderStep(nn.Module):
    """One step of a causal language model: `[batch, sequence]` new tokens after `past_sequence` old ones.

    Any model will do that takes `past_key_values` and keeps keys and values of every token in every layer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Pairs, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """Every output of the model but its cache, and `present`: keys and values of old and new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache([(pair["key"], pair["value"]) for pair in past_key_values])
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache, "use_cache": True}
        out = self.model(**given) if position_ids is None else self.model(**given, position_ids=position_ids)
        tensors = {name: value for name, value in out.items() if name != "past_key_values" and isinstance(value, Tensor)}
        layers: list[Any] = cache.layers
        return {**tensors, "present": [{"key": layer.keys, "value": layer.values} for layer in layers]}


def step_of(model: Any) -> tuple[DecoderStep, Inputs]:
    """The model as a `DecoderStep`, and example inputs for it: 5 old tokens, 3 new ones, a batch of 2.

    Raises `ExportError` for a model without such a cache.
    """
    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in ("input_ids", "attention_mask", "past_key_values", "use_cache") if name not in accepted]
    if missing:
        raise _refused(model, f"its forward takes no {missing[0]!r}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _refused(model, "it is an encoder and a decoder, which are two files with two caches")
    ids = example_inputs(model)[1]["input_ids"][:BATCH, :PAST].to(model.device)
    cache = first_run(model, ((), {"input_ids": ids, "use_cache": True})).get("past_key_values")
    past = [_pair(model, layer) for layer in getattr(cache, "layers", ())]
    if not past:
        raise _refused(model, f"its cache is a {type(cache).__name__}")
    mask = torch.ones(BATCH, PAST + NEW, dtype=torch.int64, device=ids.device)
    inputs: dict[str, Any] = {"input_ids": ids[:, :NEW].contiguous(), "attention_mask": mask, "past_key_values": past}
    if "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(PAST, PAST + NEW, device=ids.device).repeat(BATCH, 1)
    return DecoderStep(model), ((), inputs)


def _pair(model: Any, layer: Any) -> dict[str, Tensor]:
    """A layer's keys and values for `PAST` tokens. A sliding window may be narrower: then the cache is cut, and refused."""
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(key, Tensor) or not isinstance(value, Tensor) or key.dim() != 4 or key.shape[2] != PAST:
        raise _refused(model, f"a {type(layer).__name__} does not keep keys and values of every token")
    return {"key": key.detach().clone(), "value": value.detach().clone()}


def _refused(model: Any, why: str) -> ExportError:
    return ExportError(
        f"this model cannot be exported with its cache: {why}", where=type(model).__name__, hint="export it without --with-past"
    )
