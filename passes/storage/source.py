"""Loads MODEL of the command line: a Python file or module, a Hugging Face directory, a saved result, an exported program.

Flow: the form of the argument selects a loader → the loader builds the model and the example inputs → a frozen `ModelSource`,
which also names the files that a saved result needs to be loaded again. Nothing is ever downloaded.

The contract of a Python file, `model.py`: it defines `build()`, which returns an `nn.Module`, or `model`, which is one;
and `inputs`, the example inputs or a function that returns them: a tuple, a dict, or a pair `(args, kwargs)`.
`model.py:tiny` uses the function or module named `tiny` instead, and `tiny_inputs` if it is defined, else `inputs`.

For a Hugging Face directory the class is the one that its config names, weights come from safetensors or gguf only, and the
inputs are created from config and forward signature. No model family is known here.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from memrewrite.atomic_write import recover
from memrewrite.errors import ModelError
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.sources.exported_program import read_program
from memrewrite.passes.sources.python_file import (
    defined_inputs,
    import_file,
    importable,
    input_names,
    location,
    model_and_inputs,
    user_error,
)
from memrewrite.passes.storage.base_model import Base, base_of
from memrewrite.passes.storage.load import load, saved_program
from memrewrite.passes.storage.manifest import is_saved, read_manifest
from memrewrite.passes.storage.pretrained import config_files_of, load_pretrained
from memrewrite.passes.storage.rewritten_model import rewritten_data

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class ModelSource:
    """A model with example inputs, and what a saved result needs besides the weights to be loaded again.

    `config_files`: the files of a Hugging Face directory that are not weights. `tokenizer`: only if it was in a gguf file.
    `code` and `builder`: the Python file, and the name in it that builds the model. `code` is None for a module that was
    imported by its dotted name; `builder` is then `package.module:name`. `neighbours`: files that `code` imports from its
    own directory, and that are not saved with it. `inputs_made`: True if the inputs were created from the model's config.
    """

    model: nn.Module | ExportedProgram
    inputs: Inputs
    name: str
    config_files: tuple[Path, ...] = ()
    code: Path | None = None
    builder: str = ""
    tokenizer: Any | None = None
    neighbours: tuple[Path, ...] = ()
    inputs_made: bool = False

    @property
    def base(self) -> Base:
        """What `save` needs so that `load` can build this model again."""
        if self.code is not None:
            return Base("python", code=self.code, builder=self.builder)
        if not isinstance(self.model, nn.Module):
            return Base("graph")
        kind = "given" if self.builder else base_of(self.model).kind
        return Base(kind, files=self.config_files, tokenizer=self.tokenizer)


def load_source(spec: str, *, trust_code: bool = False, with_tokenizer: bool = True) -> ModelSource:
    """Load the model that `spec` names.

    Args:
        spec: one of the forms of this module's docstring.
        trust_code: run the Python code of a Hugging Face or saved directory, and load a `.pt2`, which may contain pickles.
            A Python file or module that `spec` names is always run.
        with_tokenizer: also load the tokenizer of a gguf file.

    Raises:
        ModelError: there is no model, it cannot be loaded, or it needs `trust_code`.
        CheckpointError: a saved directory is damaged.
    """
    path = Path(spec).expanduser()
    before, _, name = spec.rpartition(":")
    if _is(path, Path.is_dir) or _is(path, recover):
        return _from_directory(path, trust_code, with_tokenizer)
    if _is(path, Path.is_file):
        return _from_file(path, trust_code, with_tokenizer)
    if before.endswith(".py") and name:
        return from_python(Path(before).expanduser(), name)
    if _MODULE.fullmatch(before) and name.isidentifier():
        return _from_module(before, name)
    if path.suffix == ".py":
        return from_python(path)
    hint = "nothing is downloaded: give a local directory, a model.py, file.py:name or package.module:name"
    if _MODULE.fullmatch(spec) and "." in spec:
        hint = f"for a Python module, name the builder too: {spec}:build"
    raise ModelError(f"there is no model at {spec!r}: no such file or directory", hint=hint)


def _is(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path)
    except (OSError, ValueError):  # a long name, a zero byte, a directory without permission
        return False


def _from_directory(path: Path, trust_code: bool, with_tokenizer: bool) -> ModelSource:
    if is_saved(path):
        return _from_saved(path, trust_code)
    if rewritten_data(path):
        model = load(path)
        return ModelSource(model, example_inputs(model), str(path), config_files_of(path), inputs_made=True)
    loaded = load_pretrained(path, trust_code=trust_code, with_tokenizer=with_tokenizer)
    inputs = example_inputs(loaded.model)
    return ModelSource(loaded.model, inputs, str(path), loaded.config_files, tokenizer=loaded.tokenizer, inputs_made=True)


def _from_file(path: Path, trust_code: bool, with_tokenizer: bool) -> ModelSource:
    if path.suffix == ".py":
        return from_python(path)
    if path.suffix == ".pt2":
        return _of_program(read_program(path, trust_code=trust_code), path)
    if path.suffix == ".gguf":
        loaded = load_pretrained(path.parent, gguf=path.name, trust_code=trust_code, with_tokenizer=with_tokenizer)
        inputs = example_inputs(loaded.model)
        return ModelSource(loaded.model, inputs, str(path), tokenizer=loaded.tokenizer, inputs_made=True)
    raise ModelError(
        f"{str(path)!r} is no model: a .py, .gguf or .pt2 file, or a directory was expected",
        hint="for weights, give the directory that contains them and config.json",
    )


def _from_saved(path: Path, trust_code: bool) -> ModelSource:
    """A saved result. Its inputs come from the saved Python file, the exported program, or the model's config."""
    files = read_manifest(path)
    if files.base.kind == "graph":
        return _of_program(saved_program(files, trust_code=trust_code), path)
    model = load(path, trust_code=trust_code)
    if files.base.kind != "python":
        return ModelSource(model, example_inputs(model), str(path), inputs_made=True)
    code = files.code(trust_code=trust_code)
    with importable(code.parent):
        inputs = defined_inputs(import_file(code), input_names(files.base.builder), code, code.parent)
    return ModelSource(model, inputs, str(path), code=code, builder=files.base.builder)


def _of_program(program: ExportedProgram, path: Path) -> ModelSource:
    if program.example_inputs is None:
        hint = "export it again; keep `example_inputs`"
        raise ModelError("the exported program contains no example inputs", where=str(path), hint=hint)
    args, kwargs = program.example_inputs
    return ModelSource(program, (tuple(args), dict(kwargs)), str(path))


def from_python(file: Path, name: str | None = None) -> ModelSource:
    """Build the model that a Python file defines (the contract is in this module's docstring). Raises `ModelError`."""
    if not _is(file, Path.is_file):
        what = "is a directory" if _is(file, Path.is_dir) else "does not exist"
        raise ModelError(f"the file {str(file)!r} {what}", hint="give the path of a Python file that defines `build()`")
    file = file.resolve()
    known = set(sys.modules)
    with importable(file.parent):
        module = import_file(file)
        model, builder, inputs = model_and_inputs(module, name, file, file.parent)
    imported = [getattr(sys.modules[m], "__file__", None) for m in sorted(set(sys.modules) - known)]
    neighbours = tuple(Path(f) for f in imported if f and Path(f).parent == file.parent and Path(f) != file)
    spec = f"{file}:{name}" if name else str(file)
    return ModelSource(model, inputs, spec, code=file, builder=builder, neighbours=neighbours)


def _from_module(dotted: str, name: str) -> ModelSource:
    """The model of an importable module; as with `python -m`, the working directory is on `sys.path`."""
    with importable(Path.cwd()):
        try:
            module = importlib.import_module(dotted)
        except (Exception, SystemExit) as error:
            raise user_error(f"the module {dotted!r} cannot be imported", error, location(dotted), dotted) from error
        file = Path(module.__file__ or dotted)
        model, builder, inputs = model_and_inputs(module, name, file, file.parent)
    return ModelSource(model, inputs, f"{dotted}:{name}", builder=f"{dotted}:{builder}")
