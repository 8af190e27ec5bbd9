"""The comparison of an exported file with its model: a correct file passes at every length, every fault is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_files
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx_files import model_of
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import ExportError, ModelError
from memrewrite.kernels import ops
from memrewrite.kernels.product_keys import half_scores
from memrewrite.passes.onnx import file as onnx_file
from memrewrite.passes.onnx.check.check import Checked, check_onnx
from memrewrite.passes.onnx.check.given_inputs import text_inputs
from memrewrite.passes.onnx.check.input_sets import evaluated, input_sets, lengths_of
from memrewrite.passes.onnx.check.routes import RouteChecked, compared
from memrewrite.passes.onnx.check.slot_choices import Choices
from memrewrite.passes.onnx.export import export_onnx
from memrewrite.passes.onnx.file import Port
from memrewrite.passes.rewrite.build_layers import pools_of

STANDARD = ("standard",)
FOUR_TIMES = [0, 0, 0, 0, 4, 4, 4, 4]


def exported(folder: Path, name: str, **options: Any) -> Path:
    """The path of the file that was exported from `model_of(name)`, once per run."""
    return onnx_files.exported(folder, name, **options).path


def edited(file: Path, target: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """An edited copy of a file."""
    model = onnx.load(file)
    edit(model)
    onnx.save(model, target)
    return target


def route_of(checked: Checked, name: str = "standard") -> RouteChecked:
    return next(route for route in checked.routes if route.name == name)


def lengths_tried(checked: Checked) -> dict[str, set[int]]:
    tried = [inputs.lengths for inputs in checked.draws if not inputs.skipped]
    return {axis: {lengths[axis] for lengths in tried} for axis in tried[0]}


# ------------------------------------------------------------------------------------------------- correct files pass


@pytest.mark.parametrize(
    ("name", "options"),
    [("modular", {}), ("vit", {}), ("t5", {}), ("llama", {"with_past": True}), ("modular", {"dtype": "float16"})],
    ids=["modular", "vit", "t5", "llama with past", "float16"],
)
def test_a_file_computes_what_its_model_computes(
    folder: Path, tmp_path: Path, library: Path, name: str, options: dict[str, Any]
) -> None:
    model, inputs = model_of(name)
    file = tmp_path / "model.onnx"  # a copy: in `folder`, other processes may check the same file now, with temporary files
    shutil.copy(exported(folder, name, **options), file)
    before, state = file.read_bytes(), tiny.Photograph(model)

    checked = check_onnx(file, model, inputs, library=library)

    assert checked.ok
    assert not [inputs for inputs in checked.draws if inputs.skipped]
    assert all(1 in lengths and len(lengths) >= 3 for axis, lengths in lengths_tried(checked).items()), lengths_tried(checked)
    standard, native = route_of(checked), route_of(checked, "native")
    assert set(standard.kernels.values()) == {"standard"}
    assert set(native.kernels.values()) == {"native"}
    worst = max(output.relative for output in standard.outputs)
    assert 0 < worst <= (1e-2 if options.get("dtype") else 2e-6)
    assert standard.ties.rows > 100
    assert checked.dtype == options.get("dtype", "float32")
    assert Checked.model_validate_json(checked.model_dump_json()) == checked

    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    assert tiny.Photograph(model).differences(state) == []


def test_a_cache_is_empty_at_first_and_passed_to_the_next_step(folder: Path) -> None:
    model, _ = model_of("llama")

    checked = check_onnx(exported(folder, "llama", with_past=True), model)

    steps = {inputs.name: inputs.lengths for inputs in checked.draws}
    first, following = steps["first step"], steps["next step"]
    assert first["past_sequence"] == 0
    assert following == {**first, "past_sequence": first["sequence"], "sequence": 1}
    assert steps["one new token"]["sequence"] == 1
    assert {output.name for output in route_of(checked).outputs} >= {"logits", "present.0.key", "present.2.value"}


@pytest.mark.parametrize(("name", "options"), [("modular", {}), ("llama", {"with_past": True})])
def test_train_and_eval_modes_are_unchanged(folder: Path, name: str, options: dict[str, Any]) -> None:
    model, inputs = tiny.rewritten(name)
    tiny.open_up(model)
    model.train()
    [*model.modules()][5].eval()
    modes = [module.training for module in model.modules()]

    assert check_onnx(exported(folder, name, **options), model, inputs).ok

    assert [module.training for module in model.modules()] == modes


def test_external_weights_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGE", 1000)
    model, inputs = model_of("vit")
    export_onnx(model, tmp_path / "large.onnx", inputs)
    assert (tmp_path / "large.onnx.data").exists()

    assert check_onnx(tmp_path / "large.onnx", model, inputs).ok

    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]


# ------------------------------------------------------------------------------------------------- faults are found


def test_a_weight_off_by_a_percent_is_found(folder: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        weight = next(w for w in model.graph.initializer if w.name == "blocks.1.mlp.value_proj.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))

    model, inputs = model_of("modular")

    checked = check_onnx(edited(exported(folder, "modular"), tmp_path / "off.onnx", edit), model, inputs)

    assert not checked.ok
    (output,) = route_of(checked).outputs
    assert output.relative > 1e-4
    assert output.draw


def test_a_huge_value_hides_no_difference(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x).masked_fill(torch.arange(8) == 0, torch.finfo(x.dtype).min)

    def edit(model: onnx.ModelProto) -> None:
        bias = next(w for w in model.graph.initializer if w.name == "project.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))

    model, inputs = Masked(), {"x": torch.randn(3, 6)}
    export_onnx(model, tmp_path / "model.onnx", inputs)
    assert check_onnx(tmp_path / "model.onnx", model, inputs, routes=STANDARD).ok
    wrong = edited(tmp_path / "model.onnx", tmp_path / "wrong.onnx", edit)
    assert not check_onnx(wrong, model, inputs, routes=STANDARD).ok


def test_a_model_that_counts_its_calls_is_not_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * scale

    model, inputs = Counting(), {"x": torch.randn(3, 6), "scale": torch.tensor(2.0)}
    export_onnx(model, tmp_path / "model.onnx", inputs)
    assert "mutates its buffers calls" in caplog.text
    assert check_onnx(tmp_path / "model.onnx", model, inputs, routes=STANDARD).ok
    assert model.calls == 0


def test_an_additive_mask_is_sampled_with_its_infinities(tmp_path: Path) -> None:
    class Additive(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x + mask).softmax(-1).nan_to_num()

    inputs = {"x": torch.randn(3, 6), "mask": torch.zeros(3, 6).masked_fill(torch.ones(3, 6).tril() == 0, -torch.inf)}
    export_onnx(Additive(), tmp_path / "model.onnx", inputs)
    ports = (Port(name="mask", dtype="float", shape=("batch", "sequence")),)
    for one in input_sets(ports, {"mask": inputs["mask"]}, {"mask": inputs["mask"]}):
        assert not one.feeds["mask"].isnan().any()
    assert check_onnx(tmp_path / "model.onnx", Additive(), inputs, routes=STANDARD).ok


def test_another_rewrite_is_refused(folder: Path) -> None:
    model, inputs = tiny.rewritten("modular", "parallel")

    with pytest.raises(ExportError, match=r"another rewrite: its plan is \w{12}, the model's \w{12}"):
        check_onnx(exported(folder, "modular"), model, inputs)


def negated(model: onnx.ModelProto) -> None:
    """Choose the smallest sums instead of the largest."""
    node = next(node for node in model.graph.node if node.op_type == "ProductKeyTopk")
    for half in (0, 1):
        model.graph.node.insert(0, helper.make_node("Neg", [node.input[half]], [f"minus{half}"]))
        node.input[half] = f"minus{half}"
    _sorted(model)


def shifted(model: onnx.ModelProto) -> None:
    """Choose the slots after the best ones."""
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == "memory.0.slots":
                node.input[position] = "shifted"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(64), "all"))
    model.graph.node.append(helper.make_node("Add", ["memory.0.slots", "one"], ["more"]))
    model.graph.node.append(helper.make_node("Mod", ["more", "all"], ["shifted"]))
    _sorted(model)


def repeated(model: onnx.ModelProto) -> None:
    """Choose the best slot k times: no sum is too small."""
    node = next(node for node in model.graph.node if node.op_type == "ProductKeyTopk")
    node.output[1] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int64), "first"))
    model.graph.node.append(helper.make_node("Gather", ["before", "first"], ["memory.0.slots"], axis=-1))
    _sorted(model)


def outside(model: onnx.ModelProto) -> None:
    """Choose slots outside of the table: the runtime must raise an error."""
    shifted(model)
    next(w for w in model.graph.initializer if w.name == "all").CopyFrom(numpy_helper.from_array(np.array(10**6), "all"))
    next(w for w in model.graph.initializer if w.name == "one").CopyFrom(numpy_helper.from_array(np.array(10**5), "one"))


def _sorted(model: onnx.ModelProto) -> None:
    """Sort the nodes topologically, as ONNX requires."""
    available = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    remaining, ordered = [*model.graph.node], []
    while remaining:
        node = next(node for node in remaining if set(node.input) <= available)
        remaining.remove(node)
        ordered.append(node)
        available |= set(node.output)
    del model.graph.node[:]
    model.graph.node.extend(ordered)


@pytest.mark.parametrize("edit", [negated, shifted, repeated, outside])
def test_a_wrong_choice_is_found(folder: Path, tmp_path: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model, inputs = model_of("modular")

    checked = check_onnx(edited(exported(folder, "modular"), tmp_path / "wrong.onnx", edit), model, inputs, routes=STANDARD)

    route = route_of(checked)
    assert not checked.ok
    assert bool(route.failures) == (edit is outside)
    if edit is shifted:
        assert not route.outputs[0].ok
    if edit in (negated, repeated):
        assert route.ties.wrong


# ------------------------------------------------------------------------------------------------------------------ ties


def test_equal_sums_may_be_chosen_either_way(folder: Path, tmp_path: Path) -> None:
    """Every key occurs four times, so 16 slots have the same sum but different values; any of them may be chosen."""
    model, inputs = tiny.rewritten("modular")
    tiny.open_up(model)
    layers = [layer for layer in model.modules() if hasattr(layer, "product_keys")]
    with torch.no_grad():
        for layer in layers:
            keys = layer.product_keys.keys
            keys[:] = keys[:, :, FOUR_TIMES]
    assert layers

    def edit(file: onnx.ModelProto) -> None:
        folded = [weight for weight in file.graph.initializer if list(weight.dims) == [4, 4, 8]]
        assert len(folded) == 3  # the keys, transposed for the product: [2 · heads, key_dim / 2, keys]
        for weight in folded:
            array = np.ascontiguousarray(numpy_helper.to_array(weight)[..., FOUR_TIMES])
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        for number in range(3):  # keys in reverse order: a runtime chooses the first of equal sums
            reverse_choice(file, number)

    file = edited(exported(folder, "modular"), tmp_path / "twice.onnx", edit)

    checked = check_onnx(file, model, inputs, routes=STANDARD)

    ties = route_of(checked).ties
    assert checked.ok
    assert ties.differing > ties.rows / 10
    assert ties.gap <= 1
    assert ties.wrong == 0
    assert max(output.relative for output in route_of(checked).outputs) < 1e-5


def reverse_choice(model: onnx.ModelProto, number: int) -> None:
    """Reverse the keys of a top-k, and map its slots back."""
    node = next(node for node in model.graph.node if f"memory.{number}.slots" in node.output)
    reversed_keys = [f"keys{number}.{half}" for half in (0, 1)]
    constants = {"end": [-1], "start": [np.iinfo(np.int64).min], "axis": [-1], "step": [-1], "last": [63]}
    present = {weight.name for weight in model.graph.initializer}
    for name, value in constants.items():
        if name not in present:
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    for half in (0, 1):
        inputs = [node.input[half], "end", "start", "axis", "step"]
        model.graph.node.append(helper.make_node("Slice", inputs, [reversed_keys[half]]))
        node.input[half] = reversed_keys[half]
    node.output[1] = f"backward{number}"
    model.graph.node.append(helper.make_node("Sub", ["last", f"backward{number}"], [f"memory.{number}.slots"]))
    _sorted(model)


def all_sums(scores1: np.ndarray, scores2: np.ndarray) -> np.ndarray:
    """The sums of all slots."""
    return (scores1[..., :, None] + scores2[..., None, :]).reshape(*scores1.shape[:-1], -1).astype(np.float64)


@settings(max_examples=40, deadline=None)
@given(n1=st.integers(2, 6), n2=st.integers(2, 6), k=st.integers(1, 2), seed=st.integers(0, 999), softmax=st.booleans())
def test_a_forced_choice_is_compared_with_all_sums(n1: int, n2: int, k: int, seed: int, softmax: bool) -> None:
    random = np.random.default_rng(seed)
    scores1, scores2 = (random.integers(-2, 3, (3, n)).astype(np.float32) for n in (n1, n2))  # integers: many ties
    chosen = np.stack([random.choice(n1 * n2, k, replace=False) for _ in range(3)])
    sums = all_sums(scores1, scores2)
    legitimate = [np.sort(sums[row, chosen[row]])[0] >= np.sort(sums[row])[-k] for row in range(3)]

    with Choices([torch.from_numpy(chosen)], tolerance=1e-4) as choices:
        weights, slots = ops.product_key_topk(torch.from_numpy(scores1), torch.from_numpy(scores2), k, softmax=softmax)

    own = choices.slots[0].numpy()
    differs = [set(own[row]) != set(chosen[row]) for row in range(3)]
    assert choices.ties.rows == 3
    assert choices.ties.differing == sum(differs)
    assert choices.ties.wrong == sum(d and not good for d, good in zip(differs, legitimate, strict=True))
    read = np.take_along_axis(sums, slots.numpy(), -1)
    assert [set(row) for row in slots.tolist()] == [set(row) for row in chosen.tolist()]
    expected = np.exp(read) / np.exp(read).sum(-1, keepdims=True) if softmax else read
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


def test_a_choice_is_forced_on_the_operator_with_the_scores_inside() -> None:
    queries, keys = torch.randn(3, 2, 4), torch.randn(2, 6, 4)
    chosen = torch.tensor([[[0, 7], [35, 1], [12, 8]]])
    found = []
    for select in (
        lambda: ops.product_keys(queries, keys, 2),
        lambda: ops.product_key_topk(*half_scores(queries, keys), 2, softmax=True),
    ):
        with Choices([chosen], tolerance=1e-4) as choices:
            found.append((*select(), choices.ties, choices.slots[0]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert {tuple(sorted(row)) for row in found[0][1][0].tolist()} == {tuple(sorted(row)) for row in chosen[0].tolist()}


def test_a_row_with_nan_has_no_best_slots() -> None:
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 2.0, 1.0]])

    with Choices([torch.tensor([[0, 4], [4, 5]])], tolerance=1e-4) as choices:
        ops.product_key_topk(scores, scores, 2)

    assert (choices.ties.rows, choices.ties.differing, choices.ties.wrong) == (2, 0, 0)


# ----------------------------------------------------------------------------------------------------------------- inputs


def test_a_length_that_the_model_does_not_support_is_reported(folder: Path) -> None:
    """The table of positions has 32 rows."""
    model, _ = model_of("modular")

    checked = check_onnx(exported(folder, "modular"), model, {"ids": tiny.tokens(2, 30)})

    (skipped,) = [inputs for inputs in checked.draws if inputs.skipped]
    assert skipped.name == "longer"
    assert skipped.lengths["sequence"] > 32
    assert "must match the size" in skipped.skipped
    assert checked.ok


def test_real_inputs_are_dicts_or_files(folder: Path, tmp_path: Path) -> None:
    model, inputs = model_of("modular")
    np.savez(tmp_path / "real.npz", ids=tiny.tokens(1, 9).numpy().astype(np.int32))

    checked = check_onnx(exported(folder, "modular"), model, inputs, real=[{"ids": tiny.tokens(3, 7)}, tmp_path / "real.npz"])

    assert [(one.lengths["batch"], one.lengths["sequence"]) for one in checked.draws[1:3]] == [(3, 7), (1, 9)]
    assert checked.draws[2].name.endswith("real.npz")


@pytest.mark.parametrize(
    ("real", "error", "message"),
    [
        ({"tokens": tiny.tokens()}, ExportError, "inputs of the file are ids, those of real input 0 are tokens"),
        ({"ids": tiny.tokens().float()}, ExportError, "int64 in the file, and torch.float32"),
        ({"ids": tiny.tokens()[0]}, ExportError, r"\[batch, sequence\] in the file, and \[5\]"),
        ({"ids": tiny.tokens(1, 40)}, ModelError, "does not run on real input 0"),
        ("nothing.npz", ExportError, "cannot be read"),
    ],
)
def test_real_inputs_that_do_not_fit_are_refused(folder: Path, real: Any, error: type[Exception], message: str) -> None:
    model, inputs = model_of("modular")

    with pytest.raises(error, match=message):
        check_onnx(exported(folder, "modular"), model, inputs, real=[real])


def test_an_example_of_another_model_is_refused(folder: Path) -> None:
    model, inputs = tiny.rewritten("llama")
    pools_of(model).record = None  # without the plan, which would be compared first

    with pytest.raises(ExportError, match="inputs of the file are ids, those of the example are input_ids"):
        check_onnx(exported(folder, "modular"), model, inputs)


def test_equally_long_axes_stay_equally_long_and_padding_is_tried() -> None:
    ports = [
        Port(name="ids", dtype="int64", shape=("batch", "sequence")),
        Port(name="attention_mask", dtype="int64", shape=("batch", "mask_sequence")),
        Port(name="twice", dtype="float", shape=("2*sequence + 1", 3)),
    ]
    example = {"ids": tiny.tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64), "twice": torch.randn(11, 3)}

    sets = input_sets(ports, example, example)

    for one in sets:
        assert lengths_of(ports, one.feeds, "") == one.lengths
        assert one.lengths["sequence"] == one.lengths["mask_sequence"]
        assert one.feeds["twice"].shape == (2 * one.lengths["sequence"] + 1, 3)
        assert set(one.feeds["ids"].unique().tolist()) <= set(example["ids"].unique().tolist())
    padded = {one.name: one.feeds["attention_mask"] for one in sets if "padded" in one.name}
    assert all(mask.diff(dim=-1).ge(0).all() and (mask[:, -1] == 1).all() for n, mask in padded.items() if "left" in n)
    assert all(mask.diff(dim=-1).le(0).all() and (mask[:, 0] == 1).all() for n, mask in padded.items() if "right" in n)
    assert len(padded) == 2
    assert not any(mask.all() for mask in padded.values())


def test_lengths_are_computed_from_sums_of_products() -> None:
    lengths = {"a": 3, "b": 0, "past.0_axis1": 5}

    assert [evaluated(dim, lengths) for dim in (7, "a", "a + b", "2*a + 1", "a*past.0_axis1")] == [7, 3, 3, 7, 15]
    assert [evaluated(dim, lengths) for dim in ("c", "a + c", "a//2", "a - 1", "?")] == [None] * 5


def tokenizer_in(directory: Path, *, pad: bool) -> None:
    """Save a tokenizer whose words are single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(32 + number): number for number in range(64)} | {"?": 31}
    own = Tokenizer(models.WordLevel(letters, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": " ", "padding_side": "left"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="?", **special).save_pretrained(directory)


@pytest.mark.parametrize("pad", [True, False])
def test_texts_are_compared_if_there_is_a_tokenizer(folder: Path, tmp_path: Path, pad: bool) -> None:
    tokenizer_in(tmp_path, pad=pad)
    file = onnx.load(exported(folder, "llama", with_past=True))
    names = [value.name for value in file.graph.input]
    ports = [
        Port(name=v.name, dtype="", shape=tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in file.graph.input
    ]

    texts = text_inputs(tmp_path, ports)

    assert len(texts) == (1 if pad else 4)
    assert all(list(text) == names for text in texts)
    for text in texts:
        mask, positions = text["attention_mask"].bool(), text["position_ids"]
        assert text["past_key_values.0.key"].shape[2] == 0
        assert mask.all() != pad
        assert (positions[:, -1] == mask.sum(1) - 1).all()
    model, _ = model_of("llama")
    checked = check_onnx(folder / "llama-True.onnx", model, real=texts[:1])
    assert checked.draws[1].lengths["past_sequence"] == 0

    assert text_inputs(tmp_path, [Port(name="pixel_values", dtype="float", shape=("batch", 3))]) == []
    assert text_inputs(tmp_path / "elsewhere", ports) == []


# ----------------------------------------------------------------------------------------------------- routes and numbers


def test_an_unavailable_route_is_skipped_or_refused(folder: Path, tmp_path: Path) -> None:
    model, inputs = model_of("vit")

    def inline(file: onnx.ModelProto) -> None:
        file.CopyFrom(onnx.inliner.inline_local_functions(file))

    plain = edited(exported(folder, "vit"), tmp_path / "plain.onnx", inline)
    checked = check_onnx(plain, model, inputs)
    assert checked.ok
    assert route_of(checked).kernels == {}
    assert "no memory operators" in route_of(checked, "native").skipped
    with pytest.raises(ExportError, match="native: the file has no memory operators"):
        check_onnx(plain, model, inputs, routes=("native",))

    native = edited(exported(folder, "vit"), tmp_path / "native.onnx", lambda file: file.ClearField("functions"))
    with pytest.raises(ExportError, match="standard: the file has no function for ProductKeyTopk, SparseLookup"):
        check_onnx(native, model, inputs, routes=("standard",))


def test_files_of_other_tools_are_refused(folder: Path, tmp_path: Path) -> None:
    model, inputs = model_of("vit")
    with pytest.raises(ExportError, match="there is no file"):
        check_onnx(tmp_path / "nothing.onnx", model, inputs)
    (tmp_path / "cut.onnx").write_bytes(exported(folder, "vit").read_bytes()[:1000])
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        check_onnx(tmp_path / "cut.onnx", model, inputs)
    other = edited(exported(folder, "vit"), tmp_path / "other.onnx", lambda file: file.ClearField("metadata_props"))
    with pytest.raises(ExportError, match="metadata have no 'dtype'"):
        check_onnx(other, model, inputs)


def test_a_program_is_checked(folder: Path, tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, *more: Tensor, by: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.scale * x + more[0] * by["weight"], x.argmax(-1)

    args, kwargs = (torch.randn(3, 4), torch.randn(3, 4)), {"by": {"weight": torch.randn(4)}}
    export_onnx(Small(), tmp_path / "small.onnx", (args, kwargs))
    assert check_onnx(tmp_path / "small.onnx", Small(), (args, kwargs)).ok

    program = torch.export.export(Small(), args, kwargs)
    export_onnx(program, tmp_path / "program.onnx")
    checked = check_onnx(tmp_path / "program.onnx", program)
    assert checked.ok
    same_lengths, others = checked.draws[:2], checked.draws[2:]  # the program has no dynamic axes
    assert not any(inputs.skipped for inputs in same_lengths)
    assert all("to be equal to 3" in inputs.skipped for inputs in others)


@pytest.mark.parametrize(
    ("found", "expected", "relative", "misplaced"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, 0),
        ([1.0, 2.5], [1.0, 2.0], 0.25, 0),
        ([1.0, torch.nan], [1.0, torch.nan], 0.0, 0),
        ([torch.nan, 1.0], [1.0, torch.nan], 0.0, 2),
        ([torch.inf, 1.0], [-torch.inf, 1.0], 0.0, 1),
        ([0.5], [0.0], 0.5, 0),
        ([], [], 0.0, 0),
    ],
)
def test_differences(found: list[float], expected: list[float], relative: float, misplaced: int) -> None:
    result = compared("y", torch.tensor(found), torch.tensor(expected), "example", 1e-4)

    assert (result.relative, result.misplaced) == (relative, misplaced)
    assert result.ok == (not relative and not misplaced)


def test_integers_must_be_equal() -> None:
    result = compared("y", torch.tensor([100_000, 3]), torch.tensor([100_001, 3]), "example", 1e-4)

    assert result.misplaced == 1
    assert not result.ok


def test_a_saved_directory_is_accepted_as_the_model(folder: Path, tmp_path: Path) -> None:
    model, _ = tiny.rewritten("llama")
    tiny.open_up(model)
    memrewrite.save(model, tmp_path / "saved")

    checked = check_onnx(exported(folder, "llama", with_past=True), str(tmp_path / "saved"))

    assert checked.ok
    assert checked.plan

    def add_source(file: onnx.ModelProto) -> None:
        file.metadata_props.add(key="memrewrite.source", value="saved")

    with_source = edited(exported(folder, "llama", with_past=True), tmp_path / "with_source.onnx", add_source)
    assert check_onnx(with_source).ok
    with pytest.raises(ExportError, match="metadata name no source"):
        check_onnx(exported(folder, "llama", with_past=True))
