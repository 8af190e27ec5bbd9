"""Sizes in a config that no input can have are one error, before memory is used."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from memrewrite.errors import ModelError
from memrewrite.passes.models.example_inputs import example_inputs

CASES = [
    ("llama", {"max_position_embeddings": -1}),
    ("llama", {"max_position_embeddings": [3]}),
    ("llama", {"vocab_size": 10**15}),
    ("llama", {"vocab_size": 0.5}),
    ("llama", {"vocab_size": "x"}),
    ("vit", {"image_size": 10**7}),
    ("vit", {"image_size": 0}),
    ("vit", {"image_size": [8]}),
    ("vit", {"num_channels": -3}),
    ("vit", {"num_channels": "x"}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_sizes_that_no_input_can_have(name: str, fields: dict[str, Any]) -> None:
    model, _ = tiny.named(name)
    for field, value in fields.items():
        vars(model.config)[field] = value
    with pytest.raises(ModelError, match="no example inputs can be created") as caught:
        example_inputs(model)
    assert caught.value.where
    assert caught.value.hint
