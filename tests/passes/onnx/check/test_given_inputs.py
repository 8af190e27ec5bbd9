"""Arrays and tokenizers that a user gives to `check` are data: damage is our error, and nothing is unpickled or allocated."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_dirs

from memrewrite.errors import ExportError
from memrewrite.passes.onnx.check.given_inputs import arrays_of, real_inputs, text_inputs
from memrewrite.passes.onnx.file import Port

SAVED = Path(__file__).parents[3] / "whole" / "saved" / "huggingface"
IDS = [Port(name=name, dtype="int64", shape=("batch", "sequence")) for name in ("input_ids", "attention_mask")]


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def archive(path: Path, content: bytes, name: str = "x.npy", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.array(True),
        np.zeros((0, 3), np.float16),
        np.array([2**63], np.uint64),
    ],
    ids=["float32", "transposed", "big-endian", "scalar", "empty", "uint64"],
)
def test_what_numpy_saves_is_read(save: Any, array: Any, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", one=array, two=array)
    found = arrays_of(tmp_path / "a.npz")
    assert list(found) == ["one", "two"]
    assert np.array_equal(found["two"], array)
    assert found["one"].dtype.isnative


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("ran").touch, ()


@pytest.mark.parametrize(
    "content",
    [
        npy(np.array([Code()], object), allow_pickle=True),
        pickle.dumps(Code()),
        npy(np.array(["text"])),
        npy(np.zeros(2, "complex64")),
        npy(np.zeros(2, "M8[s]")),
        npy(np.zeros(2, [("a", "f4")])),
        npy(np.zeros(2, np.longdouble)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 400 + ",), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"\0" * 4),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, -1), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"\0" * 4),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\0" * 5),
        header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (), }"),
        header("(" * 5_000),
        header("{'descr': '<f4'"),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_what_is_no_array_of_numbers_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="the inputs cannot be read"):
        arrays_of(archive(tmp_path / "a.npz", content))
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_expands_to_more_than_memory_is_refused(tmp_path: Path) -> None:
    """Before anything is expanded: it claims 8 GiB, and contains nothing."""
    content = bytearray(archive(tmp_path / "a.npz", npy(np.zeros(4, np.float32))).read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")  # its size when it is expanded
    double = tmp_path / "b.npz"
    double.write_bytes(content)
    with pytest.raises(ExportError, match=r"the inputs cannot be read|at most"):
        arrays_of(double)


@pytest.mark.parametrize("cut", [0, 1, 30, 60, 120, -1])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_archive_is_refused(method: int, cut: int, tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.npz", npy(np.arange(100.0)), method=method).read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 255
    for damaged in (whole[:cut], whole[cut:][:-5], bytes(flipped)):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(ExportError, match="the inputs cannot be read"):
            arrays_of(tmp_path / "a.npz")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("pipe.npz", ".", "nothing.npz"):
        with pytest.raises(ExportError, match="the inputs cannot be read"):
            arrays_of(tmp_path / name)


@pytest.mark.parametrize("value", ["text", object(), [[1], [2, 3]], np.array(["a"]), {"a": 1}])
def test_values_that_are_no_arrays_are_refused(value: Any) -> None:
    port = Port(name="x", dtype="float", shape=("batch",))
    with pytest.raises(ExportError, match="'x' of real input 0 is no array of numbers"):
        real_inputs([{"x": value}], [port], {})


# ------------------------------------------------------------------------------------------------------------ tokenizers


def tokenizer(**changes: Any) -> dict[str, Any]:
    letters = {chr(32 + number): number for number in range(64)}
    model = {"type": "WordLevel", "vocab": letters, "unk_token": "?"}
    split = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model, **changes}


@pytest.mark.parametrize(
    ("settings", "sets"),
    [
        ({}, 4),
        ({"pad_token": " "}, 1),
        ({"eos_token": {"content": "!"}}, 1),
        ({"pad_token": "zqy"}, 4),  # which it does not have
        ({"pad_token": ["a"], "tokenizer_class": "Trainer", "auto_map": {"AutoTokenizer": ["code.Own", None]}}, 4),
        ([], 4),
    ],
)
def test_a_tokenizer_is_read_as_data(settings: Any, sets: int, tmp_path: Path) -> None:
    """Its settings name classes and code, which are not looked up."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("raise SystemExit")
    assert len(text_inputs(tmp_path, IDS)) == sets


@pytest.mark.parametrize(
    ("tokenizer", "settings"), [("", "{}"), ("[" * 100_000, "{}"), ('{"model": 1}', "{}"), (json.dumps(tokenizer()), "{")]
)
def test_a_damaged_tokenizer_is_an_error(tokenizer: str, settings: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ExportError, match="the tokenizer"):
        text_inputs(tmp_path, IDS)


def test_of_a_saved_directory_only_a_tokenizer_in_its_manifest_is_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED, tmp_path / "model"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    assert text_inputs(folder, IDS) == []
    saved_dirs.add_file(folder, "tokenizer.json", json.dumps(tokenizer()).encode())
    assert len(text_inputs(folder, IDS)) == 4
