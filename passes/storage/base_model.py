"""The base of a rewritten model: what must be saved besides the weights so that the original architecture can be built again.

For a Hugging Face model that is its config; for a model from a Python file, the file and the name of its builder; any other
base is passed to `load` by the user.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from memrewrite.errors import CheckpointError
from memrewrite.passes.sources.hugging_face import Architecture, needed_architecture, set_generation, unusable
from memrewrite.passes.sources.python_file import build_from_file
from memrewrite.passes.storage.rewritten_config import base_data, is_transformers_model

if TYPE_CHECKING:
    from memrewrite.passes.storage.manifest import SavedFiles

CONFIG, GENERATION = "config.json", "generation_config.json"

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
    return Base("huggingface" if is_transformers_model(model) else "given")


def saved_architecture(files: SavedFiles) -> Architecture:
    """The class and config of a saved Hugging Face base. Raises `CheckpointError` or `ModelError`."""
    data = files.json(CONFIG)
    if not isinstance(data, dict):
        raise unusable(files.folder / CONFIG, f"{CONFIG!r} contains no JSON object")
    return needed_architecture(base_data(data), files.folder / CONFIG)


def build_base(files: SavedFiles, *, trust_code: bool) -> nn.Module:
    """The original architecture with arbitrary weights.

    `trust_code` allows the saved Python file to run. Raises `CheckpointError` when the base cannot be built from the directory,
    and `ModelError` when its config or its Python file fails.
    """
    base = files.base
    if base.kind == "huggingface":
        built = saved_architecture(files).build()
        if GENERATION in files:
            set_generation(built, files.json(GENERATION), files.folder / GENERATION)
        return built
    if base.kind == "python":
        return build_from_file(files.code(trust_code=trust_code), base.builder)
    raise CheckpointError(
        "the saved directory does not contain what its base model is built from",
        where=str(files.folder),
        hint="build the original model yourself and pass it: memrewrite.load(directory, model)",
    )
