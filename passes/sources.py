"""What MODEL may be, from the shell: a Python file or module, a Hugging Face directory, a result of ours, a program.

Flow: the spelling says which kind → its loader builds the model and the example inputs → a frozen `Source`, which also
names the files that a saved result needs to load again. Nothing is ever downloaded.

The contract of a Python file, `model.py`: it defines `build()`, which returns an `nn.Module`, or `model`, which is one;
and `inputs`, the example inputs or a function that returns them: a tuple, a dict, or a pair `(args, kwargs)`.
`model.py:tiny` takes the function or module named `tiny` instead, and `tiny_inputs` where it is defined, else `inputs`.

For a Hugging Face directory the class is the one its config names, weights come from safetensors or gguf only, and the
inputs are made from config and forward signature. No model family is known here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from memrewrite.errors import ModelError
from memrewrite.passes.bases import Base, base_of
from memrewrite.passes.recording import Inputs, as_inputs

log = logging.getLogger("memrewrite")

BATCH, SEQUENCE, DECODER_SEQUENCE, SAMPLES = 2, 16, 12, 8000  # distinct, so that no axis is taken for another
SEED = 0
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".pt2")
_CONTRACT = "define `build()`, returning an nn.Module, and `inputs()`, returning a tuple, a dict or (args, kwargs)"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Source:
    """A model with example inputs, and what a saved result needs beside the weights to be loaded again.

    `config_files`: the files of a Hugging Face directory that hold no weights; `tokenizer`: when it lies inside a gguf
    file; `code` and `builder`: the Python file, and the name in it that builds the model. `code` is `None` for a module
    that was imported by its dotted name: `builder` is then `package.module:name`. `neighbours`: files that `code`
    imports from its own directory, which are not saved with it.
    """

    model: nn.Module | ExportedProgram
    inputs: Inputs
    name: str
    config_files: tuple[Path, ...] = ()
    code: Path | None = None
    builder: str = ""
    tokenizer: Any | None = None
    neighbours: tuple[Path, ...] = ()

    @property
    def base(self) -> Base:
        """What `checkpoint.save` needs to have this model built again by `load`."""
        if self.code is not None:
            return Base("python", code=self.code, builder=self.builder)
        if not isinstance(self.model, nn.Module):
            return Base("graph")
        kind = "given" if self.builder else base_of(self.model).kind
        return Base(kind, files=self.config_files, tokenizer=self.tokenizer)


def load_source(spec: str, *, trust_code: bool = False, with_tokenizer: bool = True) -> Source:
    """Load the model that `spec` names, in one of the spellings of this module's docstring.

    `trust_code` allows running code that came with files the user did not write: the Python of a Hugging Face or saved
    directory, and the pickles in a `.pt2`. `with_tokenizer=False` leaves out the tokenizer, where only the model
    matters. Raises `ModelError` (or `CheckpointError`, for a damaged directory of ours).
    """
    path = Path(spec).expanduser()
    before, _, name = spec.rpartition(":")
    if _is(path, Path.is_dir):
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


def _is(path: Path, question: Callable[[Path], bool]) -> bool:
    try:
        return question(path)
    except (OSError, ValueError):  # a name too long, a zero byte, a directory that may not be read
        return False


def _from_directory(path: Path, trust_code: bool, with_tokenizer: bool) -> Source:
    from memrewrite.passes.checkpoint import is_saved

    if is_saved(path):
        return _from_saved(path, trust_code)
    loaded = load_pretrained(path, trust_code=trust_code, with_tokenizer=with_tokenizer)
    inputs = example_inputs(loaded.model)
    return Source(loaded.model, inputs, str(path), loaded.config_files, tokenizer=loaded.tokenizer)


def _from_file(path: Path, trust_code: bool, with_tokenizer: bool) -> Source:
    if path.suffix == ".py":
        return from_python(path)
    if path.suffix == ".pt2":
        return _from_program(path, trust_code)
    if path.suffix == ".gguf":
        loaded = load_pretrained(path.parent, gguf=path.name, trust_code=trust_code, with_tokenizer=with_tokenizer)
        return Source(loaded.model, example_inputs(loaded.model), str(path), tokenizer=loaded.tokenizer)
    raise ModelError(
        f"{str(path)!r} is no model: a .py, .gguf or .pt2 file, or a directory, was expected",
        hint="for weights, give the directory that holds them and their config.json",
    )


def _from_saved(path: Path, trust_code: bool) -> Source:
    """A result of ours: its inputs come from the Python file saved with it, its graph, or the model's own config."""
    from memrewrite.passes.checkpoint import GRAPH, load, read_manifest

    base = Base.from_data(read_manifest(path)["base"])
    if base.kind == "graph":
        return _from_program(path / GRAPH, trust_code)
    model = load(path, trust_code=trust_code)
    if base.code is None:
        return Source(model, example_inputs(model), str(path))
    code = path / base.code.name
    with _importable(code.parent):
        inputs = _inputs_of(import_file(code), _input_names(base.builder), code, code.parent)
    return Source(model, inputs, str(path), code=code, builder=base.builder)


def _from_program(path: Path, trust_code: bool) -> Source:
    if not trust_code:
        raise ModelError(
            f"{path.name!r} may hold pickles, which run code when they are loaded",
            where=str(path),
            hint="if you trust the file, add --trust-code",
        )

    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a damaged archive
        what, hint = f"the exported program cannot be read: {_brief(error)}", "save it again with torch.export.save"
        raise ModelError(what, where=str(path), hint=hint) from error
    if program.example_inputs is None:
        hint = "export it again; keep `example_inputs`"
        raise ModelError("the exported program carries no example inputs", where=str(path), hint=hint)
    args, kwargs = program.example_inputs
    return Source(program, (tuple(args), dict(kwargs)), str(path))


# ------------------------------------------------------------------------------------------- a user's Python file


def from_python(file: Path, name: str | None = None) -> Source:
    """Build the model that a Python file defines (see this module's docstring for the contract)."""
    if not _is(file, Path.is_file):
        what = "is a directory" if _is(file, Path.is_dir) else "does not exist"
        raise ModelError(f"the file {str(file)!r} {what}", hint="give the path of a Python file that defines `build()`")
    file = file.resolve()
    known = set(sys.modules)
    with _importable(file.parent):
        module = import_file(file)
        model, builder, inputs = _use(module, name, file, file.parent)
    imported = [getattr(sys.modules[m], "__file__", None) for m in sorted(set(sys.modules) - known)]
    beside = tuple(Path(f) for f in imported if f and Path(f).parent == file.parent and Path(f) != file)
    shown = f"{file}:{name}" if name else str(file)
    return Source(model, inputs, shown, code=file, builder=builder, neighbours=beside)


def build_from_file(file: Path, builder: str) -> nn.Module:
    """The model that `builder` of a Python file makes; its inputs are not asked for."""
    file = file.resolve()
    with _importable(file.parent):
        model, _ = _model_of(import_file(file), builder, file, file.parent)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{builder!r} makes an exported program, not an nn.Module", where=str(file), hint=_CONTRACT)
    return model


def _from_module(dotted: str, name: str) -> Source:
    """Like `python -m`: the working directory is on the path."""
    with _importable(Path.cwd()):
        try:
            module = importlib.import_module(dotted)
        except (Exception, SystemExit) as error:
            raise _blame(f"the module {dotted!r} cannot be imported", error, _location(dotted), dotted) from error
        file = Path(module.__file__ or dotted)
        model, builder, inputs = _use(module, name, file, file.parent)
    return Source(model, inputs, f"{dotted}:{name}", builder=f"{dotted}:{builder}")


def import_file(file: Path) -> ModuleType:
    """Run a Python file as a module with a private name, made from its path; its neighbours can be imported by it."""
    private = "_memrewrite_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(private, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(file)!r} is no Python file", hint=_CONTRACT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # stays there: torch and pickle look classes up by their module
    with _importable(file.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[private]
            raise _blame(f"{file.name!r} cannot be imported", error, file.resolve().parent, file) from error
    return module


def _use(module: ModuleType, name: str | None, file: Path, root: Path) -> tuple[nn.Module | ExportedProgram, str, Inputs]:
    """The model, the name that made it, and the inputs. Inputs come first: they fail faster than a large model."""
    builder = name or next((n for n in ("build", "model") if hasattr(module, n)), None)
    if builder is None or not hasattr(module, builder):
        wanted = f"no {name!r}" if name else "neither `build` nor `model`"
        others = [n for n, value in vars(module).items() if _could_build(value, module)]
        hint = f"it defines {', '.join(others)}: name one, {file.name}:{others[0]}" if others else _CONTRACT
        raise ModelError(f"{file.name!r} defines {wanted}", where=str(file), hint=hint)
    inputs = _inputs_of(module, _input_names(name), file, root)
    return *_model_of(module, builder, file, root), inputs


def _model_of(module: ModuleType, builder: str, file: Path, root: Path) -> tuple[nn.Module | ExportedProgram, str]:
    if not hasattr(module, builder):
        raise ModelError(f"{file.name!r} defines no {builder!r}", where=str(file), hint=_CONTRACT)
    value = getattr(module, builder)
    called = not isinstance(value, (nn.Module, ExportedProgram)) and callable(value)
    model = _called(value, builder, file, root) if called else value
    if not isinstance(model, (nn.Module, ExportedProgram)):
        said = f"{builder}() returned" if called else f"{builder!r} is"
        raise ModelError(f"{said} {_kind(model)}, not an nn.Module", where=str(file), hint=_CONTRACT)
    return model, builder


def _input_names(builder: str | None) -> tuple[str, ...]:
    return (f"{builder}_inputs", "inputs") if builder else ("inputs",)


def _inputs_of(module: ModuleType, names: tuple[str, ...], file: Path, root: Path) -> Inputs:
    name = next((n for n in names if hasattr(module, n)), None)
    if name is None:
        raise ModelError(f"{file.name!r} defines no example inputs", where=str(file), hint=_CONTRACT)
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
        raise _blame(f"{name}() of {file.name!r} failed", error, root, file) from error


def _could_build(value: Any, module: ModuleType) -> bool:
    return isinstance(value, nn.Module) or (callable(value) and getattr(value, "__module__", "") == module.__name__)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """What lies in `directory` can be imported; no `__pycache__` is left, and the path is as it was afterwards."""
    path, silent = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(directory))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, silent


# --------------------------------------------------------------------------------------------- a user's traceback


def _blame(what: str, error: BaseException, root: Path, at: object) -> ModelError:
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
    return ModelError(f"{what}: {_brief(error)}", where=f"{where or at}\n{shown}", hint=hint)


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


def _location(dotted: str) -> Path:
    """The directory of the outermost package of a module that may not be importable; else the working directory."""
    spec = importlib.util.find_spec(dotted.partition(".")[0])
    return Path(spec.origin).resolve().parent if spec and spec.origin else Path.cwd()


def _brief(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


# ------------------------------------------------------------------------------------- a Hugging Face directory


@dataclass(frozen=True)
class Pretrained:
    """A loaded model, the files beside its weights, and the tokenizer where it came out of a gguf file."""

    model: nn.Module
    config_files: tuple[Path, ...]
    tokenizer: Any | None


def load_pretrained(
    directory: Path, *, gguf: str | None = None, trust_code: bool = False, with_tokenizer: bool = True
) -> Pretrained:
    """Load a directory with config.json and safetensors, or with a gguf file. Raises `ModelError`."""
    gguf = gguf or _judge(directory)
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
        except Exception as error:  # transformers raises many kinds; torch and safetensors add theirs
            raise ModelError(
                f"transformers cannot load this model: {type(error).__name__}: {_first_line(error)}",
                where=where,
                hint="the files may be truncated or of another version: copy or download them again",
            ) from error
    if missing := sorted(info["missing_keys"]):
        log.warning("%d tensors are not in the files and start random: %s", len(missing), ", ".join(missing[:5]))
    return Pretrained(model, () if gguf else _config_files(directory), tokenizer)


def _judge(directory: Path) -> str | None:
    """The gguf file to load, or `None` for safetensors; everything else is refused with the way out."""
    where = str(directory)
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    ggufs = [n for n in names if n.endswith(".gguf")]
    tensors = [n for n in names if n.endswith(".safetensors")]
    if "config.json" in names and tensors:
        _refuse_missing_shards(directory, names)
        return None
    if len(ggufs) > 1:
        hint = f"name one: {directory / ggufs[0]}"
        raise ModelError(f"the directory holds {len(ggufs)} gguf files", where=where, hint=hint)
    if ggufs:
        return ggufs[0]
    if "config.json" not in names:
        holds = "is empty" if not names else "has no config.json"
        hint = "give a Hugging Face directory (config.json and safetensors), a gguf file, or a model.py"
        raise ModelError(f"the directory {holds}: it is no saved model", where=where, hint=hint)
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
    brought = config.get("auto_map") or {}
    if brought and not trust_code:
        hint = "read the Python files in the directory; if you trust them, add --trust-code"
        raise ModelError(f"the model's class {name!r} is Python code in the directory", where=str(directory), hint=hint)
    for auto, target in brought.items():
        if auto.startswith("AutoModel") and str(target).rpartition(".")[2] == name:
            return getattr(transformers, auto)
    if name:
        log.warning("transformers has no class %r: the model is loaded without its head", name)
    return transformers.AutoModel


def _config_files(directory: Path) -> tuple[Path, ...]:
    """Everything beside the weights: configs, tokenizer, chat template, licence; no Python."""
    kept = []
    for file in sorted(directory.iterdir()):
        weights = file.name.endswith((*WEIGHTS, ".index.json"))
        if file.is_file() and not weights and file.suffix != ".py" and not file.name.startswith("."):
            kept.append(file)
    return tuple(kept)


def _transformers(gguf: str | None) -> Any:
    for name in ("transformers", *(("gguf",) if gguf else ())):
        if importlib.util.find_spec(name) is None:
            hint = "pip install 'memrewrite[hf]'"
            raise ModelError(f"the package {name!r} is needed to load this model, and is not installed", hint=hint)
    import transformers

    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no tables of transformers' own; what matters of them is logged here."""
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
        hint = "copy or download the file again"
        raise ModelError(f"{file.name!r} cannot be read: {_first_line(error)}", where=str(file), hint=hint) from error
    if not isinstance(data, dict):
        raise ModelError(f"{file.name!r} holds no JSON object", where=str(file), hint="copy or download the file again")
    return data


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------------------------------------- example inputs


def example_inputs(model: Any) -> Inputs:
    """Random inputs of distinct sizes for a Hugging Face model, from its config and forward signature alone."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        hint = "write a model.py with `build()` and `inputs()`"
        raise ModelError(f"no example inputs can be made for a {type(model).__name__}", hint=hint)
    accepted = inspect.signature(model.forward).parameters
    make = _Maker(model, config)
    inputs: dict[str, Any] = {main: make.tensor(main)}
    both = hasattr(config, "vision_config") and not make.special_names("image_token")
    if both and "pixel_values" in accepted:  # two towers, neither of which runs alone
        inputs["pixel_values"] = make.tensor("pixel_values")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = make.ids(DECODER_SEQUENCE, decoder=True)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return (), inputs


class _Maker:
    """Makes one tensor at a time, from one seed."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        self.configs = [config, *(part for part in parts if part is not None)]
        self.random = torch.Generator().manual_seed(SEED)

    def tensor(self, name: str) -> Tensor:
        """An input by the name its forward gives it."""
        if name == "input_ids":
            return self.ids(SEQUENCE)
        if name == "pixel_values":
            size = self._number("image_size", 32)
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            return self._floats(BATCH, int(self._number("num_channels", 3)), int(height), int(width))
        bins = self._number("num_mel_bins", None)
        if name == "input_features" and bins:  # two spectrogram frames become one position
            return self._floats(BATCH, int(bins), 2 * int(self._number("max_source_positions", 1500)))
        if name == "input_values" and bins:
            return self._floats(BATCH, int(self._number("max_length", 1024)), int(bins))
        if name == "input_values":
            return self._floats(BATCH, SAMPLES)
        raise ModelError(
            f"no example can be made for the input {name!r} of {type(self.model).__name__}",
            hint="write a model.py with `build()` and `inputs()`",
        )

    def ids(self, length: int, *, decoder: bool = False) -> Tensor:
        """Random token ids; those with a meaning of their own (padding, images) are left out."""
        text = self.config.get_text_config(decoder=decoder or None)
        vocabulary = int(getattr(text, "vocab_size", None) or self._number("vocab_size", 2))
        length = min(length, int(getattr(text, "max_position_embeddings", None) or length))
        special = [i for i in self.special_names("").values() if i < vocabulary]
        allowed = torch.ones(vocabulary, dtype=torch.bool)
        allowed[special] = False
        usable = allowed.nonzero().flatten() if allowed.any() else torch.arange(vocabulary)
        return usable[torch.randint(len(usable), (BATCH, length), generator=self.random)]

    def special_names(self, start: str) -> dict[str, int]:
        """The configs' special tokens whose name begins with `start`."""
        everything = {name: value for config in self.configs for name, value in vars(config).items()}
        named = {n: v for n, v in everything.items() if n.endswith(("_token_id", "_token_index"))}
        return {n: v for n, v in named.items() if n.startswith(start) and isinstance(v, int) and v >= 0}

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.model.dtype)

    def _number(self, name: str, default: Any) -> Any:
        return next((value for c in self.configs if (value := getattr(c, name, None)) is not None), default)
