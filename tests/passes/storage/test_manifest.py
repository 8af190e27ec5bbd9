"""Files of a saved directory are read through its manifest only; what it says must be consistent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_dirs
import tiny

import memrewrite
from memrewrite.errors import CheckpointError
from memrewrite.passes.storage import manifest
from memrewrite.passes.storage.manifest import Manifest, SavedFiles, read_manifest
from memrewrite.passes.storage.source import load_source
from memrewrite.passes.verify_saved import verify_saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return memrewrite.save(tiny.rewritten("llama")[0], tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def edited(out: Path, change: Callable[[Any], object]) -> str:
    saved_dirs.edit_json(out / manifest.MANIFEST, change)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(out)
    return caught.value.what


def test_a_file_that_is_not_listed_is_refused_by_name(out: Path) -> None:
    for name in ("plan.json", "config.json", "report.json", "recipe.yaml"):
        saved_dirs.edit_json(out / manifest.MANIFEST, lambda m, name=name: m["files"].pop(name, None))
        files = read_manifest(out)
        for read in (files.content, files.text, files.json, files.path):
            with pytest.raises(CheckpointError, match=f"does not list '{name}'"):
                read(name)
    with pytest.raises(CheckpointError, match=r"does not list 'plan\.json'"):
        memrewrite.load(out)


@pytest.mark.parametrize("name", ["plan.json", "config.json", "generation_config.json", "buffers.safetensors", "graphs.json"])
def test_a_file_that_is_added_is_not_used(name: str, out: Path) -> None:
    saved_dirs.edit_json(out / manifest.MANIFEST, lambda m: m["files"].pop(name, None))
    (out / name).write_text("{}")
    if name in ("generation_config.json", "graphs.json"):  # files that not every model has: as if they were not there
        memrewrite.load(out)
    else:
        with pytest.raises(CheckpointError, match=name):
            memrewrite.load(out)


def test_text_is_parsed_from_the_bytes_that_were_hashed(out: Path) -> None:
    files = read_manifest(out)
    (out / "plan.json").write_bytes((out / "plan.json").read_bytes().replace(b"memory_plus", b"memory-plus"))
    with pytest.raises(CheckpointError, match=r"plan\.json: its content was changed"):
        files.json("plan.json")


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "a\0b", "memrewrite.json", "x" * 300])
def test_names_of_files(name: str, out: Path) -> None:
    assert "no name of a saved file" in edited(out, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))


BASES = [
    {"kind": "huggingface", "code": "model.py", "builder": "build"},
    {"kind": "given", "code": "model.py", "builder": "build"},
    {"kind": "graph", "code": "model.py", "builder": "build"},
    {"kind": "huggingface", "code": "", "builder": "build"},
    {"kind": "python", "code": "", "builder": ""},
    {"kind": "python", "code": "model.py", "builder": ""},
    {"kind": "python", "code": "", "builder": "build"},
    {"kind": "python", "code": "model.py", "builder": "os.system"},
    {"kind": "python", "code": "model.py", "builder": "__import__"},
    {"kind": "python", "code": "../model.py", "builder": "build"},
    {"kind": "python", "code": "config.json", "builder": "build"},
    {"kind": "python", "code": "missing.py", "builder": "build"},
]


@pytest.mark.parametrize("base", BASES)
def test_kind_code_and_builder_agree_and_nothing_runs(base: dict[str, str], out: Path) -> None:
    for name in ("model.py", "config.py"):
        saved_dirs.add_file(out, name, b"raise SystemExit('it ran')")
    saved_dirs.edit_json(out / manifest.MANIFEST, lambda m: m.update(base=base))
    for run in (
        read_manifest,
        memrewrite.load,
        lambda d: load_source(str(d)),
        verify_saved,
        lambda d: load_source(str(d), trust_code=True),
    ):
        with pytest.raises(CheckpointError, match="not a manifest"):
            run(out)


def test_saved_code_is_hashed_and_runs_only_when_it_is_trusted(out: Path) -> None:
    saved_dirs.add_file(out, "model.py", b"raise SystemExit('it ran')")
    saved_dirs.edit_json(out / manifest.MANIFEST, lambda m: m.update(base=BASES[0] | {"kind": "python"}))
    for run in (memrewrite.load, lambda d: load_source(str(d)), verify_saved):
        with pytest.raises(CheckpointError, match="was not run") as caught:
            run(out)
        assert "--trust-code" in str(caught.value.hint)
    (out / "model.py").write_bytes(b"raise SystemExit('I ran!')")
    with pytest.raises(CheckpointError, match="changed"):
        memrewrite.load(out, trust_code=True)


TIES = {
    "a chain": ({"lm_head.weight": "x", "x": "y"}, "tied itself"),
    "a circle": ({"lm_head.weight": "x", "x": "lm_head.weight"}, "tied itself"),
    "itself": ({"lm_head.weight": "lm_head.weight"}, "tied itself"),
    "other shapes": ({"model.layers.0.self_attn.k_proj.weight": "lm_head.weight"}, "values of its own"),
    "a name with values": ({"lm_head.weight": "model.embed_tokens.weight"}, "values of its own"),
}


@pytest.mark.parametrize("tie", TIES)
def test_ties_that_lose_values(tie: str, out: Path) -> None:
    tied, message = TIES[tie]
    saved_dirs.edit_json(out / manifest.MANIFEST, lambda m: m.update(tied=tied))
    with pytest.raises(CheckpointError, match=message):
        memrewrite.load(out)


def test_ties_of_other_shapes(out: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, out / "model.safetensors")
    saved_dirs.correct_manifest(out)
    tied = {"model.layers.0.self_attn.k_proj.weight": "model.layers.0.self_attn.q_proj.weight"}
    saved_dirs.edit_json(out / manifest.MANIFEST, lambda m: m.update(tied=tied))
    with pytest.raises(CheckpointError, match=r"\(8, 16\) torch.float32 and \(16, 16\)"):
        memrewrite.load(out)


SPECIAL: dict[str, Callable[[Path, Path], object]] = {
    "a link to another directory": lambda file, elsewhere: file.symlink_to(elsewhere),
    "a dangling link": lambda file, elsewhere: file.symlink_to(elsewhere.with_name("nothing")),
    "a link to itself": lambda file, elsewhere: file.symlink_to(file),
    "a FIFO": lambda file, elsewhere: os.mkfifo(file),
    "a directory": lambda file, elsewhere: file.mkdir(),
}


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "config.json", "memrewrite.json"])
@pytest.mark.parametrize("what", SPECIAL)
def test_links_out_of_the_directory_and_special_files(what: str, name: str, out: Path) -> None:
    elsewhere = out.with_name("elsewhere")
    shutil.move(out / name, elsewhere)
    SPECIAL[what](out / name, elsewhere)
    with pytest.raises(CheckpointError, match=f"{name}|memrewrite saved"):
        memrewrite.load(out)


def test_the_directory_itself_may_be_a_link(out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to(out)
    memrewrite.load(link)


def test_old_manifests_list_every_file_of_their_directory() -> None:
    folders = [path.parent for path in (Path(__file__).parents[2] / "whole" / "saved").glob("*/memrewrite.json")]
    assert len(folders) == 10
    for folder in folders:
        files = read_manifest(folder, every_bit=True)
        assert {*files.names(), manifest.MANIFEST} == {file.name for file in folder.iterdir()}


def test_only_a_manifest_of_this_shape(out: Path) -> None:
    assert isinstance(read_manifest(out), SavedFiles)
    for change in (
        lambda m: m["files"]["plan.json"].update(bytes=-1),
        lambda m: m["files"]["plan.json"].update(bytes="12"),
        lambda m: m["files"]["plan.json"].update(sha256="0"),
        lambda m: m.update(memrewrite=True),
        lambda m: m.update(memrewrite="1"),
        lambda m: m.update(more=1),
        lambda m: m.update(tied={"a": 1}),
    ):
        before = (out / manifest.MANIFEST).read_bytes()
        assert "not a manifest" in edited(out, change)
        (out / manifest.MANIFEST).write_bytes(before)
    assert set(Manifest.model_fields) == {"memrewrite", "base", "versions", "tied", "files"}
