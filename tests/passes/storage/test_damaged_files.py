"""Any change of any file of a saved directory gives a model or one of our errors with a place; a given model is never changed.

Each case is a number: the seed of a mutation of one file, after which the manifest is corrected, so that hashes do not help.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import saved_dirs
import tiny

import memrewrite
from memrewrite.errors import UserError

SAVED = Path(__file__).parents[2] / "whole" / "saved"
CASES = 30  # of each file: 480 in all; tests/whole has a fuzzer that runs longer
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    255,
    2**31,
    2**63,
    10**9,
    10**18,
    1.5,
    1e308,
    "",
    "a",
    "forward",
    "__class__",
    "../x",
]
VALUES += ["/etc/passwd", "os.system", "float64", "int8", "\U0001f600", "\x00", [], {}, [[]], {"a": 1}, ["x"] * 3, [[[[1]]]]]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from places(item, (*place, key))


def json_mutated(text: str, draw: random.Random) -> str:
    """A JSON text with one to three values replaced, removed or added."""
    value = json.loads(text)
    for _ in range(draw.choice([1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return json.dumps(draw.choice(VALUES))
        *path, last = draw.choice(found)
        parent = value
        for key in path:
            parent = parent[key]
        new = json.loads(json.dumps(draw.choice(VALUES)))
        match draw.randrange(4):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[draw.choice([*parent, "x", "auto_map", "__class__"])] = new
            case 1:
                parent.insert(draw.randrange(len(parent) + 1), new)
            case _:
                parent[last] = new
    return json.dumps(value)


def bytes_mutated(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, a part cut out or put in, another encoding, or another file."""
    data, at = bytearray(content), draw.randrange(min(len(content), draw.choice([64, 2000, 10**6])) or 1)
    match draw.randrange(7):
        case 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        case 1:
            del data[at:]
        case 2:
            del data[at : at + draw.choice([1, 5, 50])]
        case 3:
            data[at:at] = draw.randbytes(draw.choice([1, 8, 100]))
        case 4:
            data = bytearray()
        case 5:
            data = bytearray(b"[" * 100_000 + b"]" * 100_000)
        case 6:
            data = bytearray(content.decode("latin1").encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"])))
    return bytes(data)


def mutated(file: Path, draw: random.Random) -> bytes:
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.7:
        return json_mutated(content.decode(), draw).encode("utf-8", "surrogatepass")
    if file.suffix == ".safetensors" and draw.random() < 0.6:  # the header is JSON after its length
        end = 8 + int.from_bytes(content[:8], "little")
        header = json_mutated(content[8:end].decode(), draw).encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + content[end:]
    return bytes_mutated(content, draw)


FILES = [(name, file.name) for name in ("huggingface", "huggingface-span") for file in sorted((SAVED / name).iterdir())]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_mutated_file(name: str, file: str, tmp_path: Path) -> None:
    refused = 0
    for seed in range(CASES):
        folder = Path(shutil.copytree(SAVED / name, tmp_path / str(seed)))
        draw = random.Random(f"{name} {file} {seed}")
        (folder / file).write_bytes(mutated(folder / file, draw))
        if file != saved_dirs.MANIFEST:
            saved_dirs.correct_manifest(folder)
        refused += refusal_of(partial(memrewrite.load, folder), seed)
        shutil.rmtree(folder)
    assert refused or file in ("recipe.yaml", "generation_config.json")


def refusal_of(run: Callable[[], object], seed: int) -> bool:
    """True if it is refused with one of our errors, which has a place; any other exception fails the test."""
    try:
        run()
    except UserError as error:
        if not error.where:
            pytest.fail(f"case {seed}: an error without a place: {error}")
        return True
    except BaseException as error:
        raise AssertionError(f"case {seed}: {error!r}") from error
    return False


def test_a_given_model_is_not_changed_by_a_mutated_file(tmp_path: Path) -> None:
    model, _ = tiny.rewritten("modular")
    saved = memrewrite.save(model, tmp_path / "saved")
    base = tiny.modular()
    before, refused = tiny.Photograph(base), 0
    for file in ("memrewrite.json", "plan.json", "model.safetensors"):
        for seed in range(CASES):
            folder = Path(shutil.copytree(saved, tmp_path / f"{file}{seed}"))
            draw = random.Random(f"given {file} {seed}")
            (folder / file).write_bytes(mutated(folder / file, draw))
            if file != saved_dirs.MANIFEST:
                saved_dirs.correct_manifest(folder)
            if refusal_of(partial(memrewrite.load, folder, base), seed):
                assert not before.differences(tiny.Photograph(base)), (file, seed)
                refused += 1
            else:
                base = tiny.modular()
                before = tiny.Photograph(base)
    assert refused > CASES


NEGATIVE = b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b'{"a": 1}', NEGATIVE])
@pytest.mark.parametrize("length", [None, 0, 1, 2**31, 2**63, 2**64 - 1])
def test_hostile_headers(header: bytes, length: int | None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED / "huggingface", tmp_path / "out"))
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)
    saved_dirs.correct_manifest(folder)
    assert refusal_of(lambda: memrewrite.load(folder), 0)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "I128", "f32", 5])
def test_a_dtype_that_is_not_supported(dtype: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED / "huggingface", tmp_path / "out"))
    header = json.dumps({"extra": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}).encode()
    saved_dirs.add_file(folder, "more.safetensors", len(header).to_bytes(8, "little") + header + b"12")
    assert refusal_of(lambda: memrewrite.load(folder), 0)
