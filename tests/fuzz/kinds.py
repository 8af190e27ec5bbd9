"""The kinds of files, each with the seeds, the mutation and the calls that read it: those that commands make.

Cases of a saved directory get a manifest with the sizes and hashes of the changed files: the readers behind it must be reached.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from . import seeds
from .hostile import MODULE, Hostile, evil
from .mutate_bytes import change_bytes, change_npz, change_safetensors
from .mutate_json import change_json, change_yaml

Change = Callable[[Random, bytes, bytes, Hostile], bytes]
Target = Callable[[Path, Path], object]  # the case's directory, and the changed file in it
MANIFEST = "memrewrite.json"


def change_onnx(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """See `mutate_onnx`, which needs a package that the other kinds do not."""
    from .mutate_onnx import change_onnx as change

    return change(rng, data, other, words)


@dataclass(frozen=True)
class Kind:
    """A kind of file: `targets` are tried in turn, at random; `group` makes the seeds, of which `pattern` selects files."""

    name: str
    group: str
    pattern: str
    change: Change
    targets: tuple[Target, ...]
    hashed: bool = False  # its directory has a manifest, to be written again
    unread: bool = False  # no byte of the file may be read
    seeds: Callable[[Path], None] | None = field(default=None)

    def prepare(self, folder: Path) -> None:
        """Write the seeds."""
        (self.seeds or seeds.GROUPS[self.group])(folder)

    def files(self, folder: Path) -> list[Path]:
        """The files among the seeds that are changed."""
        return sorted(folder.glob(self.pattern))

    def finish(self, case: Path, file: Path, rng: Random, decoy: Path) -> None:
        """Add code that must not run, and write the manifest again."""
        (case / f"{MODULE}.py").write_text(evil(decoy))
        if self.hashed:
            rehash(case, listed=rng.random() < 0.8)


def rehash(case: Path, *, listed: bool) -> None:
    """Write sizes and hashes of all files into the manifest; `listed`: add the files that it does not name."""
    manifest = case / MANIFEST
    try:
        data = json.loads(manifest.read_bytes())
        files = data["files"]
        for file in case.iterdir():
            if file.name != MANIFEST and file.is_file() and (listed or file.name in files):
                content = file.read_bytes()
                files[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(data))
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):  # the manifest itself is the changed file
        return


# --------------------------------------------------------------------------------------------------------------- targets


def _forward(model: Any, inputs: Any) -> None:
    """A forward. What the base's own code raises passes: a graph may return to it what the file says, such as a number.

    So does what an operator of torch raises that a saved graph calls: its arguments have the right types, and wrong values.
    """
    import torch

    from memrewrite.errors import ModelError

    args, kwargs = inputs
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        ours = [name for name in names if name.startswith("memrewrite.")]
        by_an_operator = ours[-1:] == ["memrewrite.passes.rewrite.graph_host"] != names[-1:]
        if isinstance(error, MemoryError) or (ours and not by_an_operator):
            raise
        raise ModelError("the code of the base, or an operator of the saved graph, does not run") from error


def _own_forward(model: Any, inputs: Any) -> None:
    """A forward of the architecture that a config describes: with odd numbers in the config it may raise what it likes."""
    from memrewrite.errors import ModelError

    try:
        _forward(model, inputs)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError("the model does not run") from error


def load_config(case: Path, file: Path) -> None:
    """`memrewrite.load` of a directory whose config was changed, and a first forward."""
    import tiny

    import memrewrite

    _own_forward(memrewrite.load(case), ((tiny.tokens(),), {}))


def load_saved(case: Path, file: Path) -> None:
    """`memrewrite.load`, and a first forward."""
    import tiny

    import memrewrite

    model = memrewrite.load(case)
    _forward(model, ((tiny.tokens(),), {}))


def load_into_base(case: Path, file: Path) -> None:
    """`memrewrite.load` into a base that the user gives, and a first forward."""
    import copy

    import tiny

    import memrewrite

    model = memrewrite.load(case, copy.deepcopy(seeds.bare_base()))
    _forward(model, ((tiny.tokens(),), {}))


def command_source(case: Path, file: Path) -> None:
    """What `inspect`, `export` and `check` do first: load MODEL and make example inputs; then a forward."""
    from memrewrite.passes.storage.source import load_source

    source = load_source(str(case))
    _own_forward(source.model, source.inputs)


def command_verify(case: Path, file: Path) -> None:
    """`memrewrite verify DIR`."""
    from memrewrite.passes.verify_saved import verify_saved

    verify_saved(case)


def command_inspect(case: Path, file: Path) -> None:
    """`memrewrite inspect DIR`."""
    import memrewrite
    from memrewrite.passes.storage.source import load_source

    source = load_source(str(case))
    memrewrite.inspect(source.model, source.inputs)


def command_export(case: Path, file: Path) -> None:
    """`memrewrite export DIR -o FILE`."""
    import memrewrite
    from memrewrite.passes.storage.source import load_source

    source = load_source(str(case))
    memrewrite.export_onnx(source.model, case / "zqy.onnx", None if source.inputs_made else source.inputs)


def read_recipe(case: Path, file: Path) -> None:
    """The recipe alone, and its text again."""
    from memrewrite.recipes.reader import read_recipe as read

    read(file).to_yaml()


def _located() -> Any:
    import tiny

    import memrewrite

    if not _LOCATED:
        model, inputs = tiny.named("modular")
        _LOCATED.append(memrewrite.inspect(model, inputs))
    return _LOCATED[0]


_LOCATED: list[Any] = []


def command_plan(case: Path, file: Path) -> None:
    """`memrewrite plan MODEL RECIPE`, with MLPs that were located before."""
    from memrewrite.passes.plan.select import select
    from memrewrite.recipes.reader import read_recipe as read

    recipe = read(file)
    select(_located(), recipe, live=True).after()


def command_apply(case: Path, file: Path) -> None:
    """`memrewrite apply MODEL RECIPE`."""
    import tiny

    import memrewrite
    from memrewrite.recipes.reader import read_recipe as read

    recipe = read(file)
    model, inputs = tiny.named("modular")
    memrewrite.apply(model, recipe, inputs)


def open_session(case: Path, file: Path) -> None:
    """`memrewrite.onnx_session`, and a run."""
    import numpy

    import memrewrite

    session = memrewrite.onnx_session(file, op="standard", options=_one_thread())
    try:
        session.run(None, {"x": numpy.zeros((2, 5, 16), "float32")})
    except Exception:  # noqa: BLE001 - the user calls onnxruntime itself: its errors are its own
        return


def _one_thread() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def command_check(case: Path, file: Path) -> None:
    """`memrewrite check FILE MODEL`."""
    import onnx_files

    from memrewrite.passes.onnx.check.check import check_onnx

    check_onnx(file, *_model_and_inputs(onnx_files), routes=["standard"])


def command_check_recorded(case: Path, file: Path) -> None:
    """`memrewrite check FILE`: the model is the one that the file names."""
    from memrewrite.passes.onnx.check.check import check_onnx

    check_onnx(file, routes=["standard"])


def command_check_inputs(case: Path, file: Path) -> None:
    """`memrewrite check FILE MODEL --inputs NPZ`."""
    import onnx_files

    from memrewrite.passes.onnx.check.check import check_onnx

    check_onnx(case / "model.onnx", *_model_and_inputs(onnx_files), real=[file], routes=["standard"])


def read_inputs(case: Path, file: Path) -> None:
    """The archive alone."""
    import torch

    from memrewrite.passes.onnx.check.given_inputs import real_inputs
    from memrewrite.passes.onnx.file import Port

    port = Port(name="x", dtype="float", shape=("batch", "sequence", 16))
    real_inputs([file], [port], {"x": torch.zeros(2, 5, 16)})


def encode_texts(case: Path, file: Path) -> None:
    """The sentences that `memrewrite check` encodes with the tokenizer of a directory."""
    from memrewrite.passes.onnx.check.given_inputs import text_inputs
    from memrewrite.passes.onnx.file import Port

    names = ("input_ids", "attention_mask")
    text_inputs(case, [Port(name=name, dtype="int64", shape=("batch", "sequence")) for name in names])


def _model_and_inputs(onnx_files: Any) -> Any:
    if not _LAYERS:
        _LAYERS.append(onnx_files.layers())
    return _LAYERS[0]


_LAYERS: list[Any] = []


def load_file(case: Path, file: Path) -> None:
    """A file as MODEL."""
    from memrewrite.passes.storage.source import load_source

    source = load_source(str(file), with_tokenizer=False)
    _own_forward(source.model, source.inputs)


# Commands that take long are tried less often.
SAVED = (load_saved,) * 16 + (command_source,) * 8 + (command_verify,) * 3 + (command_inspect,)
CONFIG = (load_config,) * 16 + SAVED[16:]
GRAPHS = (load_into_base,) * 24 + (load_saved,) * 2 + (command_verify,)
HF = (command_source,) * 30 + (command_inspect,)
ONNX = (open_session,) * 30 + (command_check, command_check_recorded)
RECIPE = (read_recipe,) * 24 + (command_plan,) * 16 + (command_apply,)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("manifest", "saved", "*/memrewrite.json", change_json, (*SAVED, command_export)),
        Kind("plan", "saved", "*/plan.json", change_json, SAVED, hashed=True),
        Kind("report", "saved", "*/report.json", change_json, (load_saved, command_verify), hashed=True),
        Kind("graphs", "graphs", "*/graphs.json", change_json, GRAPHS, hashed=True),
        Kind("graphs-plan", "graphs", "*/plan.json", change_json, GRAPHS, hashed=True),
        Kind("config", "saved", "*/config.json", change_json, CONFIG, hashed=True),
        Kind("generation-config", "saved", "*/generation_config.json", change_json, CONFIG, hashed=True),
        Kind("weights", "saved", "*/model*.safetensors", change_safetensors, SAVED, hashed=True),
        Kind("buffers", "saved", "*/buffers.safetensors", change_safetensors, SAVED, hashed=True),
        Kind("index", "saved", "*/model.safetensors.index.json", change_json, SAVED, hashed=True),
        Kind("hf-config", "pretrained", "*/config.json", change_json, HF),
        Kind("hf-generation-config", "pretrained", "*/generation_config.json", change_json, HF),
        Kind("hf-weights", "pretrained", "*/*.safetensors", change_safetensors, HF),
        Kind("hf-index", "pretrained", "shards/*.index.json", change_json, HF),
        Kind("recipe", "recipes", "*/recipe.yaml", change_yaml, RECIPE),
        Kind("onnx", "onnx", "*/model.onnx", change_onnx, ONNX),
        Kind("npz", "arrays", "*/inputs.npz", change_npz, (*(read_inputs,) * 30, command_check_inputs)),
        Kind("tokenizer", "tokenizers", "*/tokenizer.json", change_json, (encode_texts,)),
        Kind("tokenizer-config", "tokenizers", "*/tokenizer_config.json", change_json, (encode_texts,)),
        Kind("pt2", "programs", "*/model.pt2", change_bytes, (load_file, command_source), unread=True),
        Kind("gguf", "gguf", "*/model.gguf", change_bytes, (load_file,)),
    )
}
