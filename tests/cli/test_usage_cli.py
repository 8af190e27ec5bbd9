"""`memrewrite usage` on a saved tiny model with a tokenizer: tables, JSON, a figure; and one clear error per bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from saved_dirs import add_file
from typer.testing import CliRunner

import memrewrite
from memrewrite.cli.app import app

LETTERS = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ,.")}
TEXT = "a memory layer reads a few rows, and the text is longer than the context of the model. " * 3
CONTEXT = 64


def tokenizer() -> Any:
    """One token for each letter."""
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(LETTERS, unk_token="?"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return own


def save(model: Any, folder: Path) -> None:
    """Save a rewritten model with the tokenizer."""
    memrewrite.save(model, folder)
    add_file(folder, "tokenizer.json", tokenizer().to_str().encode())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory "saved" with a rewritten model, next to text.txt."""
    folder = tmp_path_factory.mktemp("usage")
    save(tiny.rewritten("llama")[0], folder / "saved")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(saved)
    return lambda *arguments: CliRunner().invoke(app, ["usage", *arguments])


def test_it_counts_what_the_loaded_model_reads(run: Callable[..., Any], saved: Path) -> None:
    document = json.loads(run("saved", "--text", "text.txt", "--json").stdout)
    ids = [LETTERS[letter] for letter in TEXT]
    model: Any = memrewrite.load(saved / "saved")
    with memrewrite.watch(model) as usage, torch.no_grad():
        for start in range(0, len(ids), CONTEXT):
            model(torch.tensor([ids[start : start + CONTEXT]]))
    assert document["usage"] == usage.statistics().model_dump(mode="json")
    assert document["usage"]["layers"][0]["tokens"] == len(TEXT)
    assert document["pieces"] == -(-len(TEXT) // CONTEXT)


def test_shorter_pieces(run: Callable[..., Any]) -> None:
    document = json.loads(run("saved", "--text", "text.txt", "--length", "10", "--json").stdout)
    assert document["usage"]["layers"][0]["tokens"] == len(TEXT)
    assert document["pieces"] == -(-len(TEXT) // 10)


def test_without_a_text_the_example_inputs_are_used(run: Callable[..., Any], saved: Path) -> None:
    from memrewrite.passes.models.example_inputs import example_inputs

    document = json.loads(run("saved", "--json").stdout)
    model: Any = memrewrite.load(saved / "saved")
    with memrewrite.watch(model) as usage, torch.no_grad():
        model(**example_inputs(model)[1])
    assert document["usage"] == usage.statistics().model_dump(mode="json")


def test_tables_and_figure(run: Callable[..., Any], saved: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("saved", "--text", "text.txt", "--plot", "usage.svg")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{len(TEXT)} tokens · 5 pieces of at most {CONTEXT} tokens"
    assert "gate rms" in lines[1]
    assert [line.split()[0] for line in lines[2:5]] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert any(line.startswith("shared") and "model.layers.1.mlp  model.layers.2.mlp" in line for line in lines)
    assert lines[-1] == "figure written to usage.svg"
    assert "reading the text: 80 % of 5 pieces" in done.stderr
    assert (saved / "usage.svg").read_text().startswith("<?xml")
    again = run("saved", "--plot", "usage.svg")
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert "loading the model" not in again.stderr
    assert run("saved", "--plot", "usage.svg", "--overwrite").exit_code == 0


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_kinds_of_models_read_texts_too(name: str, tmp_path: Path) -> None:
    save(tiny.rewritten(name)[0], tmp_path / "saved")
    (tmp_path / "text.txt").write_text(TEXT)
    done = CliRunner().invoke(app, ["usage", str(tmp_path / "saved"), "--text", str(tmp_path / "text.txt"), "--json"])
    assert done.exit_code == 0, done.stderr
    assert all(layer["tokens"] == len(TEXT) for layer in json.loads(done.stdout)["usage"]["layers"])


def test_a_model_of_images_is_counted_on_its_example_inputs(tmp_path: Path) -> None:
    save(tiny.rewritten("vit")[0], tmp_path / "saved")
    (tmp_path / "text.txt").write_text(TEXT)
    counted = CliRunner().invoke(app, ["usage", str(tmp_path / "saved"), "--json"])
    assert json.loads(counted.stdout)["usage"]["layers"][0]["tokens"] > 0
    refused = CliRunner().invoke(app, ["usage", str(tmp_path / "saved"), "--text", str(tmp_path / "text.txt")])
    assert refused.exit_code == 2
    assert "reads 'pixel_values', not a text" in refused.stderr


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "is not a directory that memrewrite saved"),
        (("saved", "--text", "none.txt"), "'none.txt' cannot be read"),
        (("saved", "--text", "."), "it is no file"),
        (("saved", "--text", "empty.txt"), "is empty"),
        (("saved", "--text", "binary.txt"), "'binary.txt' cannot be read"),
        (("saved", "--text", "text.txt", "--length", "65"), "do not fit the model's context of 64"),
        (("saved", "--text", "text.txt", "--length", "0"), "Invalid value for '--length'"),
        (("saved", "--length", "8"), "--length needs --text"),
        (("saved", "--plot", "usage.gif"), "no name of a plot"),
        (("saved", "--plot", "none/usage.png"), "does not exist"),
        (("saved", "--text", "text.txt", "--plot", "text.txt"), "no name of a plot"),
    ],
)
def test_bad_input(run: Callable[..., Any], saved: Path, arguments: tuple[str, ...], said: str) -> None:
    (saved / "empty.txt").write_text(" \n")
    (saved / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(saved.rglob("*"))
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert sorted(saved.rglob("*")) == before


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    memrewrite.save(tiny.rewritten("llama")[0], tmp_path / "saved")
    (tmp_path / "text.txt").write_text(TEXT)
    done = CliRunner().invoke(app, ["usage", str(tmp_path / "saved"), "--text", str(tmp_path / "text.txt")])
    assert done.exit_code == 2
    assert "has no tokenizer.json" in done.stderr


def test_a_damaged_tokenizer_and_one_of_another_model(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    foreign = tokenizer().to_str().replace(f":{LETTERS['z']}", ":1000").replace(f":{LETTERS['e']}", ":999")
    for content, said in (("{", "the tokenizer cannot be read"), (foreign, "must belong to the model")):
        folder = tmp_path / said.replace(" ", "")
        shutil.copytree(saved / "saved", folder)
        add_file(folder, "tokenizer.json", content.encode())
        done = CliRunner().invoke(app, ["usage", str(folder), "--text", str(tmp_path / "text.txt")])
        assert done.exit_code == 2
        assert said in done.stderr
