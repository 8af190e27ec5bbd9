"""An exported file is held against its model: what is right passes at every length, and whatever is wrong is found."""

from __future__ import annotations

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
from memrewrite.passes.onnx import file as onnx_file
from memrewrite.passes.onnx.check.check import Checked, check_onnx
from memrewrite.passes.onnx.check.draws import draws, evaluated, lengths_of, text_inputs
from memrewrite.passes.onnx.check.routes import RouteChecked, compared
from memrewrite.passes.onnx.check.slot_choices import Choices
from memrewrite.passes.onnx.export import export_onnx
from memrewrite.passes.onnx.file import Port
from memrewrite.passes.rewrite.build_layers import pools_of

STANDARD = ("standard",)
FOUR_TIMES = [0, 0, 0, 0, 4, 4, 4, 4]


def exported(folder: Path, name: str, **options: Any) -> Path:
    """The file of `model_of(name)`, made once."""
    return onnx_files.exported(folder, name, **options).path


def edited(file: Path, target: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A changed copy of a file."""
    model = onnx.load(file)
    edit(model)
    onnx.save(model, target)
    return target


def route_of(checked: Checked, name: str = "standard") -> RouteChecked:
    return next(route for route in checked.routes if route.name == name)


def lengths_tried(checked: Checked) -> dict[str, set[int]]:
    tried = [draw.lengths for draw in checked.draws if not draw.skipped]
    return {axis: {lengths[axis] for lengths in tried} for axis in tried[0]}


# ------------------------------------------------------------------------------------------------- what is right passes


@pytest.mark.parametrize(
    ("name", "options"),
    [("modular", {}), ("vit", {}), ("t5", {}), ("llama", {"with_past": True}), ("modular", {"dtype": "float16"})],
    ids=["modular", "vit", "t5", "llama with past", "float16"],
)
def test_a_file_gives_what_its_model_gives(folder: Path, library: Path, name: str, options: dict[str, Any]) -> None:
    model, inputs = model_of(name)
    file = exported(folder, name, **options)
    before, state = file.read_bytes(), tiny.Photograph(model)

    checked = check_onnx(file, model, inputs, library=library)

    assert checked.ok
    assert not [draw for draw in checked.draws if draw.skipped]
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
    assert [path.name for path in folder.iterdir() if path.name.startswith(f".{file.name}")] == []
    assert tiny.Photograph(model).differences(state) == []


def test_a_cache_is_empty_at_first_and_handed_on(folder: Path) -> None:
    model, _ = model_of("llama")

    checked = check_onnx(exported(folder, "llama", with_past=True), model)

    steps = {draw.name: draw.lengths for draw in checked.draws}
    first, following = steps["first step"], steps["next step"]
    assert first["past_sequence"] == 0
    assert following == {**first, "past_sequence": first["sequence"], "sequence": 1}
    assert steps["one new token"]["sequence"] == 1
    assert {output.name for output in route_of(checked).outputs} >= {"logits", "present.0.key", "present.2.value"}


@pytest.mark.parametrize(("name", "options"), [("modular", {}), ("llama", {"with_past": True})])
def test_a_model_is_left_in_the_modes_it_had(folder: Path, name: str, options: dict[str, Any]) -> None:
    model, inputs = tiny.rewritten(name)
    tiny.open_up(model)
    model.train()
    [*model.modules()][5].eval()
    modes = [module.training for module in model.modules()]

    assert check_onnx(exported(folder, name, **options), model, inputs).ok

    assert [module.training for module in model.modules()] == modes


def test_weights_in_a_file_of_their_own_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGE", 1000)
    model, inputs = model_of("vit")
    export_onnx(model, tmp_path / "large.onnx", inputs)
    assert (tmp_path / "large.onnx.data").exists()

    assert check_onnx(tmp_path / "large.onnx", model, inputs).ok

    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]


# ------------------------------------------------------------------------------------------------- what is wrong is found


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


def test_a_huge_number_hides_nothing(tmp_path: Path) -> None:
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


def test_a_model_that_counts_its_calls_is_left_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * scale

    model, inputs = Counting(), {"x": torch.randn(3, 6), "scale": torch.tensor(2.0)}
    export_onnx(model, tmp_path / "model.onnx", inputs)
    assert "writes to its buffers calls" in caplog.text
    assert check_onnx(tmp_path / "model.onnx", model, inputs, routes=STANDARD).ok
    assert model.calls == 0


def test_an_additive_mask_is_drawn_as_one(tmp_path: Path) -> None:
    class Additive(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x + mask).softmax(-1).nan_to_num()

    inputs = {"x": torch.randn(3, 6), "mask": torch.zeros(3, 6).masked_fill(torch.ones(3, 6).tril() == 0, -torch.inf)}
    export_onnx(Additive(), tmp_path / "model.onnx", inputs)
    ports = (Port(name="mask", dtype="float", shape=("batch", "sequence")),)
    for draw in draws(ports, {"mask": inputs["mask"]}, {"mask": inputs["mask"]}):
        assert not draw.feeds["mask"].isnan().any()
    assert check_onnx(tmp_path / "model.onnx", Additive(), inputs, routes=STANDARD).ok


def test_another_rewrite_is_refused(folder: Path) -> None:
    model, inputs = tiny.rewritten("modular", "parallel")

    with pytest.raises(ExportError, match=r"another rewrite: its plan is \w{12}, the model's \w{12}"):
        check_onnx(exported(folder, "modular"), model, inputs)


def negated(model: onnx.ModelProto) -> None:
    """The worst sums are chosen instead of the best."""
    node = next(node for node in model.graph.node if node.op_type == "ProductKeyTopk")
    for place in (0, 1):
        model.graph.node.insert(0, helper.make_node("Neg", [node.input[place]], [f"minus{place}"]))
        node.input[place] = f"minus{place}"
    _sorted(model)


def shifted(model: onnx.ModelProto) -> None:
    """The slots beside the best."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "memory.0.slots":
                node.input[place] = "shifted"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(64), "all"))
    model.graph.node.append(helper.make_node("Add", ["memory.0.slots", "one"], ["more"]))
    model.graph.node.append(helper.make_node("Mod", ["more", "all"], ["shifted"]))
    _sorted(model)


def repeated(model: onnx.ModelProto) -> None:
    """The best slot, k times: no sum is too low."""
    node = next(node for node in model.graph.node if node.op_type == "ProductKeyTopk")
    node.output[1] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int64), "first"))
    model.graph.node.append(helper.make_node("Gather", ["before", "first"], ["memory.0.slots"], axis=-1))
    _sorted(model)


def outside(model: onnx.ModelProto) -> None:
    """Slots past the table: the runtime must refuse."""
    shifted(model)
    next(w for w in model.graph.initializer if w.name == "all").CopyFrom(numpy_helper.from_array(np.array(10**6), "all"))
    next(w for w in model.graph.initializer if w.name == "one").CopyFrom(numpy_helper.from_array(np.array(10**5), "one"))


def _sorted(model: onnx.ModelProto) -> None:
    """Every node after those it reads, as ONNX wants it."""
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, done = [*model.graph.node], []
    while waiting:
        node = next(node for node in waiting if set(node.input) <= known)
        waiting.remove(node)
        done.append(node)
        known |= set(node.output)
    del model.graph.node[:]
    model.graph.node.extend(done)


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
    """Every key four times: which of 16 slots of one sum are read is chance, and their values differ."""
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
        assert len(folded) == 3  # the keys, turned for the product: [2 · heads, key_dim / 2, keys]
        for weight in folded:
            array = np.ascontiguousarray(numpy_helper.to_array(weight)[..., FOUR_TIMES])
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        for place in range(3):  # keys in another order: of equal sums a runtime takes the first it meets
            reversed_choice(file, place)

    file = edited(exported(folder, "modular"), tmp_path / "twice.onnx", edit)

    checked = check_onnx(file, model, inputs, routes=STANDARD)

    ties = route_of(checked).ties
    assert checked.ok
    assert ties.differing > ties.rows / 10
    assert ties.gap <= 1
    assert ties.wrong == 0
    assert max(output.relative for output in route_of(checked).outputs) < 1e-5


def reversed_choice(model: onnx.ModelProto, place: int) -> None:
    """Have top-k number `place` see its keys in reverse, and turn its slots back."""
    node = next(node for node in model.graph.node if f"memory.{place}.slots" in node.output)
    fresh = [f"keys{place}.{half}" for half in (0, 1)]
    constants = {"end": [-1], "start": [np.iinfo(np.int64).min], "axis": [-1], "step": [-1], "last": [63]}
    known = {weight.name for weight in model.graph.initializer}
    for name, value in constants.items():
        if name not in known:
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    for half in (0, 1):
        model.graph.node.append(helper.make_node("Slice", [node.input[half], "end", "start", "axis", "step"], [fresh[half]]))
        node.input[half] = fresh[half]
    node.output[1] = f"backward{place}"
    model.graph.node.append(helper.make_node("Sub", ["last", f"backward{place}"], [f"memory.{place}.slots"]))
    _sorted(model)


def brute(scores1: np.ndarray, scores2: np.ndarray) -> np.ndarray:
    """All sums, by slot."""
    return (scores1[..., :, None] + scores2[..., None, :]).reshape(*scores1.shape[:-1], -1).astype(np.float64)


@settings(max_examples=40, deadline=None)
@given(n1=st.integers(2, 6), n2=st.integers(2, 6), k=st.integers(1, 2), seed=st.integers(0, 999), softmax=st.booleans())
def test_a_forced_choice_is_judged_by_all_sums(n1: int, n2: int, k: int, seed: int, softmax: bool) -> None:
    random = np.random.default_rng(seed)
    scores1, scores2 = (random.integers(-2, 3, (3, n)).astype(np.float32) for n in (n1, n2))  # whole numbers: many ties
    chosen = np.stack([random.choice(n1 * n2, k, replace=False) for _ in range(3)])
    sums = brute(scores1, scores2)
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


def test_a_row_without_numbers_has_no_best_slots() -> None:
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 2.0, 1.0]])

    with Choices([torch.tensor([[0, 4], [4, 5]])], tolerance=1e-4) as choices:
        ops.product_key_topk(scores, scores, 2)

    assert (choices.ties.rows, choices.ties.differing, choices.ties.wrong) == (2, 0, 0)


# ----------------------------------------------------------------------------------------------------------------- inputs


def test_a_length_that_the_model_does_not_take_is_told(folder: Path) -> None:
    """Positions are a table of 32 rows."""
    model, _ = model_of("modular")

    checked = check_onnx(exported(folder, "modular"), model, {"ids": tiny.tokens(2, 30)})

    (draw,) = [draw for draw in checked.draws if draw.skipped]
    assert draw.name == "longer"
    assert draw.lengths["sequence"] > 32
    assert "must match the size" in draw.skipped
    assert checked.ok


def test_real_inputs_are_dicts_or_files(folder: Path, tmp_path: Path) -> None:
    model, inputs = model_of("modular")
    np.savez(tmp_path / "real.npz", ids=tiny.tokens(1, 9).numpy().astype(np.int32))

    checked = check_onnx(exported(folder, "modular"), model, inputs, real=[{"ids": tiny.tokens(3, 7)}, tmp_path / "real.npz"])

    assert [(draw.lengths["batch"], draw.lengths["sequence"]) for draw in checked.draws[1:3]] == [(3, 7), (1, 9)]
    assert checked.draws[2].name.endswith("real.npz")


@pytest.mark.parametrize(
    ("real", "error", "said"),
    [
        ({"tokens": tiny.tokens()}, ExportError, "takes ids, and real input 0 gives tokens"),
        ({"ids": tiny.tokens().float()}, ExportError, "int64 in the file, and torch.float32"),
        ({"ids": tiny.tokens()[0]}, ExportError, r"\[batch, sequence\] in the file, and \[5\]"),
        ({"ids": tiny.tokens(1, 40)}, ModelError, "does not run on real input 0"),
        ("nothing.npz", ExportError, "cannot be read"),
    ],
)
def test_real_inputs_that_do_not_fit_are_refused(folder: Path, real: Any, error: type[Exception], said: str) -> None:
    model, inputs = model_of("modular")

    with pytest.raises(error, match=said):
        check_onnx(exported(folder, "modular"), model, inputs, real=[real])


def test_an_example_of_another_model_is_refused(folder: Path) -> None:
    model, inputs = tiny.rewritten("llama")
    pools_of(model).record = None  # the plan, by which the file would be told apart first

    with pytest.raises(ExportError, match="the file takes ids, and the example gives input_ids"):
        check_onnx(exported(folder, "modular"), model, inputs)


def test_equally_long_axes_stay_equally_long_and_padding_is_tried() -> None:
    ports = [
        Port(name="ids", dtype="int64", shape=("batch", "sequence")),
        Port(name="attention_mask", dtype="int64", shape=("batch", "mask_sequence")),
        Port(name="twice", dtype="float", shape=("2*sequence + 1", 3)),
    ]
    example = {"ids": tiny.tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64), "twice": torch.randn(11, 3)}

    made = draws(ports, example, example)

    for draw in made:
        assert lengths_of(ports, draw.feeds, "") == draw.lengths
        assert draw.lengths["sequence"] == draw.lengths["mask_sequence"]
        assert draw.feeds["twice"].shape == (2 * draw.lengths["sequence"] + 1, 3)
        assert set(draw.feeds["ids"].unique().tolist()) <= set(example["ids"].unique().tolist())
    padded = {draw.name: draw.feeds["attention_mask"] for draw in made if "padded" in draw.name}
    assert all(mask.diff(dim=-1).ge(0).all() and (mask[:, -1] == 1).all() for n, mask in padded.items() if "left" in n)
    assert all(mask.diff(dim=-1).le(0).all() and (mask[:, 0] == 1).all() for n, mask in padded.items() if "right" in n)
    assert len(padded) == 2
    assert not any(mask.all() for mask in padded.values())


def test_lengths_follow_from_sums_of_products() -> None:
    lengths = {"a": 3, "b": 0, "past.0_axis1": 5}

    assert [evaluated(dim, lengths) for dim in (7, "a", "a + b", "2*a + 1", "a*past.0_axis1")] == [7, 3, 3, 7, 15]
    assert [evaluated(dim, lengths) for dim in ("c", "a + c", "a//2", "a - 1", "?")] == [None] * 5


def tokenizer_in(directory: Path, *, pad: bool) -> None:
    """A tokenizer of words of one letter, as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(32 + place): place for place in range(64)} | {"?": 31}
    own = Tokenizer(models.WordLevel(letters, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": " ", "padding_side": "left"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="?", **special).save_pretrained(directory)


@pytest.mark.parametrize("pad", [True, False])
def test_texts_are_tried_where_a_tokenizer_lies(folder: Path, tmp_path: Path, pad: bool) -> None:
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


def test_a_route_that_is_not_there_is_skipped_or_refused(folder: Path, tmp_path: Path) -> None:
    model, inputs = model_of("vit")

    def written_out(file: onnx.ModelProto) -> None:
        file.CopyFrom(onnx.inliner.inline_local_functions(file))

    plain = edited(exported(folder, "vit"), tmp_path / "plain.onnx", written_out)
    checked = check_onnx(plain, model, inputs)
    assert checked.ok
    assert route_of(checked).kernels == {}
    assert "no memory operators" in route_of(checked, "native").skipped
    with pytest.raises(ExportError, match="native: the file holds no memory operators"):
        check_onnx(plain, model, inputs, routes=("native",))

    native = edited(exported(folder, "vit"), tmp_path / "native.onnx", lambda file: file.ClearField("functions"))
    with pytest.raises(ExportError, match="standard: the file holds no function for ProductKeyTopk, SparseLookup"):
        check_onnx(native, model, inputs, routes=("standard",))


def test_files_that_are_not_ours_are_refused(folder: Path, tmp_path: Path) -> None:
    model, inputs = model_of("vit")
    with pytest.raises(ExportError, match="there is no file"):
        check_onnx(tmp_path / "nothing.onnx", model, inputs)
    (tmp_path / "cut.onnx").write_bytes(exported(folder, "vit").read_bytes()[:1000])
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        check_onnx(tmp_path / "cut.onnx", model, inputs)
    other = edited(exported(folder, "vit"), tmp_path / "other.onnx", lambda file: file.ClearField("metadata_props"))
    with pytest.raises(ExportError, match="does not say its dtype"):
        check_onnx(other, model, inputs)


def test_a_program_is_checked_too(folder: Path, tmp_path: Path) -> None:
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
    at_its_lengths, others = checked.draws[:2], checked.draws[2:]  # traced without dynamic axes, it takes no other lengths
    assert not any(draw.skipped for draw in at_its_lengths)
    assert all("to be equal to 3" in draw.skipped for draw in others)


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
    made = compared("y", torch.tensor(found), torch.tensor(expected), "example", 1e-4)

    assert (made.relative, made.misplaced) == (relative, misplaced)
    assert made.ok == (not relative and not misplaced)


def test_whole_numbers_must_be_equal() -> None:
    made = compared("y", torch.tensor([100_000, 3]), torch.tensor([100_001, 3]), "example", 1e-4)

    assert made.misplaced == 1
    assert not made.ok


def test_a_saved_directory_is_a_model(folder: Path, tmp_path: Path) -> None:
    model, _ = tiny.rewritten("llama")
    tiny.open_up(model)
    memrewrite.save(model, tmp_path / "saved")

    checked = check_onnx(exported(folder, "llama", with_past=True), str(tmp_path / "saved"))

    assert checked.ok
    assert checked.plan

    def say_source(file: onnx.ModelProto) -> None:
        file.metadata_props.add(key="memrewrite.source", value="saved")

    said = edited(exported(folder, "llama", with_past=True), tmp_path / "said.onnx", say_source)
    assert check_onnx(said).ok
    with pytest.raises(ExportError, match="does not say what it was exported from"):
        check_onnx(exported(folder, "llama", with_past=True))
