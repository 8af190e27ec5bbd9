"""Imports and runs the user's Python code that builds a model; an error in it is reported with the user's own traceback.

Code that is found in a directory or an archive must be trusted: `require_trust`.

Flow: a file is imported under a private name; it can import modules from its own directory → its builder and its inputs are
called → an exception becomes one `ModelError` with the frames of the user's code only.
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

from memrewrite.errors import CheckpointError, ModelError, UserError, in_one_line
from memrewrite.passes.models.forward import Inputs, as_inputs

CONTRACT = "define `build()`, returning an nn.Module, and `inputs()`, returning a tuple, a dict or (args, kwargs)"


def require_trust(
    trust_code: bool, what: str, *, where: object, otherwise: str = "", kind: type[UserError] = CheckpointError
) -> None:
    """Raise `kind` unless `trust_code`: the one decision whether code or pickles that come with a model may run.

    Args:
        trust_code: the user's answer.
        what: what would run.
        where: the file.
        otherwise: what can be done instead of trusting it.
        kind: class of the error.
    """
    if not trust_code:
        hint = "read it; if you trust it, allow it: --trust-code, load(..., trust_code=True)"
        raise kind(what, where=str(where), hint=f"{hint}; {otherwise}" if otherwise else hint)


def build_from_file(file: Path, builder: str) -> nn.Module:
    """The module that `builder` of a Python file returns or is. Raises `ModelError`."""
    file = file.resolve()
    with importable(file.parent):
        model, _ = _model_of(import_file(file), builder, file, file.parent)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{builder!r} is an exported program, not an nn.Module", where=str(file), hint=CONTRACT)
    return model


def import_file(file: Path) -> ModuleType:
    """Run a Python file as a module whose private name is a hash of its path; it can import from its own directory.

    Raises `ModelError` when the file is no Python file, or raises an exception.
    """
    private = "_memrewrite_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(private, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(file)!r} is no Python file", hint=CONTRACT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # not removed: torch and pickle look classes up by their module
    with importable(file.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[private]
            raise user_error(f"{file.name!r} cannot be imported", error, file.resolve().parent, file) from error
    return module


def model_and_inputs(
    module: ModuleType, name: str | None, file: Path, root: Path
) -> tuple[nn.Module | ExportedProgram, str, Inputs]:
    """The model, the name of its builder, and the inputs, which are built first: they fail faster than a large model."""
    builder = name or next((n for n in ("build", "model") if hasattr(module, n)), None)
    if builder is None or not hasattr(module, builder):
        missing = f"no {name!r}" if name else "neither `build` nor `model`"
        others = [n for n, value in vars(module).items() if _could_build(value, module)]
        hint = f"it defines {', '.join(others)}: name one, {file.name}:{others[0]}" if others else CONTRACT
        raise ModelError(f"{file.name!r} defines {missing}", where=str(file), hint=hint)
    inputs = defined_inputs(module, input_names(name), file, root)
    return *_model_of(module, builder, file, root), inputs


def _model_of(module: ModuleType, builder: str, file: Path, root: Path) -> tuple[nn.Module | ExportedProgram, str]:
    if not hasattr(module, builder):
        raise ModelError(f"{file.name!r} defines no {builder!r}", where=str(file), hint=CONTRACT)
    value = getattr(module, builder)
    called = not isinstance(value, (nn.Module, ExportedProgram)) and callable(value)
    model = _called(value, builder, file, root) if called else value
    if not isinstance(model, (nn.Module, ExportedProgram)):
        subject = f"{builder}() returned" if called else f"{builder!r} is"
        raise ModelError(f"{subject} {_kind(model)}, not an nn.Module", where=str(file), hint=CONTRACT)
    return model, builder


def input_names(builder: str | None) -> tuple[str, ...]:
    """The names that the inputs of a builder may have, first choice first."""
    return (f"{builder}_inputs", "inputs") if builder else ("inputs",)


def defined_inputs(module: ModuleType, names: tuple[str, ...], file: Path, root: Path) -> Inputs:
    """The example inputs that a module defines. Raises `ModelError` when it defines none, or of a type that is no input."""
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
        raise user_error(f"{name}() of {file.name!r} failed", error, root, file) from error


def _could_build(value: Any, module: ModuleType) -> bool:
    return isinstance(value, nn.Module) or (callable(value) and getattr(value, "__module__", "") == module.__name__)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Context manager: modules in `directory` can be imported inside, without a `__pycache__`; restores `sys.path` on exit."""
    path, without_bytecode = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(directory))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, without_bytecode


def user_error(what: str, error: BaseException, root: Path, at: object) -> ModelError:
    """The `ModelError` for an exception in the user's code, with the frames of the traceback that are user code.

    `root` is the directory of the user's code; `at` is the place to report when the traceback has no frame of it.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename, root)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    lines = traceback.format_list(frames) if frames else []
    lines += traceback.format_exception_only(type(error), error)
    shown = "".join(lines).rstrip()
    hint = "correct the code shown above"
    if isinstance(error, ModuleNotFoundError):
        hint = f"install {error.name!r} in this environment, or put it in the directory of the file"
    return ModelError(f"{what}: {in_one_line(error)}", where=f"{where or at}\n{shown}", hint=hint)


def _is_users(filename: str, root: Path) -> bool:
    """True if a frame is in the user's code: not in Python's, a library's or memrewrite's."""
    if filename.startswith("<"):
        return False
    path, libraries = Path(filename).resolve(), _library_folders()
    if any(root.is_relative_to(library) for library in libraries):  # the user's own package, installed
        return path.is_relative_to(root)
    return not any(path.is_relative_to(folder) for folder in (*libraries, *_own_folders()))


def _library_folders() -> list[Path]:
    """Python's own folders, and every folder of installed packages on `sys.path`: those of a user or of a `.pth` file too."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    folders += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [Path(folder).resolve() for folder in folders]


def _own_folders() -> list[Path]:
    """The folders of the loaded packages of memrewrite: an editable install has them in several places."""
    name = __name__.partition(".")[0]
    packages = [module for path, module in list(sys.modules.items()) if path.partition(".")[0] == name]
    return [Path(folder).resolve() for package in packages for folder in getattr(package, "__path__", ())]


def location(dotted: str) -> Path:
    """The directory of the outermost package of a module, which itself may not be importable; else the working directory."""
    spec = importlib.util.find_spec(dotted.partition(".")[0])
    return Path(spec.origin).resolve().parent if spec and spec.origin else Path.cwd()
