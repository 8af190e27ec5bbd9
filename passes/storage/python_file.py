"""The user's own Python: a file or module that builds a model, imported and run; their mistakes come back as their traceback.

Flow: a file is imported under a private name, its neighbours importable → the builder and the inputs are called → what they
raise becomes one error with the user's frames, and nobody else's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from memrewrite.errors import ModelError
from memrewrite.passes.models.forward import Inputs, as_inputs

CONTRACT = "define `build()`, returning an nn.Module, and `inputs()`, returning a tuple, a dict or (args, kwargs)"


def build_from_file(file: Path, builder: str) -> nn.Module:
    """The model that `builder` of a Python file makes; its inputs are not asked for."""
    file = file.resolve()
    with importable(file.parent):
        model, _ = _model_of(import_file(file), builder, file, file.parent)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{builder!r} makes an exported program, not an nn.Module", where=str(file), hint=CONTRACT)
    return model


def import_file(file: Path) -> ModuleType:
    """Run a Python file as a module with a private name, made from its path; its neighbours can be imported by it."""
    private = "_memrewrite_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(private, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(file)!r} is no Python file", hint=CONTRACT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # stays there: torch and pickle look classes up by their module
    with importable(file.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[private]
            raise blame(f"{file.name!r} cannot be imported", error, file.resolve().parent, file) from error
    return module


def model_and_inputs(
    module: ModuleType, name: str | None, file: Path, root: Path
) -> tuple[nn.Module | ExportedProgram, str, Inputs]:
    """The model, the name that made it, and the inputs. Inputs come first: they fail faster than a large model."""
    builder = name or next((n for n in ("build", "model") if hasattr(module, n)), None)
    if builder is None or not hasattr(module, builder):
        wanted = f"no {name!r}" if name else "neither `build` nor `model`"
        others = [n for n, value in vars(module).items() if _could_build(value, module)]
        hint = f"it defines {', '.join(others)}: name one, {file.name}:{others[0]}" if others else CONTRACT
        raise ModelError(f"{file.name!r} defines {wanted}", where=str(file), hint=hint)
    inputs = inputs_of(module, input_names(name), file, root)
    return *_model_of(module, builder, file, root), inputs


def _model_of(module: ModuleType, builder: str, file: Path, root: Path) -> tuple[nn.Module | ExportedProgram, str]:
    if not hasattr(module, builder):
        raise ModelError(f"{file.name!r} defines no {builder!r}", where=str(file), hint=CONTRACT)
    value = getattr(module, builder)
    called = not isinstance(value, (nn.Module, ExportedProgram)) and callable(value)
    model = _called(value, builder, file, root) if called else value
    if not isinstance(model, (nn.Module, ExportedProgram)):
        said = f"{builder}() returned" if called else f"{builder!r} is"
        raise ModelError(f"{said} {_kind(model)}, not an nn.Module", where=str(file), hint=CONTRACT)
    return model, builder


def input_names(builder: str | None) -> tuple[str, ...]:
    """Where the inputs of a builder may stand, first choice first."""
    return (f"{builder}_inputs", "inputs") if builder else ("inputs",)


def inputs_of(module: ModuleType, names: tuple[str, ...], file: Path, root: Path) -> Inputs:
    """The example inputs a module defines. Raises `ModelError` when it defines none, or none of a usable kind."""
    name = next((n for n in names if hasattr(module, n)), None)
    if name is None:
        raise ModelError(f"{file.name!r} defines no example inputs", where=str(file), hint=CONTRACT)
    value = getattr(module, name)
    value = _called(value, name, file, root) if callable(value) else value
    try:
        return as_inputs(value)
    except ModelError as error:
        raise ModelError(f"`{name}`: {error.what}", where=str(file), hint=error.hint) from None


def _called(function: Any, name: str, file: Path, root: Path) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise blame(f"{name}() of {file.name!r} failed", error, root, file) from error


def _could_build(value: Any, module: ModuleType) -> bool:
    return isinstance(value, nn.Module) or (callable(value) and getattr(value, "__module__", "") == module.__name__)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def importable(directory: Path) -> Iterator[None]:
    """What lies in `directory` can be imported; no `__pycache__` is left, and the path is as it was afterwards."""
    path, silent = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(directory))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, silent


def blame(what: str, error: BaseException, root: Path, at: object) -> ModelError:
    """An error in the user's code: their frames of the traceback, and nobody else's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _users(frame.filename, root)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    lines = traceback.format_list(frames) if frames else []
    lines += traceback.format_exception_only(type(error), error)
    shown = "".join(lines).rstrip()
    hint = "mend the code shown above"
    if isinstance(error, ModuleNotFoundError):
        hint = f"install {error.name!r} in this environment, or put it beside the file"
    return ModelError(f"{what}: {brief(error)}", where=f"{where or at}\n{shown}", hint=hint)


def _users(filename: str, root: Path) -> bool:
    """Whether a frame is of the user's code: not Python's, not a library's, not ours."""
    if filename.startswith("<"):
        return False
    path, paths = Path(filename).resolve(), sysconfig.get_paths()
    libraries = [Path(paths[name]).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    ours = Path(__file__).resolve().parent
    if any(root.is_relative_to(library) for library in libraries):  # the user's own package, installed
        return path.is_relative_to(root)
    return path.parent != ours and not any(path.is_relative_to(library) for library in libraries)


def location(dotted: str) -> Path:
    """The directory of the outermost package of a module that may not be importable; else the working directory."""
    spec = importlib.util.find_spec(dotted.partition(".")[0])
    return Path(spec.origin).resolve().parent if spec and spec.origin else Path.cwd()


def brief(error: BaseException) -> str:
    """An error's kind and first line."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
