"""Loads a Hugging Face directory: weights from safetensors or gguf; nothing is downloaded or unpickled.

Flow: the files of the directory → gguf, safetensors, or a refusal with a hint → the class that the config names → the model,
and the files that a saved result needs to be loaded again.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from memrewrite.errors import ModelError, in_one_line

log = logging.getLogger("memrewrite")

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".pt2")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model, the files of its directory that are not weights, and the tokenizer if it was in a gguf file."""

    model: nn.Module
    config_files: tuple[Path, ...]
    tokenizer: Any | None


def load_pretrained(
    directory: Path, *, gguf: str | None = None, trust_code: bool = False, with_tokenizer: bool = True
) -> Pretrained:
    """Load a directory with config.json and safetensors, or with a gguf file. Raises `ModelError`.

    `gguf` names the file where there are several. `trust_code` allows the Python code of the directory to run.
    """
    gguf = gguf or _gguf_in(directory)
    transformers = _transformers(gguf)
    options: dict[str, Any] = {"local_files_only": True, "dtype": "auto", "output_loading_info": True}
    if gguf:
        loader, options["gguf_file"] = transformers.AutoModelForCausalLM, gguf
    else:
        loader, options["use_safetensors"] = _loader(transformers, directory, trust_code), True
        options |= {"trust_remote_code": True} if trust_code else {}
    where = str(directory / gguf if gguf else directory)
    tokenizer = None
    with _quiet(transformers):
        try:
            model, info = loader.from_pretrained(directory, **options)
            if gguf and with_tokenizer:
                tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=gguf, local_files_only=True)
        except Exception as error:  # transformers raises many classes, and passes on those of torch and safetensors
            raise ModelError(
                f"transformers cannot load this model: {in_one_line(error)}",
                where=where,
                hint="the files may be truncated or of another version: copy or download them again",
            ) from error
    if missing := sorted(info["missing_keys"]):
        log.warning("%d tensors are not in the files and start random: %s", len(missing), ", ".join(missing[:5]))
    return Pretrained(model, () if gguf else _config_files(directory), tokenizer)


def _gguf_in(directory: Path) -> str | None:
    """The gguf file to load, or None for safetensors. Raises `ModelError`, with a hint, when there is neither."""
    where = str(directory)
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    ggufs = [n for n in names if n.endswith(".gguf")]
    tensors = [n for n in names if n.endswith(".safetensors")]
    if "config.json" in names and tensors:
        _refuse_missing_shards(directory, names)
        return None
    if len(ggufs) > 1:
        hint = f"name one: {directory / ggufs[0]}"
        raise ModelError(f"the directory contains {len(ggufs)} gguf files", where=where, hint=hint)
    if ggufs:
        return ggufs[0]
    if "config.json" not in names:
        state = "is empty" if not names else "has no config.json"
        hint = "give a Hugging Face directory (config.json and safetensors), a gguf file, or a model.py"
        raise ModelError(f"the directory {state}: it is no saved model", where=where, hint=hint)
    if any(n.endswith(PICKLES) for n in names):
        hint = "convert: load the model once with transformers where you trust it, and call its save_pretrained"
        raise ModelError("the weights are pickles, which run code when they are loaded", where=where, hint=hint)
    raise ModelError("the directory has a config.json and no weights", where=where, hint="add model.safetensors")


def _refuse_missing_shards(directory: Path, names: list[str]) -> None:
    for index in (n for n in names if n.endswith(".safetensors.index.json")):
        shards = set(_read_json(directory / index).get("weight_map", {}).values())
        if lacking := sorted(str(shard) for shard in shards if shard not in names):
            hint = "copy or download the directory again"
            raise ModelError(f"weights are missing: {', '.join(lacking)}", where=str(directory / index), hint=hint)


def _loader(transformers: Any, directory: Path, trust_code: bool) -> Any:
    """The class that config.json names under `architectures`."""
    config = _read_json(directory / "config.json")
    named = config.get("architectures") or []
    name = str(named[0]) if isinstance(named, list) and named else ""
    known = getattr(transformers, name, None) if name else None
    if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
        return known
    own_classes = config.get("auto_map") or {}
    if own_classes and not trust_code:
        hint = "read the Python files in the directory; if you trust them, add --trust-code"
        raise ModelError(f"the model's class {name!r} is Python code in the directory", where=str(directory), hint=hint)
    for auto, target in own_classes.items():
        if auto.startswith("AutoModel") and str(target).rpartition(".")[2] == name:
            return getattr(transformers, auto)
    if name:
        log.warning("transformers has no class %r: the model is loaded without its head", name)
    return transformers.AutoModel


def _config_files(directory: Path) -> tuple[Path, ...]:
    """All files except weights and Python code: configs, tokenizer, chat template, licence."""
    found = []
    for file in sorted(directory.iterdir()):
        weights = file.name.endswith((*WEIGHTS, ".index.json"))
        if file.is_file() and not weights and file.suffix != ".py" and not file.name.startswith("."):
            found.append(file)
    return tuple(found)


def _transformers(gguf: str | None) -> Any:
    for name in ("transformers", *(("gguf",) if gguf else ())):
        if importlib.util.find_spec(name) is None:
            hint = "pip install 'memrewrite[hf]'"
            raise ModelError(f"the package {name!r} is needed to load this model, and is not installed", hint=hint)
    import transformers

    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppresses progress bars and load reports of transformers; `load_pretrained` logs the missing tensors itself."""
    logging_ = transformers.utils.logging
    level, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(level)
        if bars:
            logging_.enable_progress_bar()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what, hint = f"{file.name!r} cannot be read: {in_one_line(error, kind=False)}", "copy or download the file again"
        raise ModelError(what, where=str(file), hint=hint) from error
    if not isinstance(data, dict):
        raise ModelError(f"{file.name!r} contains no JSON object", where=str(file), hint="copy or download the file again")
    return data
