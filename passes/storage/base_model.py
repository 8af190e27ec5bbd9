"""The base of a rewritten model: what must be saved besides the weights so that the original architecture can be built again.

For a Hugging Face model that is its config; for a model from a Python file, the file and the name of its builder; any other
base is passed to `load` by the user.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from memrewrite.errors import CheckpointError
from memrewrite.passes.storage.python_file import build_from_file

Kind = Literal["huggingface", "python", "graph", "given"]


@dataclass(frozen=True)
class Base:
    """How an original architecture is built again, and the files that this needs.

    `files` are copied next to the weights (config, tokenizer, chat template); `code` is the Python file whose `builder`
    builds the model; `tokenizer` is any object with `save_pretrained`.
    """

    kind: Kind
    files: tuple[Path, ...] = ()
    code: Path | None = None
    builder: str = ""
    tokenizer: Any = None

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write to `folder` what `build_base` needs."""
        for file in self.files:
            shutil.copy2(file, folder / file.name)
        if self.kind == "huggingface":
            config: Any = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.code is not None:
            shutil.copy2(self.code, folder / self.code.name)

    def to_data(self) -> dict[str, str]:
        """Plain data for the manifest."""
        return {"kind": self.kind, "code": self.code.name if self.code else "", "builder": self.builder}

    @classmethod
    def from_data(cls, data: dict[str, str]) -> Base:
        """From the manifest."""
        return cls(data["kind"], code=Path(data["code"]) if data["code"] else None, builder=data["builder"])  # type: ignore[arg-type]


def base_of(model: nn.Module) -> Base:
    """The base of a live model: its Hugging Face config if it has one, else a base that the user passes to `load`."""
    is_hf = type(model).__module__.startswith("transformers.") and hasattr(model, "config")
    return Base("huggingface" if is_hf else "given")


def build_base(base: Base, folder: Path, *, trust_code: bool) -> nn.Module:
    """The original architecture with arbitrary weights.

    `trust_code` allows the saved Python file to run. Raises `CheckpointError` when the base cannot be built from the directory.
    """
    if base.kind == "huggingface":
        return _from_config(folder)
    if base.kind == "python" and base.code is not None:
        if not trust_code:
            raise CheckpointError(
                f"the base model is built by the saved file {base.code.name!r}, which is code and was not run",
                where=str(folder / base.code.name),
                hint="read it, then allow it: --trust-code, load(..., trust_code=True); or pass the base: load(..., model)",
            )
        return build_from_file(folder / base.code.name, base.builder)
    raise CheckpointError(
        "the saved directory does not contain what its base model is built from",
        where=str(folder),
        hint="build the original model yourself and pass it: memrewrite.load(directory, model)",
    )


def _from_config(folder: Path) -> nn.Module:
    """The class that a config names, built without random initial weights."""
    try:
        import transformers
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise CheckpointError(
            f"this model needs transformers ({error})", where=str(folder), hint="pip install 'memrewrite[hf]'"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no class {name!r}",
            where=str(folder / "config.json"),
            hint="upgrade transformers, or build the base yourself and pass it: memrewrite.load(directory, model)",
        )
    with no_init_weights(), _default_dtype(getattr(config, "dtype", None)):
        built: nn.Module = kind(config)
    return built


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(named if isinstance(named, torch.dtype) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
