"""A config is data: no code, no prompt, no other file and no network, whatever it says; nonsense is one error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import saved_dirs
import tiny
import torch
from safetensors.torch import load_file

import memrewrite
from memrewrite.errors import UserError
from memrewrite.passes.storage import saved_tensors
from memrewrite.passes.storage.source import load_source


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, inputs = tiny.named("llama")
    memrewrite.apply(model, tiny.recipe(verify="off"), inputs)
    return memrewrite.save(model, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "llama"
    tiny.llama().save_pretrained(folder)
    return folder


@pytest.fixture(params=["saved", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    copied = Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model"))
    (copied / "evil.py").write_text("raise SystemExit('it ran')")
    return copied


def edit(folder: Path, **fields: Any) -> None:
    saved_dirs.edit_json(folder / "config.json", lambda config: config.update(fields))
    if (folder / saved_dirs.MANIFEST).exists():
        saved_dirs.correct_manifest(folder)


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_source(str(folder))
    assert caught.value.where
    assert caught.value.hint
    return str(caught.value)


AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
REFUSED: dict[str, dict[str, Any]] = {
    "a class of the directory": {"architectures": ["Evil"], "auto_map": AUTO_MAP},
    "a class of another repository": {"architectures": ["Evil"], "auto_map": {"AutoModelForCausalLM": "a/b--evil.Evil"}},
    "a kernel of the hub": {"attn_implementation": "kernels-community/flash-attn2"},
    "a kernel of the hub, by another name": {"_attn_implementation": "evil/kernel:run"},
    "kernels of parts": {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
    "flash attention": {"attn_implementation": "flash_attention_2"},
    "kernels of experts": {"experts_implementation": "evil/kernel"},
    "quantization": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quantization of a part": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "a pretrained backbone": {"backbone": "evil/backbone", "use_pretrained_backbone": True},
    "timm": {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/x", "architectures": ["TimmWrapperModel"]},
    "timm in a part": {"backbone_config": {"model_type": "timm_backbone", "backbone": "local-dir:/etc"}},
    "other weights": {"transformers_weights": "../other.safetensors"},
    "other configs": {"configuration_files": ["config.1.0.json"]},
    "other kernels": {"kernel_config": {"RMSNorm": "evil/kernel"}},
    "fused layers": {"fusion_config": {"patch_embeddings": True}},
    "a dtype of torch's names": {"dtype": "hub"},
    "an old dtype": {"torch_dtype": "load"},
    "a dtype that is a list": {"dtype": ["float32"]},
    "a billion layers": {"num_hidden_layers": 10**9},
    "many layers": {"num_hidden_layers": 30_000},
    "a billion labels": {"num_labels": 10**9},
    "a large width": {"hidden_size": 10**9},
    "a large MLP, which is replaced": {"intermediate_size": 10**10},
    "a large vocabulary": {"vocab_size": 10**13},
    "no heads": {"num_attention_heads": 0},
    "text for a number": {"hidden_size": "16"},
    "a list for a number": {"num_hidden_layers": [3]},
    "an activation that is none": {"hidden_act": "os.system"},
    "a norm that is none": {"rms_norm_eps": "x"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_cannot_do(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "many layers":  # the real bound takes seconds
        monkeypatch.setattr("memrewrite.passes.sources.hugging_face.MAX_MODULES", 1000)
    edit(folder, **REFUSED[case])
    assert "config.json" in error_of(folder) or case.startswith("a class of")


@pytest.mark.parametrize(
    "name", ["Trainer", "AutoModel", "pipeline", "PreTrainedModel", "LlamaConfig", "os", "__doc__", "", 5, None]
)
def test_only_a_model_of_transformers_is_used(name: Any, folder: Path) -> None:
    edit(folder, architectures=[name])
    if (folder / saved_dirs.MANIFEST).exists():
        assert "no model class" in error_of(folder)
    else:
        assert type(load_source(str(folder)).model).__name__ == "LlamaModel"  # by its model type, with a warning


def test_code_that_transformers_model_does_not_need_is_ignored(folder: Path) -> None:
    edit(folder, auto_map=AUTO_MAP, custom_pipelines={"x": {"impl": "evil.Evil"}}, more={"auto_map": AUTO_MAP})
    assert type(load_source(str(folder)).model).__name__ == "LlamaForCausalLM"


def test_generation_code_and_other_files_are_not_read(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "modeling_evil.py", "requirements.txt"):
        (folder / name).write_text("raise SystemExit('it ran')")
    generation = folder / "generation_config.json"
    saved_dirs.edit_json(generation, lambda config: config.update(custom_generate="evil", max_new_tokens=7))
    if (folder / saved_dirs.MANIFEST).exists():
        saved_dirs.correct_manifest(folder)
    model: Any = load_source(str(folder)).model
    assert model.generation_config.max_new_tokens == 7
    assert getattr(model.generation_config, "custom_generate", None) is None


def test_an_adapter_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "adapter" in error_of(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "x.bin"])
def test_an_index_names_files_of_its_directory(file: str, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    shutil.move(folder / "model.safetensors", folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    error_of(folder)


def test_the_weights_are_those_of_the_file_and_no_part_of_it(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    model: Any = load_source(str(folder)).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))  # in place
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    saved = load_file(plain / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in saved.items())


def test_memory_is_compared_before_it_is_used(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_tensors, "free_memory", lambda _: 1000)
    assert "free" in error_of(plain)


def test_a_config_with_infinities_as_transformers_writes_them(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "limit": [0.0, Infinity], "other": {"__float__": "-Infinity"}}')
    config: Any = load_source(str(folder)).model.config
    assert config.limit == [0.0, float("inf")]
    assert config.other == -float("inf")


# --------------------------------------------------------------------------------------------- what happens in a process

AUDITED = """
import sys, sysconfig, tempfile
from pathlib import Path
import memrewrite
from memrewrite.errors import UserError
from memrewrite.passes.storage.source import load_source
from memrewrite.passes.verify_saved import verify_saved

good, bad = (Path(name).resolve() for name in sys.argv[1:])
runs = [lambda d: load_source(str(d))]
if (good / "memrewrite.json").exists():
    runs += [memrewrite.load, verify_saved]
for run in runs:
    run(good)  # imports the libraries
here = Path(memrewrite.__file__).resolve().parents[1]
roots = [str(Path(p).resolve()) for p in (*sysconfig.get_paths().values(), *filter(None, sys.path), sys.base_prefix, here)]
allowed = [*roots, str(bad), tempfile.gettempdir(), "/proc/", "/sys/"]
forbidden = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}
seen = []

def hook(event, arguments):
    if event in forbidden:
        seen.append((event, arguments))
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = str(Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]).resolve())
        code = path.endswith((".py", ".pyc")) and not path.endswith("/memrewrite_auto.py")  # which is hashed
        code = code and path.startswith(str(bad))
        if code or not path.startswith(tuple(allowed)):
            seen.append((event, path))
    if event == "exec" and str(bad) in getattr(arguments[0], "co_filename", ""):
        seen.append((event, arguments[0].co_filename))
    if event == "import" and arguments[0].startswith("evil"):
        seen.append((event, arguments[0]))

sys.addaudithook(hook)
for folder in sorted(bad.iterdir()):
    for run in runs:
        try:
            run(folder)
            print(folder.name, "loaded")
        except UserError as error:
            print(folder.name, "refused", error.what)
assert not seen, seen
assert "evil" not in sys.modules
"""


def _evil_code(folder: Path) -> None:
    edit(folder, auto_map=AUTO_MAP, more={"auto_map": AUTO_MAP, "model_type": "llama"})


def _evil_class(folder: Path) -> None:
    edit(folder, auto_map=AUTO_MAP, architectures=["Evil"])


def _evil_kernel(folder: Path) -> None:
    edit(folder, attn_implementation="evil/kernel")


def _evil_base(folder: Path) -> None:
    if (folder / saved_dirs.MANIFEST).exists():
        base = {"kind": "huggingface", "code": "evil.py", "builder": "build"}
        saved_dirs.edit_json(folder / saved_dirs.MANIFEST, lambda m: m.update(base=base))


def _nothing(folder: Path) -> None:
    """A directory as it was saved."""


CHANGES = {"nothing": _nothing, "code": _evil_code, "class": _evil_class, "kernel": _evil_kernel, "base": _evil_base}


def test_nothing_runs_and_no_other_file_is_opened(folder: Path, tmp_path: Path) -> None:
    for name, change in CHANGES.items():
        change(Path(shutil.copytree(folder, tmp_path / "bad" / name)))
    command = [sys.executable, "-c", AUDITED, str(folder), str(tmp_path / "bad")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.split()[:2] for line in done.stdout.splitlines()]
    saved = (folder / saved_dirs.MANIFEST).exists()
    loads = {"nothing", "code"} if saved else {"nothing", "code", "base"}
    assert found == [
        [name, "loaded" if name in loads else "refused"] for name in sorted(CHANGES) for _ in range(3 if saved else 1)
    ]


def test_a_saved_model_whose_base_was_a_gguf_file_loads(saved: Path, tmp_path: Path) -> None:
    """Its config still names the quantization of the file; the saved weights are no longer quantized."""
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    gguf = {"quant_method": "gguf", "gguf_file": "model.gguf", "dequantize": False}
    saved_dirs.edit_saved(folder, "config.json", lambda config: config.update(quantization_config=gguf))
    memrewrite.load(folder)
