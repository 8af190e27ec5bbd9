"""Loads a Hugging Face directory: weights from safetensors or gguf; nothing is downloaded or unpickled.

Flow: the files of the directory → gguf, safetensors, or a refusal with a hint → the class that the config names → the model,
and the files that a saved result needs to be loaded again. Without `trust_code`, transformers gets the parsed config and the
tensors, and opens no file of the directory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memrewrite.errors import MemrewriteError, ModelError, in_one_line
from memrewrite.passes.sources.hugging_face import (
    Architecture,
    architecture,
    base_architecture,
    model_class,
    named_class,
    quiet,
    refusal,
    set_generation,
)
from memrewrite.passes.sources.json_text import parse_json
from memrewrite.passes.sources.python_file import require_trust
from memrewrite.passes.storage.base_model import CONFIG, GENERATION
from memrewrite.passes.storage.saved_tensors import Header, bytes_of, headers_of, refuse_too_large, state_of, values_of
from memrewrite.passes.storage.tensor_files import INDEX

log = logging.getLogger("memrewrite")

_PARSING = threading.Lock()  # of gguf files: one at a time
ADAPTER, WHOLE = "adapter_config.json", "model.safetensors"
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
    where = str(directory / gguf if gguf else directory)
    with quiet(), _parsed_once() if gguf else nullcontext():
        try:
            model, info = _from_gguf(directory / gguf) if gguf else _from_safetensors(directory, trust_code)
        except MemrewriteError:
            raise
        except Exception as error:  # transformers raises many classes, and passes on those of torch and safetensors
            raise ModelError(
                f"transformers cannot load this model: {in_one_line(error)}",
                where=where,
                hint="the files may be truncated or of another version: copy or download them again",
            ) from error
        tokenizer = gguf_tokenizer(directory / gguf) if gguf and with_tokenizer else None
    if missing := sorted(info["missing_keys"]):
        log.warning("%d tensors are not in the files and start random: %s", len(missing), ", ".join(missing[:5]))
    return Pretrained(model, () if gguf else config_files_of(directory), tokenizer)


def _from_gguf(file: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a gguf file. Its config is made from the file's own metadata."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    options = {"local_files_only": True, "trust_remote_code": False, "dtype": "auto", "output_loading_info": True}
    with _alone(file) as folder:
        model, info = loader.from_pretrained(folder, gguf_file=file.name, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # the weights are no longer quantized: the model can be saved
        quantizer.remove_quantization_config(model)
    return model, info


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, a gguf file is parsed once. Raises `ModelError` if the package `gguf` is not installed.

    transformers parses it for the config, again for the weights and again for the tokenizer, and builds the table of all names
    for every module; it gets `gguf`'s functions by name at each of these calls.
    """
    if importlib.util.find_spec("gguf") is None:
        hint = "pip install 'memrewrite[hf]'"
        raise ModelError("the package 'gguf' is needed to load this model, and is not installed", hint=hint)
    import gguf

    with _PARSING, ExitStack() as originals:
        parsed, names = lru_cache(gguf.GGUFReader), lru_cache(gguf.get_tensor_name_map)
        once = {"GGUFReader": lambda path: parsed(os.path.realpath(path)), "get_tensor_name_map": names}
        for name, function in once.items():
            originals.callback(setattr, gguf, name, getattr(gguf, name))
            setattr(gguf, name, function)
        yield


def _from_safetensors(directory: Path, trust_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model of config.json and safetensors, and what transformers says of the keys."""
    _refuse_adapter(directory)
    data = _read_json(directory / CONFIG)
    if trust_code and (refusal(data) or (data.get("auto_map") and model_class(data) is None)):
        return _by_transformers(directory, data)
    found = architecture(data, directory / CONFIG)
    if found is None and data.get("auto_map"):
        what = f"the model's class {named_class(data)!r} is Python code in the directory"
        require_trust(trust_code, what, where=directory, kind=ModelError)
    found = found or base_architecture(data, directory / CONFIG)
    headers = headers_in(directory, found)
    outline = found.outline(len(headers))
    refuse_too_large(bytes_of(outline), torch.device("cpu"), directory / CONFIG, kind=ModelError)
    # copies: values in the memory of a file would change with it
    state = {name: value.clone() for name, value in values_of(headers, unreadable)}
    options = {"dtype": "auto", "output_loading_info": True, "local_files_only": True, "trust_remote_code": False}
    loaded: tuple[nn.Module, dict[str, Any]]
    try:
        loaded = found.kind.from_pretrained(None, config=found.config, state_dict=state, **options)  # it opens no file
    except RuntimeError as error:  # transformers writes the shapes into its log
        for name, tensor in state_of(outline).items():
            if name in headers and headers[name].shape != tuple(tensor.shape):
                what = f"{name!r} has the shape {headers[name].shape}, and {tuple(tensor.shape)} by {CONFIG}"
                raise unreadable(headers[name].file, what) from error
        raise
    generation = directory / GENERATION
    given = generation if generation.is_file() else directory / CONFIG
    set_generation(loaded[0], _read_json(given), given, of_model=given != generation)
    return loaded


def _by_transformers(directory: Path, data: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model as transformers itself reads the directory, which may run the directory's code: it is trusted."""
    import transformers

    own, name = data.get("auto_map") or {}, named_class(data)
    auto = [a for a, target in own.items() if a.startswith("AutoModel") and str(target).rpartition(".")[2] == name]
    loader: Any = model_class(data) or getattr(transformers, auto[0] if auto else "AutoModel")
    options = {"dtype": "auto", "output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    loaded: tuple[nn.Module, dict[str, Any]] = loader.from_pretrained(directory, trust_remote_code=True, **options)
    return loaded


def headers_in(directory: Path, found: Architecture) -> dict[str, Header]:
    """The tensors of model.safetensors, else of the shards that the index names, and of files that the config class names."""
    if (directory / WHOLE).is_file():
        files = [WHOLE]
    elif (directory / INDEX).is_file():
        shards = _read_json(directory / INDEX).get("weight_map")
        files = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    else:
        raise ModelError(f"the directory has neither {WHOLE} nor {INDEX}", where=str(directory), hint=f"name the file {WHOLE}")
    if any(Path(file).name != file or not file.endswith(".safetensors") for file in files):
        raise ModelError("the index names a file outside the directory", where=str(directory / INDEX), hint="download it again")
    files += [name for name in getattr(type(found.config), "extra_files", ()) if (directory / name).is_file()]
    return {name: header for file in files for name, header in headers_of(directory / file, unreadable).items()}


def unreadable(file: Path, why: str) -> ModelError:
    """The error for a file of a Hugging Face directory."""
    return ModelError(f"{file.name!r} cannot be read: {why}", where=str(file), hint="copy or download the file again")


def _refuse_adapter(directory: Path) -> None:
    """Raise `ModelError` for an adapter: transformers would load the base model from the place that it names."""
    if (directory / ADAPTER).is_file():
        hint = "merge the adapter into its base model with peft, and save that"
        raise ModelError(f"the directory contains an adapter ({ADAPTER})", where=str(directory / ADAPTER), hint=hint)


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
        weight_map = _read_json(directory / index).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if lacking := sorted(shard for shard in shards if shard not in names):
            hint = "copy or download the directory again"
            raise ModelError(f"weights are missing: {', '.join(lacking)}", where=str(directory / index), hint=hint)


def config_files_of(directory: Path) -> tuple[Path, ...]:
    """All files except weights and Python code: configs, tokenizer, chat template, licence."""
    found = []
    for file in sorted(directory.iterdir()):
        weights = file.name.endswith((*WEIGHTS, ".index.json"))
        if file.is_file() and not weights and file.suffix != ".py" and not file.name.startswith("."):
            found.append(file)
    return tuple(found)


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer in a gguf file. Raises `ModelError`."""
    from transformers import AutoTokenizer

    with _alone(file) as folder, quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, gguf_file=file.name)
        except Exception as error:  # transformers raises many classes, and passes on those of tokenizers
            hint = "copy or download the file again"
            raise ModelError(f"the tokenizer cannot be loaded: {in_one_line(error)}", where=str(file), hint=hint) from error


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A directory that contains a link to this file only, so that nothing beside the file is read."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = parse_json(file.read_bytes(), special_floats=True)
    except (OSError, ValueError) as error:
        what, hint = f"{file.name!r} cannot be read: {in_one_line(error, kind=False)}", "copy or download the file again"
        raise ModelError(what, where=str(file), hint=hint) from error
    if not isinstance(data, dict):
        raise ModelError(f"{file.name!r} contains no JSON object", where=str(file), hint="copy or download the file again")
    return data
