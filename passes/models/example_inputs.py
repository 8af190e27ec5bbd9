"""Example inputs for a Hugging Face model without any: created from its config and forward signature.

No model family is known here. Flow: the main input's name → a tensor of the sizes that the config states → the other inputs
that its forward needs.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from memrewrite.errors import ModelError, in_one_line
from memrewrite.passes.models.forward import Inputs

BATCH, SEQUENCE, DECODER_SEQUENCE, SAMPLES = 2, 16, 12, 8000  # distinct, so that every axis can be recognized by its size
SEED = 0
LARGEST = 2**28  # elements of an input: a config may come from a file that is damaged


def example_inputs(model: Any) -> Inputs:
    """Random inputs of distinct sizes for a Hugging Face model.

    Raises `ModelError` for another model, or one whose main input is of an unknown kind.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        hint = "write a model.py with `build()` and `inputs()`"
        raise ModelError(f"no example inputs can be created for a {type(model).__name__}", hint=hint)
    try:
        return (), _inputs(model, config, main)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # numbers of a config file that are no sizes
        what, hint = (
            f"no example inputs can be created from the model's config: {in_one_line(error)}",
            "correct its config.json",
        )
        raise ModelError(what, where=type(config).__name__, hint=hint) from error


def _inputs(model: Any, config: Any, main: str) -> dict[str, Any]:
    make = _Maker(model, config)
    inputs: dict[str, Any] = {main: make.tensor(main)}
    accepted = inspect.signature(model.forward).parameters
    both = hasattr(config, "vision_config") and not make.special_names("image_token")
    if both and "pixel_values" in accepted:  # two towers, which run only together
        inputs["pixel_values"] = make.tensor("pixel_values")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = make.ids(DECODER_SEQUENCE, decoder=True)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


class _Maker:
    """Creates one tensor at a time, from one RNG with a fixed seed."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        self.configs = [config, *(part for part in parts if part is not None)]
        self.random = torch.Generator().manual_seed(SEED)

    def tensor(self, name: str) -> Tensor:
        """The input that the forward has under this name."""
        if name == "input_ids":
            return self.ids(SEQUENCE)
        if name == "pixel_values":
            size = self._number("image_size", 32)
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            return self._floats(BATCH, int(self._number("num_channels", 3)), int(height), int(width))
        bins = self._number("num_mel_bins", None)
        if name == "input_features" and bins:  # two spectrogram frames become one position
            return self._floats(BATCH, int(bins), 2 * int(self._number("max_source_positions", 1500)))
        if name == "input_values" and bins:
            return self._floats(BATCH, int(self._number("max_length", 1024)), int(bins))
        if name == "input_values":
            return self._floats(BATCH, SAMPLES)
        raise ModelError(
            f"no example can be created for the input {name!r} of {type(self.model).__name__}",
            hint="write a model.py with `build()` and `inputs()`",
        )

    def ids(self, length: int, *, decoder: bool = False) -> Tensor:
        """Random token ids [batch, length], without special tokens (padding, images)."""
        text = self.config.get_text_config(decoder=decoder or None)
        vocabulary = int(getattr(text, "vocab_size", None) or self._number("vocab_size", 2))
        length = min(length, int(getattr(text, "max_position_embeddings", None) or length))
        special = [i for i in self.special_names("").values() if i < vocabulary]
        allowed = torch.ones(_sized(vocabulary), dtype=torch.bool)
        allowed[special] = False
        usable = allowed.nonzero().flatten() if allowed.any() else torch.arange(vocabulary)
        return usable[torch.randint(len(usable), (BATCH, length), generator=self.random)]

    def special_names(self, start: str) -> dict[str, int]:
        """The ids of the configs' special tokens whose names start with `start`."""
        everything = {name: value for config in self.configs for name, value in vars(config).items()}
        named = {n: v for n, v in everything.items() if n.endswith(("_token_id", "_token_index"))}
        return {n: v for n, v in named.items() if n.startswith(start) and isinstance(v, int) and v >= 0}

    def _floats(self, *shape: int) -> Tensor:
        _sized(*shape)
        return torch.randn(shape, generator=self.random).to(self.model.dtype)

    def _number(self, name: str, default: Any) -> Any:
        return next((value for c in self.configs if (value := getattr(c, name, None)) is not None), default)


def _sized(*shape: int) -> int:
    """The elements of a tensor of this shape. Raises ValueError where there are more than `LARGEST`."""
    count = math.prod(shape)
    if not 0 < count <= LARGEST or min(shape) < 1:
        raise ValueError(f"an input of the shape {shape}")
    return count
