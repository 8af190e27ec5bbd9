"""Builds a Hugging Face architecture from config.json, as data: no code of the file runs, and no other file is read.

Flow: the parsed config → refusals: what would make transformers run code, import a package by name, or read other files → the
class that `architectures` names, which must be a model of transformers → its config → the model on meta, with a bounded number
of modules, for comparison with the weights → the model.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from memrewrite.errors import ModelError, in_one_line
from memrewrite.site import dtype_named

log = logging.getLogger("memrewrite")

CODE = ("auto_map", "custom_pipelines")  # names of Python code, which a model of transformers itself does not need
ATTENTION = ("eager", "sdpa", "flex_attention")  # any other may be a kernel that is downloaded
EXPERTS = ("eager", "batched_mm", "grouped_mm")
MAX_MODULES = 500_000
LIMITS = {  # of whole numbers, by the names of their fields: a count of modules or labels is a loop in Python
    r"layer|depth|block|stage|label|expert|head|group": 10**6,
    r"^num_|position": 10**8,
    r"": 2**53,
}
SPECIAL_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, and its config."""

    kind: Any
    config: Any
    where: Path

    def outline(self, tensors: int) -> nn.Module:
        """The model on meta: names and shapes without memory.

        `tensors`: how many the files contain. Raises `ModelError` for a config that asks for far more modules than a model of
        that many tensors has, and for one of which no model can be built.
        """
        with _bounded(min(MAX_MODULES, 20_000 + 1000 * tensors)):
            return self._built(torch.device("meta"))

    def build(self) -> nn.Module:
        """The model, with arbitrary weights. Raises `ModelError`."""
        return self._built(None)

    def _built(self, device: torch.device | None) -> nn.Module:
        from transformers import initialization

        safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # `linspace(...).item()` in constructors
        with ExitStack() as contexts:
            for context in (initialization.no_init_weights(), _default_dtype(self.config), quiet()):
                contexts.enter_context(context)
            if device is not None:
                contexts.enter_context(device)
                contexts.enter_context(safe())
            try:
                built: nn.Module = self.kind(copy.deepcopy(self.config))
            except Exception as error:  # transformers raises many classes for a config whose fields do not fit together
                raise unusable(self.where, f"{self.kind.__name__} cannot be built: {in_one_line(error)}") from error
        return built


def architecture(data: Mapping[str, Any], where: Path) -> Architecture | None:
    """The class and config that a parsed config.json describes; None if `architectures` is no model of transformers.

    Raises `ModelError` for what `refusal` names, and for fields of which no config can be made.
    """
    refuse(data, where)
    kind = model_class(data)
    return Architecture(kind, config_of(kind.config_class, data, where), where) if kind else None


def needed_architecture(data: Mapping[str, Any], where: Path) -> Architecture:
    """As `architecture`; raises `ModelError` if `architectures` is no model of transformers."""
    found = architecture(data, where)
    if found is None:
        what = f"transformers {_transformers().__version__} has no model class {named_class(data)!r}"
        raise unusable(
            where, what, "upgrade transformers, or build the base yourself and pass it: memrewrite.load(directory, model)"
        )
    return found


def base_architecture(data: Mapping[str, Any], where: Path) -> Architecture:
    """The model without a head of this `model_type`. Raises `ModelError` if transformers has none."""
    transformers, name = _transformers(), str(data.get("model_type"))
    kind = transformers.CONFIG_MAPPING[name] if name in list(transformers.CONFIG_MAPPING) else None
    model = transformers.MODEL_MAPPING.get(kind, None) if kind else None
    model = model[0] if isinstance(model, (tuple, list)) else model
    if model is None:
        raise unusable(where, f"transformers {transformers.__version__} has no model type {name!r}", "upgrade transformers")
    log.warning("transformers has no class %r: the model is loaded without its head", named_class(data))
    return Architecture(model, config_of(kind, data, where), where)


def config_of(kind: Any, data: Mapping[str, Any], where: Path) -> Any:
    """The config of the class `kind` with the fields of a parsed config.json. Raises `ModelError`."""
    with quiet():
        try:
            config = kind.from_dict(without_code(data))
        except Exception as error:  # many classes, as above
            raise unusable(where, f"{where.name!r} is no config of {kind.__name__}: {in_one_line(error)}") from error
    return config


def set_generation(model: Any, data: Any, where: Path, *, of_model: bool = False) -> None:
    """Give a model the generation config of a file; `of_model`: the file is the model's config. Raises `ModelError`."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        return
    with quiet():
        try:
            fields = {key: value for key, value in without_code(data).items() if key != "custom_generate"}
            options = {"_from_model_config": True} if of_model else {}
            model.generation_config = _transformers().GenerationConfig.from_dict(fields, **options)
        except Exception as error:  # many classes, as above
            raise unusable(where, f"{where.name!r} is no generation config: {in_one_line(error)}") from error


def model_class(data: Mapping[str, Any]) -> Any | None:
    """The class that `architectures` names, if it is a model of transformers; never anything else that it contains."""
    name, transformers = named_class(data), _transformers()
    if not name.isidentifier() or name.startswith("_"):
        return None
    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # it needs a package that is not installed
        return None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and getattr(found, "config_class", None) is not None else None


def refusal(data: Mapping[str, Any]) -> str | None:
    """Why this config cannot be used as data alone: what transformers would run, import or read because of it."""
    for place, key, value in _fields(data):
        if value in (None, False, "", [], {}) or _is_gguf(key, value):
            continue
        if key in ("quantization_config", "kernel_config", "fusion_config", "distributed_config"):
            return f"`{place}` makes transformers import other packages"
        if key.strip("_") in ("attn_implementation", "attn_implementation_internal") and not _among(value, ATTENTION):
            return f"`{place}: {value}` may be a kernel that is downloaded and run"
        if key.strip("_") in ("experts_implementation", "experts_implementation_internal") and not _among(value, EXPERTS):
            return f"`{place}: {value}` may be a kernel that is downloaded and run"
        if key in ("use_pretrained_backbone", "backbone", "transformers_weights", "configuration_files"):
            return f"`{place}: {value}` makes transformers read other files, or download them"
        if key == "model_type" and str(value).startswith("timm"):
            return f"`{place}: {value}` is a model of another package, timm"
    return None


def refuse(data: Mapping[str, Any], where: Path) -> None:
    """Raise `ModelError` for what `refusal` names, for a dtype that torch does not have, and for absurd numbers."""
    if reason := refusal(data):
        hint = (
            "remove the field, or build the model in a Python file; for a Hugging Face directory that you trust: --trust-code"
        )
        raise unusable(where, reason, hint)
    for place, key, value in _fields(data):
        if key in ("dtype", "torch_dtype") and value is not None and _dtype(value) is None:
            raise unusable(where, f"`{place}: {value}` is no dtype of torch")
        limit = next(limit for pattern, limit in LIMITS.items() if re.search(pattern, key))
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, (int, float)) and not isinstance(n, bool) and limit < abs(n) < float("inf") for n in numbers):
            raise unusable(where, f"`{place}` is above {limit}, which no model has")


def unusable(where: Path, what: str, hint: str = "copy or download the file again") -> ModelError:
    """The error for a config that cannot be used."""
    return ModelError(what, where=str(where), hint=hint)


def _fields(value: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Place, key and value of every field, also of nested configs."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{place}.{key}" if place else str(key)
            yield inner, str(key), item
            yield from _fields(item, inner)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _fields(item, f"{place}[{number}]")


def _among(value: Any, allowed: tuple[str, ...]) -> bool:
    return all(v in (None, *allowed) for v in (value.values() if isinstance(value, Mapping) else [value]))


def without_code(value: Any) -> Any:
    """A copy without names of code, in which transformers' spelling of special floats is the float."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in SPECIAL_FLOATS:
            return SPECIAL_FLOATS[value["__float__"]]
        return {key: without_code(item) for key, item in value.items() if key not in CODE and not _is_gguf(key, item)}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def _is_gguf(key: str, item: Any) -> bool:
    """True for the quantization of a gguf file, which configs still name: the saved weights are no longer quantized."""
    return key == "quantization_config" and isinstance(item, Mapping) and item.get("quant_method") == "gguf"


def named_class(data: Mapping[str, Any]) -> str:
    """The first name under `architectures`, or ""."""
    named = data.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        hint = "pip install 'memrewrite[hf]'"
        raise ModelError("the package 'transformers' is needed to load this model, and is not installed", hint=hint)
    import transformers

    return transformers


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Raise ValueError in a constructor of this thread that registers more than `most` modules."""
    count, here = 0, threading.get_ident()

    def counted(_: nn.Module, name: str, __: nn.Module) -> None:
        nonlocal count
        count += threading.get_ident() == here
        if count > most:
            raise ValueError(f"the model has more than {most} modules, and the files contain fewer tensors")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses progress bars and warnings of transformers."""
    logging_ = _transformers().utils.logging
    level, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(level)
        if bars:
            logging_.enable_progress_bar()


@contextmanager
def _default_dtype(config: Any) -> Iterator[None]:
    before, named = torch.get_default_dtype(), _dtype(getattr(config, "dtype", None))
    torch.set_default_dtype(named if named is not None and named.is_floating_point else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dtype(value: Any) -> torch.dtype | None:
    """A dtype, or the dtype with this name; None for anything else."""
    if isinstance(value, torch.dtype):
        return value
    try:
        return dtype_named(value)
    except (ValueError, TypeError):  # an unhashable value
        return None
