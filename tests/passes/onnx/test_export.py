"""Exported files: their contents, the same results as PyTorch on stock runtimes, and models that cannot be exported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import near
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_files import File, arrays, difference, layers
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

import memrewrite
from memrewrite import atomic_write
from memrewrite.errors import ExportError
from memrewrite.kernels import reference
from memrewrite.kernels.onnx_functions import DOMAIN, functions
from memrewrite.passes.onnx import file as onnx_file

MODELS = ("modular", "llama", "t5", "vit")
MakeFile = Callable[..., File]
NEAR = 1e-4  # relative to the norm of the reference, fp32


def run(path: Path, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Outputs of stock onnxruntime, without the library."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)


def resized(inputs: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    """Token ids and masks of another batch and length; other tensors are repeated along the batch."""
    values = {}
    for seed, (name, value) in enumerate(inputs.items()):
        if name == "attention_mask":
            values[name] = torch.ones(batch, length, dtype=torch.int64)
            values[name][0, : length // 2] = 0  # one shorter text, padded on the left
        elif isinstance(value, Tensor) and value.dtype == torch.int64:
            values[name] = tiny.tokens(batch, length, seed)
        else:
            values[name] = value[:1].expand(batch, *value.shape[1:]) if isinstance(value, Tensor) else value
    return values


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_the_model_does_at_any_batch_and_length(name: str, exported: MakeFile) -> None:
    file = exported(name)
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    for batch, length in ((2, 5), (1, 1), (3, 17)):
        inputs = resized(file.inputs, batch, length)
        found = session.run(None, arrays(inputs))
        assert difference(found[0], tiny.values_of(file.model, inputs)) < NEAR
        assert all(np.isfinite(out).all() for out in found)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_valid_and_its_shapes_are_inferred(name: str, exported: MakeFile) -> None:
    file = exported(name)
    onnx.checker.check_model(str(file.path), full_check=True)
    model = onnx.shape_inference.infer_shapes(onnx.load(file.path), check_type=True, strict_mode=True, data_prop=True)
    first = model.graph.output[0].type.tensor_type.shape.dim
    assert first[0].dim_param == "batch"
    assert model.ir_version == 9
    assert {i.domain: i.version for i in model.opset_import} == {"": 20, DOMAIN: 1}


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_the_reference_evaluator_runs_a_file(name: str, exported: MakeFile) -> None:
    file = exported(name)
    found = ReferenceEvaluator(str(file.path)).run(None, arrays(file.inputs))
    assert difference(found[0], tiny.values_of(file.model, file.inputs)) < NEAR


def test_the_table_is_stored_once_and_names_are_those_of_the_model(exported: MakeFile) -> None:
    graph = onnx.load(exported("t5").path).graph
    assert [tuple(i.dims) for i in graph.initializer if i.name.startswith("memory.")] == [(64, tiny.WIDTH)]
    assert [i.name for i in graph.input] == ["input_ids", "decoder_input_ids"]
    assert [i.name for i in graph.output] == ["logits", "encoder_last_hidden_state"]
    assert [d.dim_param for d in graph.input[1].type.tensor_type.shape.dim] == ["batch", "decoder_sequence"]
    names = {i.name for i in graph.initializer}
    assert "decoder.block.0.layer.2.DenseReluDense.product_keys.query.weight" in names


@pytest.mark.parametrize(("op", "domains"), [("both", {DOMAIN}), ("native", {DOMAIN}), ("standard", set())])
def test_memory_operators_are_written_as_requested(op: str, domains: set[str], exported: MakeFile) -> None:
    file = exported("modular", op=op)
    model = onnx.load(file.path)
    assert {node.domain for node in model.graph.node} - {""} == domains
    assert {f.name for f in model.functions} == ({"SparseLookup", "ProductKeyTopk"} if op == "both" else set())
    assert sum(file.exported.nodes.values()) == (6 if domains else 0)
    slots = [value for node in model.graph.node for value in node.output if value.endswith(".slots")]
    assert slots == ["memory.0.slots", "memory.1.slots", "memory.2.slots"]
    if op == "native":
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match=r"SparseLookup|ProductKeyTopk"):
            run(file.path, arrays(file.inputs))
    else:
        assert difference(run(file.path, arrays(file.inputs))[0], tiny.values_of(file.model, file.inputs)) < NEAR


def test_a_file_has_its_origin_in_metadata_and_no_paths_of_this_machine(exported: MakeFile) -> None:
    file = exported("modular", op="standard")
    model = onnx.load(file.path)
    notes = {p.key.removeprefix(onnx_file.PREFIX): p.value for p in model.metadata_props}
    assert notes["recipe"] == file.model.memory.record.recipe
    assert notes["plan"] == tiny.plan_of("modular").digest()
    assert {"memrewrite", "torch", "onnx"} <= json.loads(notes["versions"]).keys()
    assert (notes["op"], notes["dtype"], notes["with_past"], notes["selections"]) == ("standard", "float32", "false", "3")
    assert b"site-packages" not in file.path.read_bytes()
    assert str(Path(__file__).parents[3]).encode() not in file.path.read_bytes()


class Masked(nn.Module):
    """Attention with a boolean or an additive mask."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.project, self.additive = nn.Linear(8, 8), additive

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.project(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        visible = mask.bool().unsqueeze(1)
        if self.additive:
            visible = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, -torch.inf)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=visible).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("additive", [False, True])
def test_tokens_that_attend_to_no_token_get_zeros_as_in_torch(additive: bool, tmp_path: Path) -> None:
    model, x = Masked(additive).eval(), torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, 5, dtype=torch.int64).tril()
    mask[0, :2] = 0
    memrewrite.export_onnx(model, tmp_path / "masked.onnx", (x, mask))
    found = run(tmp_path / "masked.onnx", {"x": x.numpy(), "mask": mask.numpy()})[0]
    assert difference(found, model(x, mask)) < NEAR


# ------------------------------------------------------------------------------------------------------------- numbers


def test_half_precision_is_exported_and_the_model_is_not_changed(tmp_path: Path) -> None:
    model, inputs = layers()
    before = tiny.Photograph(model.train())
    exported = memrewrite.export_onnx(model, tmp_path / "half.onnx", inputs, dtype="float16")
    assert not before.differences(tiny.Photograph(model))
    found = run(tmp_path / "half.onnx", {"x": inputs["x"].numpy().astype(np.float16)})[0]
    assert found.dtype == np.float16
    assert exported.dtype == "float16"
    assert difference(found, model(**inputs)) < 1e-2


def test_bfloat16_becomes_float32_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = layers()
    model.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "memrewrite"):
        exported = memrewrite.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert "bfloat16" in caplog.text
    assert "float32" in caplog.text
    assert exported.dtype == "float32"
    assert model.layers[0].gate.weight.dtype == torch.bfloat16
    assert difference(run(tmp_path / "model.onnx", arrays(inputs))[0], model.float()(**inputs)) < NEAR


@pytest.mark.parametrize("mixes", [False, True])
def test_fp32_buffers_are_kept_if_the_model_runs_with_them(
    mixes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)
            self.register_buffer("angles", torch.tensor([0.0, 1.0, 100.1, 1000.3]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x + self.angles) if mixes else self.project(x) + self.angles.cos().to(x.dtype)

    model, x = Angles(), torch.randn(2, 4)
    memrewrite.export_onnx(model, tmp_path / "model.onnx", (x,), dtype="float16")
    assert ("computed buffers are rounded" in caplog.text) == mixes
    found = run(tmp_path / "model.onnx", {"x": x.half().numpy()})[0]
    assert difference(found, model(x)) < 1e-2  # the cosine of 1000.3, rounded to 1000.5, is off by 0.1


def test_tables_of_eight_bits_in_a_model_of_halves(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (layers(dtype="float8_e4m3fn", gradient="fused", seed=seed)[0] for seed in (0, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = Two()
    for one in (model.one, model.two):
        one.layers.half()
    exported = memrewrite.export_onnx(model, tmp_path / "model.onnx", (torch.randn(2, 5, 16).half(),))
    assert exported.dtype == "float16"
    tables = [i for i in onnx.load(tmp_path / "model.onnx").graph.initializer if i.name.endswith("memory.shared.values")]
    assert [table.data_type for table in tables] == [TensorProto.FLOAT16] * 2


def test_an_output_with_the_name_of_a_parameter(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": x * self.scale, "scale": self.scale.exp()}

    exported = memrewrite.export_onnx(Scaled(), tmp_path / "model.onnx", (torch.randn(2, 3),))
    assert [port.name for port in exported.outputs] == ["y", "scale"]
    assert difference(run(tmp_path / "model.onnx", {"x": np.ones((4, 3), np.float32)})[1], torch.ones(3).exp()) < NEAR


def test_variadic_arguments_stay_dynamic(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return sum(xs)  # type: ignore[return-value]

    exported = memrewrite.export_onnx(Sum(), tmp_path / "model.onnx", (torch.randn(2, 3), torch.randn(2, 3)))
    assert {port.shape[0] for port in exported.inputs} == {"batch"}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16", "float64"])
def test_a_table_of_another_type_than_the_model(dtype: str, tmp_path: Path) -> None:
    """8-bit and 64-bit tables are converted to the type of the model; 16-bit tables keep their type."""
    model, inputs = layers(dtype=dtype, gradient="fused")
    path = tmp_path / "model.onnx"
    memrewrite.export_onnx(model, path, inputs)
    table = next(i for i in onnx.load(path).graph.initializer if i.name == "memory.shared.values")
    kept = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}
    assert table.data_type == kept.get(dtype, TensorProto.FLOAT)
    wanted = tiny.values_of(model, inputs)
    assert difference(run(path, arrays(inputs))[0], wanted) < 1e-2  # sums are rounded to the table's type
    assert model.memory.shared.values.dtype == getattr(torch, dtype)


# --------------------------------------------------------------------------------------------------------------- files


def test_the_optimizer_looks_for_pairs_of_slices_at_slices_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real = slice_split_rule.try_rewrite

    def recorded(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        tried.append(node.op_type)
        return real(model, graph, node, **options)

    monkeypatch.setattr(slice_split_rule, "try_rewrite", recorded)
    model, inputs = tiny.named("llama")
    memrewrite.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert set(tried) == {"Slice"}  # elsewhere it lists all nodes, and finds nothing
    assert slice_split_rule.try_rewrite is recorded


def test_large_weights_are_written_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGE", 1000)
    model, inputs = layers()
    path = tmp_path / "model.onnx"
    exported = memrewrite.export_onnx(model, path, inputs)
    assert exported.data == str(path) + ".data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    wanted = tiny.values_of(model, inputs)
    assert difference(run(path, arrays(inputs))[0], wanted) < NEAR
    monkeypatch.undo()
    with pytest.raises(ExportError, match="exists"):
        memrewrite.export_onnx(model, path, inputs)
    memrewrite.export_onnx(model, path, inputs, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # the old weights are deleted
    assert difference(run(path, arrays(inputs))[0], wanted) < NEAR


@pytest.mark.slow
def test_a_table_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    model, inputs = layers(keys=768, value_dim=1024)
    exported = memrewrite.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert exported.data
    assert Path(exported.data).stat().st_size >= 768**2 * 1024 * 4
    assert (tmp_path / "model.onnx").stat().st_size < 2**20
    assert difference(run(tmp_path / "model.onnx", arrays(inputs))[0], tiny.values_of(model, inputs)) < NEAR


def test_weights_and_graph_are_replaced_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGE", 1000)
    (model, inputs), path = layers(), tmp_path / "model.onnx"
    memrewrite.export_onnx(model, path, inputs)
    before = run(path, arrays(inputs))[0]
    torch.nn.init.zeros_(model.memory.shared.values)

    def fails(*_: Path) -> bool:
        assert len(list(tmp_path.glob("model.onnx.*data"))) == 2  # the old weights and the new ones, until the last rename
        raise OSError("no room")

    monkeypatch.setattr(atomic_write, "exchange", fails)
    with pytest.raises(ExportError, match="no room"):
        memrewrite.export_onnx(model, path, inputs, overwrite=True)
    assert np.array_equal(run(path, arrays(inputs))[0], before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real  # no ONNX operator

    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(ExportError, match=r"eig"):
        memrewrite.export_onnx(Odd(), path, (torch.randn(3, 3),), overwrite=True)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("where", "message"),
    [("here.onnx", "exists"), ("folder", "is a directory"), ("nowhere/model.onnx", "does not exist")],
)
def test_targets_that_are_refused_before_the_export(where: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "here.onnx").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match=message):
        memrewrite.export_onnx(nn.Linear(2, 2), tmp_path / where, (torch.randn(1, 2),))


def test_a_model_that_returns_its_input_and_an_output_twice(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Any]:
            y = x + more["b"]
            return {"x": x, "sums": [y, y], "nothing": None}

    inputs = (torch.randn(2, 3), {"b": torch.randn(2, 3)})
    exported = memrewrite.export_onnx(Echo(), tmp_path / "echo.onnx", ((inputs[0], inputs[1]), {}))
    assert [port.name for port in exported.inputs] == ["x", "more.b"]
    assert [port.name for port in exported.outputs] == ["output_x", "sums.0", "sums.1"]
    found = run(tmp_path / "echo.onnx", {"x": inputs[0].numpy(), "more.b": inputs[1]["b"].numpy()})
    assert difference(found[0], inputs[0]) == 0
    assert difference(found[2], inputs[0] + inputs[1]["b"]) == 0


# -------------------------------------------------------------------------------------------------------------- graphs


def test_a_model_rewritten_as_a_graph_is_exported_and_its_program_is_not_changed(tmp_path: Path) -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, tiny.recipe() | {"verify": "off"}, inputs, emit="graph")
    memrewrite.save(report.model, tmp_path / "saved")
    program = torch.export.load(tmp_path / "saved" / "model.pt2")
    before = str(program.graph)
    exported = memrewrite.export_onnx(program, tmp_path / "model.onnx")
    assert exported.nodes == {"ProductKeyTopk": 3, "SparseLookup": 3}
    assert exported.inputs[0].shape == ("batch", "sequence")
    found = run(tmp_path / "model.onnx", arrays(inputs))[0]
    assert difference(found, tiny.values_of(report.model, inputs)) < NEAR
    assert str(program.graph) == before


def test_a_graph_module_is_exported(tmp_path: Path) -> None:
    model, inputs = layers()
    graph = torch.export.export(model, (), inputs).module()
    assert memrewrite.export_onnx(graph, tmp_path / "model.onnx", inputs).nodes == {"ProductKeyTopk": 2, "SparseLookup": 2}
    assert difference(run(tmp_path / "model.onnx", arrays(inputs))[0], model(**inputs)) < NEAR


# ------------------------------------------------------------------------------------------------------------ decoders


def greedy(session: Any, ids: NDArray[Any], mask: NDArray[Any], count: int) -> NDArray[Any]:
    """A generation loop: one run for each token, which reads the cache that the run before returned."""
    heads = [port for port in session.get_inputs() if port.name.startswith("past_key_values")]
    past = {port.name: np.zeros((len(ids), port.shape[1], 0, port.shape[3]), np.float32) for port in heads}
    names = [port.name for port in session.get_outputs()]
    text = new = ids
    for _ in range(count):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        out = session.run(None, {"input_ids": new, "attention_mask": mask, "position_ids": positions, **past})
        by_name = dict(zip(names, out, strict=True))
        new = by_name["logits"][:, -1:].argmax(-1)
        text, mask = np.concatenate([text, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
        past = {n.replace("present", "past_key_values"): v for n, v in by_name.items() if n.startswith("present")}
    return text


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_generation_with_the_cache_gives_the_tokens_of_generate(name: str, exported: MakeFile) -> None:
    file = exported(name, with_past=True)
    ids = tiny.tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # a shorter text, padded on the left
    wanted = file.model.generate(
        ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    assert np.array_equal(greedy(session, ids.numpy(), mask.numpy(), 40), wanted.numpy())
    shapes = {port.name: port.shape for port in (*file.exported.inputs, *file.exported.outputs)}
    assert shapes["attention_mask"] == ("batch", "past_sequence + sequence")
    assert shapes["past_key_values.2.key"][2] == "past_sequence"
    assert shapes["present.2.value"][2] == "past_sequence + sequence"
    assert "memory.shared.values" in {i.name for i in onnx.load(file.path).graph.initializer}


class Decoder(nn.Module):
    """A causal language model of one layer that reads the mean of all tokens. `field`: the name of the cache it returns."""

    main_input_name, device = "input_ids", torch.device("cpu")

    def __init__(self, field: str = "cache") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.field = PretrainedConfig(vocab_size=11), field
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def step(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any, use_cache: bool) -> dict[str, Any]:
        x = self.embedding(input_ids).unsqueeze(1)  # [batch, head, token, width]
        cache = DynamicCache() if cache is None and use_cache else cache
        _, values = (x, 2 * x) if cache is None else cache.update(x, 2 * x, 0)
        weights = torch.ones_like(values[..., :1]) if attention_mask is None else attention_mask[:, None, :, None]
        mean = (values * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
        return {"logits": self.head(x + mean).squeeze(1), self.field: cache}


class NewDecoder(Decoder):
    """Its argument is named as in transformers 5.24 and newer."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None, use_cache: bool = False
    ) -> dict[str, Any]:
        return self.step(input_ids, attention_mask, cache, use_cache)


class OldDecoder(Decoder):
    """Its argument is named as in transformers before 5.24."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> dict[str, Any]:
        return self.step(input_ids, attention_mask, past_key_values, use_cache)


class OtherDecoder(Decoder):
    """Its argument has another name than its output."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Any = None, use_cache: bool = False
    ) -> dict[str, Any]:
        return self.step(input_ids, attention_mask, memory, use_cache)


@pytest.mark.parametrize(
    ("decoder", "field"),
    [(NewDecoder, "cache"), (OldDecoder, "past_key_values"), (OldDecoder, "cache"), (OtherDecoder, "memory")],
    ids=["transformers 5.24", "transformers 5.0", "old code with transformers 5.24", "another name"],
)
def test_the_argument_of_the_cache_may_have_any_name(decoder: type[Decoder], field: str, tmp_path: Path) -> None:
    model, ids = decoder(field).eval(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    exported = memrewrite.export_onnx(model, tmp_path / "model.onnx", with_past=True)
    assert [port.name for port in exported.inputs][2:] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [port.name for port in exported.outputs] == ["logits", "present.0.key", "present.0.value"]
    past, mask = np.zeros((2, 1, 0, 8), np.float32), np.ones((2, 4), np.int64)
    first = {"input_ids": ids[:, :3].numpy(), "attention_mask": mask[:, :3]}
    _, key, value = run(tmp_path / "model.onnx", {**first, "past_key_values.0.key": past, "past_key_values.0.value": past})
    second = {"input_ids": ids[:, 3:].numpy(), "attention_mask": mask}
    logits = run(tmp_path / "model.onnx", {**second, "past_key_values.0.key": key, "past_key_values.0.value": value})[0]
    assert difference(logits, model(ids)["logits"][:, 3:]) < NEAR


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OtherDecoder("cache"), "returns its cache as 'cache', and its forward takes no argument for it"),
        (nn.Linear(2, 2), "takes no 'input_ids'"),
    ],
)
def test_a_cache_without_an_argument_is_refused(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        memrewrite.export_onnx(model, tmp_path / "model.onnx", with_past=True)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_a_model_without_a_cache_is_refused(name: str, tmp_path: Path) -> None:
    model, _ = tiny.named(name)
    with pytest.raises(ExportError, match="cannot be exported with its cache"):
        memrewrite.export_onnx(model, tmp_path / "model.onnx", with_past=True)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- functions


def alone(op: str, inputs: dict[str, NDArray[Any]], outputs: int, **attributes: int) -> onnx.ModelProto:
    """A model of one memory operator, with its function."""
    node = helper.make_node(op, list(inputs), [f"out{i}" for i in range(outputs)], domain=DOMAIN, **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    ports = [helper.make_tensor_value_info(name, types[name], [None] * inputs[name].ndim) for name in inputs]
    results = [helper.make_empty_tensor_value_info(f"out{i}") for i in range(outputs)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    wanted = [f for f in functions(20) if f.name == op]
    return helper.make_model(
        helper.make_graph([node], "g", ports, results), functions=wanted, opset_imports=opsets, ir_version=9
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 9), st.sampled_from(["int32", "int64"]))
def test_the_function_of_the_lookup_computes_the_lookup(slots: int, width: int, tokens: int, reads: int, dtype: str) -> None:
    random = np.random.default_rng(slots * width + tokens)
    feed = {
        "values": random.standard_normal((slots, width), dtype=np.float32),
        "indices": random.integers(0, slots, (tokens, reads)).astype(dtype),
        "weights": random.standard_normal((tokens, reads), dtype=np.float32),
    }
    model = alone("SparseLookup", feed, 1)
    wanted = reference.sparse_lookup(*(torch.from_numpy(feed[n]) for n in ("values", "indices", "weights")))
    evaluators = [onnxruntime.InferenceSession(model.SerializeToString())]
    if tokens and reads:  # numpy's matmul of empty arrays has another shape
        evaluators.append(ReferenceEvaluator(model))
    for evaluator in evaluators:
        assert near(evaluator.run(None, feed)[0], wanted.numpy(), 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 3))
def test_the_function_of_the_top_k_computes_the_top_k(n1: int, n2: int, k: int, softmax: bool, rows: int) -> None:
    k = min(k, n1, n2)
    random = np.random.default_rng(n1 * n2)
    feed = {"scores1": random.permuted(np.arange(rows * n1, dtype=np.float32).reshape(rows, n1), axis=-1)}
    # multiples of 1/64 below 1: all sums of a row are exact and distinct, so there is one right order
    feed["scores2"] = random.permuted(np.arange(rows * n2, dtype=np.float32).reshape(rows, n2) % n2 / 64, axis=-1)
    model = alone("ProductKeyTopk", feed, 2, k=k, softmax=int(softmax))
    scores, slots = reference.product_key_topk(*(torch.from_numpy(v) for v in feed.values()), k)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    assert near(found[0], (scores.softmax(-1) if softmax else scores).numpy(), 1e-6)
    assert np.array_equal(found[1], slots)


@pytest.mark.parametrize("index", [-1, -7, 7, 2**40])
def test_the_function_of_the_lookup_refuses_an_index_outside_the_table(index: int) -> None:
    feed = {
        "values": np.ones((7, 3), np.float32),
        "indices": np.array([[0, index]]),
        "weights": np.ones((1, 2), np.float32),
    }
    session = onnxruntime.InferenceSession(alone("SparseLookup", feed, 1).SerializeToString())
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of"):
        session.run(None, feed)


def test_tools_of_onnxruntime_infer_all_shapes(exported: MakeFile, tmp_path: Path) -> None:
    """Of attention with a mask too. The results of memory operators have symbols of their own: `auto_merge`."""
    from onnxruntime.quantization import quant_pre_process
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    file = exported("llama").path
    assert SymbolicShapeInference.infer_shapes(onnx.load(file), auto_merge=True) is not None
    quant_pre_process(str(file), str(tmp_path / "prepared.onnx"), auto_merge=True)
    assert onnx.load(tmp_path / "prepared.onnx").graph.node
