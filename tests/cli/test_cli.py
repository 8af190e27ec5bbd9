"""The command line: what it prints and where, exit codes, one clear error per bad input, no leftover files."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from memrewrite.cli.app import app
from memrewrite.cli.text_output import size
from memrewrite.passes import pipeline
from memrewrite.passes.storage import source as sources

MODEL = """\
import torch
from torch import nn
from torch.nn import functional as F

class MLP(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))

class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out, self.mlp = nn.Linear(d, 3 * d), nn.Linear(d, d), MLP(d, h)
    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm2(x))

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(24, 50)
        self.blocks = nn.ModuleList(Block(24, 96) for _ in range(3))
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build():
    print("the user's own print")
    return Tiny()

def inputs():
    return (torch.randint(50, (2, 7)),)
"""
RECIPE = """\
memrewrite: 1
pools: {shared: {keys: 8}}
replace:
  - where: {layers: [0, 2]}
    with: memory_plus
    pool: shared
    options: {heads: 2, topk: 4}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command line in a directory that contains model.py and r.yaml."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def listing(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


# ----------------------------------------------------------------------------------------------- fast, without torch


QUICK = [["--help"], ["--version"], ["apply", "--help"], ["recipes"], ["recipes", "show", "pkm"]]


@pytest.fixture(scope="module")
def quick_commands() -> dict[str, dict[str, Any]]:
    """What each quick command did, all in one process, each in its own fork of a process that has imported nothing heavy."""
    code = """
import json, os, sys
from memrewrite.cli import main
for arguments in json.loads(sys.argv[1]):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        sys.argv[1:], code = arguments, 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        heavy = sorted({"torch", "transformers", "numpy"} & set(sys.modules))
        sys.stdout.flush()
        os.write(write, f"\\0{json.dumps([code, heavy])}".encode())
        os._exit(0)
    os.close(write)
    shown = b"".join(iter(lambda: os.read(read, 65536), b"")).decode()
    os.waitpid(child, 0)
    text, _, rest = shown.rpartition("\\0")
    code, heavy = json.loads(rest)
    print(json.dumps({"arguments": arguments, "text": text, "code": code, "heavy": heavy}), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(QUICK)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {" ".join(row["arguments"]): row for row in rows}


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_do_not_import_torch(quick_commands: dict[str, dict[str, Any]], arguments: list[str]) -> None:
    did = quick_commands[" ".join(arguments)]
    assert not did["code"]
    assert did["heavy"] == []
    assert did["text"]


def test_help_states_the_exit_codes(run: Callable[..., Any]) -> None:
    for arguments in (["--help"], ["apply", "--help"]):
        assert "Exit codes: 0 done; 1" in run(*arguments).stdout


def test_usage_errors_exit_with_2(run: Callable[..., Any]) -> None:
    assert run("apply", "model.py").exit_code == 2
    assert run("rewrite").exit_code == 2
    assert run("apply", "model.py", "r.yaml", "--emit", "onnx").exit_code == 2


def test_recipes(run: Callable[..., Any]) -> None:
    names = [r["name"] for r in json.loads(run("recipes", "--json").stdout)["recipes"]]
    assert "memory-plus" in names
    listed = run("recipes").stdout
    assert all(name in listed for name in names)
    assert "memrewrite: 1" in run("recipes", "show", "memory-plus").stdout
    assert json.loads(run("recipes", "schema").stdout)["title"] == "memrewrite recipe"
    missing = run("recipes", "show", "memry-plus")
    assert missing.exit_code == 2
    assert "did you mean 'memory-plus'" in missing.stderr


def test_the_shell_completes_recipe_names() -> None:
    from memrewrite.cli.recipes import complete

    assert complete("memory") == ["memory-plus", "memory-plus-fused", "memory-plus-parallel"]


# ------------------------------------------------------------------------------------------------------------- output


def test_inspect(run: Callable[..., Any], tmp_path: Path) -> None:
    before = listing(tmp_path)
    table = run("inspect", "model.py")
    assert table.exit_code == 0
    assert "3 MLPs" in table.stdout
    assert "24 → 96 → 24" in table.stdout
    assert "own print" not in table.stdout
    assert "s] capturing the model" in table.stderr
    assert not {"\x1b", "│", "━"} & set(table.stdout)
    sites = json.loads(run("inspect", "model.py", "--json").stdout)["sites"]
    assert [s["path"] for s in sites] == [f"blocks.{i}.mlp" for i in range(3)]
    assert {"pattern", "d_model", "d_hidden", "activation", "calls", "parameters"} <= set(sites[0])
    assert listing(tmp_path) == before


def test_inspect_why(run: Callable[..., Any]) -> None:
    shown = run("inspect", "model.py", "--why", "blocks.1.mlp").stdout
    assert shown.startswith("mlp: `blocks.1.mlp` is an MLP\n")
    assert all(
        text in shown for text in ("plain, gelu", "24 → 96 → 24", "blocks.1.mlp.up.weight", "as a module", "1 of 3 in blocks")
    )
    container = run("inspect", "model.py", "--why", "blocks").stdout
    assert "contains 3 MLPs" in container
    assert "blocks.0.out and 2 similar" in container
    assert "model.py:19" in container  # the attention, which mixes the tokens of its input
    document = json.loads(run("inspect", "model.py", "--why", "head", "--json").stdout)
    assert document["verdict"] == "no candidate"
    assert document["findings"][0]["line"]
    unknown = run("inspect", "model.py", "--why", "blocks.1.mpl")
    assert unknown.exit_code == 2
    assert "'blocks.1.mlp'" in unknown.stderr


def test_inspect_why_of_a_refusal(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL.replace("return x + self.mlp(self.norm2(x))", "return self.mlp(self.norm2(x))"))
    shown = run("inspect", "model.py", "--why", "blocks.1.mlp").stdout
    start = "refused: `blocks.1.mlp` contains what looked like an MLP with `blocks.1.mlp.down` as its last matrix"
    assert shown.startswith(start)
    assert "rule        residual" in shown
    assert "return self.down(F.gelu(self.up(x)))" in shown
    assert "try         if it is meant as an MLP, add its output" in shown


def test_inspect_draws_a_page(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("inspect", "model.py", "--html", "out.html", "--recipe", "r.yaml")
    assert done.exit_code == 0, done.stderr
    assert "page written to out.html" in done.stdout
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert all(f'data-site="blocks.{i}.mlp"' in text for i in range(3))
    assert "memory_plus" in text
    again = run("inspect", "model.py", "--html", "out.html")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == text
    whole = json.loads(run("inspect", "model.py", "--html", "out.html", "--overwrite", "--json").stdout)
    assert whole["page"] == "out.html"
    assert len(whole["sites"]) == 3
    assert "memory_plus" not in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert sorted(listing(tmp_path)) == ["model.py", "out.html", "r.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "."], "has no name"),
        (["--html", "folder"], "is a directory"),
        (["--html", "model.py", "--overwrite"], "is an input of this command"),
        (["--html", "no/where.html"], "cannot be written"),
        (["--html", "out.html", "--why", "blocks"], "cannot be combined"),
        (["--recipe", "r.yaml"], "--html FILE"),
        (["--html", "out.html", "--recipe", "bad.yaml"], "there is no block 9"),
    ],
)
def test_refused_page_requests(run: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("[0, 2]", "[0, 9]"))
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    done = run("inspect", "model.py", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert listing(tmp_path) == before


def test_plan_and_dry_run_change_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    before = listing(tmp_path)
    table = run("plan", "model.py", "r.yaml").stdout
    assert "blocks.2.mlp" in table
    assert "4,728 → 2,004" in table  # parameters of one MLP and of its layer
    assert "FLOPs per token" in table
    document = json.loads(run("plan", "model.py", "r.yaml", "--json").stdout)
    assert document["before"]["parameters"] == 2 * 4728
    assert [s["path"] for s in document["sites"]] == ["blocks.0.mlp", "blocks.2.mlp"]
    dry = json.loads(run("apply", "model.py", "r.yaml", "--dry-run", "-o", "out", "--json").stdout)
    assert len(dry.pop("scales")) == len(document.pop("scales")) == 2  # of a model that is built anew, with other weights
    assert dry == document
    assert listing(tmp_path) == before


def test_a_long_path_is_not_truncated(run: Callable[..., Any], tmp_path: Path) -> None:
    name = "a_stack_of_blocks_" * 8
    (tmp_path / "model.py").write_text(MODEL.replace("blocks", name))
    assert f"{name}.0.mlp" in run("inspect", "model.py").stdout


def test_apply_without_output_reports_that_nothing_was_saved(run: Callable[..., Any], tmp_path: Path) -> None:
    before = listing(tmp_path)
    done = run("apply", "model.py", "r.yaml")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"untouched +passed", done.stdout)
    assert "not saved" in done.stdout
    assert listing(tmp_path) == before


def test_apply_saves_what_inspect_reads(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("apply", "model.py", "r.yaml", "-o", "deep/out", "--json")
    document = json.loads(done.stdout)
    assert document["ok"]
    assert document["saved"] == "deep/out"
    assert {c["outcome"] for c in document["report"]["checks"]} <= {"passed", "skipped"}
    assert {"model.safetensors", "plan.json", "report.json", "recipe.yaml", "model.py"} <= set(listing(Path("deep/out")))
    refused = run("inspect", "deep/out")
    assert refused.exit_code == 2
    assert "--trust-code" in refused.stderr
    seen = json.loads(run("inspect", "deep/out", "--json", "--trust-code").stdout)
    assert [s["path"] for s in seen["sites"]] == ["blocks.1.mlp"]
    again = run("apply", "deep/out", "r.yaml", "--trust-code")
    assert again.exit_code == 2
    assert "already rewritten" in again.stderr
    Path("deep/out/model.safetensors").write_bytes(b"short")
    damaged = run("inspect", "deep/out", "--trust-code")
    assert damaged.exit_code == 2
    assert "damaged" in damaged.stderr


def test_profile_prints_the_phases_of_the_whole_command(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("apply", "model.py", "r.yaml", "-o", "out", "--profile")
    assert done.exit_code == 0, done.output
    rows = dict(re.findall(r"^(\S.*?)  +\d+\.\d\d s +(\d+\.\d\d) s$", done.stdout, re.MULTILINE))
    assert {"loading the model", "capturing the model", "check frame", "writing the weights", "sum"} <= set(rows)
    document = json.loads(run("apply", "model.py", "r.yaml", "--profile", "--json").stdout)
    names = [phase["name"] for phase in document["phases"]]
    assert names[:2] == ["reading the recipe", "loading the model"]
    assert [phase["name"] for phase in document["report"]["phases"]] == names[2:]
    document = json.loads(run("apply", "model.py", "r.yaml", "--json").stdout)
    assert "phases" not in document
    assert document["report"]["phases"]


def test_apply_emits_a_graph(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("apply", "model.py", "r.yaml", "--emit", "graph", "-o", "out")
    assert done.exit_code == 0, done.stderr
    assert {"model.pt2", "plan.json", "report.json"} <= set(listing(tmp_path / "out"))
    program = torch.export.export(sources.load_source("model.py").model, (torch.randint(50, (2, 7)),))
    torch.export.save(program, "given.pt2")
    given = json.loads(run("apply", "given.pt2", "r.yaml", "--trust-code", "--json").stdout)
    assert given["emit"] == "graph"
    refused = run("apply", "given.pt2", "r.yaml", "--trust-code", "--emit", "module")
    assert refused.exit_code == 2
    assert "--emit graph" in refused.stderr


def test_a_hugging_face_directory(run: Callable[..., Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    done = run("apply", "llama", "r.yaml", "-o", "out")
    assert done.exit_code == 0, done.stderr
    seen = json.loads(run("inspect", "out", "--json").stdout)  # no Python code is stored: --trust-code is not needed
    assert [s["path"] for s in seen["sites"]] == ["model.layers.1.mlp"]


def test_verify(run: Callable[..., Any]) -> None:
    assert run("verify", "nowhere").exit_code == 2
    assert run("apply", "model.py", "r.yaml", "-o", "out").exit_code == 0
    done = run("verify", "out", "--trust-code", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    Path("out/recipe.yaml").write_text("memrewrite: 1")
    tampered = run("verify", "out", "--trust-code")
    assert tampered.exit_code == 2
    assert "recipe.yaml" in tampered.stderr


# -------------------------------------------------------------------------------------------------------- bad input

BAD_RECIPES = [
    ("memory_plus", "memory_pluss", "did you mean 'memory_plus'"),
    ("keys: 8", "keyz: 8", "unknown key 'keyz'"),
    ("keys: 8", "keys: many", "must be an integer"),
    ("pool: shared", "pool: shard", "there is no pool 'shard'"),
    ("topk: 4", "topk: 9", "topk"),
    ("topk: 4", "topk: 4, key_dim: 7", "key_dim"),
    ("[0, 2]", "[0, 9]", "there is no block 9"),
    ("layers: [0, 2]", "path: nothing.*", "matches none of 3 MLPs"),
    ("replace:", "replace: [", "r.yaml:"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD_RECIPES)
def test_bad_recipes(run: Callable[..., Any], tmp_path: Path, good: str, bad: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(good, bad))
    before = listing(tmp_path)
    done = run("apply", "model.py", "r.yaml", "-o", "out", "--json")
    assert done.exit_code == 2, done.output
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert listing(tmp_path) == before


def test_two_rules_that_select_one_mlp(run: Callable[..., Any], tmp_path: Path) -> None:
    rules = RECIPE.partition("replace:\n")[2]
    (tmp_path / "r.yaml").write_text(RECIPE + rules)
    done = run("plan", "model.py", "r.yaml")
    assert done.exit_code == 2
    assert "both select" in done.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("import nothing_of_the_kind\n", "cannot be imported"),
        (MODEL.replace("def build", "def construct"), "neither `build` nor `model`"),
        (MODEL.replace("(2, 7)", "(2, 7)).float(") + "", "does not run on its example inputs"),
        ("import torch\nmodel = torch.nn.Linear(4, 4)\ninputs = (torch.ones(2, 4),)\n", "no MLP was found"),
    ],
)
def test_bad_models(run: Callable[..., Any], tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "model.py").write_text(model)
    before = listing(tmp_path)
    done = run("apply", "model.py", "r.yaml", "-o", "out")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "  try: " in done.stderr
    assert not done.stdout
    assert listing(tmp_path) == before


def test_a_nonempty_output_is_refused_before_the_model_is_loaded(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for output in ("out", "model.py"):
        done = run("apply", "missing.py", "r.yaml", "-o", output)
        assert done.exit_code == 2
        assert "loading" not in done.stderr
        assert output in done.stderr
    for output in (".", "..", "out/.."):
        done = run("apply", "model.py", "r.yaml", "-o", output, "--overwrite")
        assert done.exit_code == 2
        assert "would delete" in done.stderr
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_overwrite(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    for options in (["--overwrite"], ["--overwrite-any", "."], ["--overwrite", "--overwrite-any", "other"]):
        refused = run("apply", "missing.py", "r.yaml", "-o", "out", *options)
        assert refused.exit_code == 2
        assert "--overwrite-any" in refused.stderr
    assert listing(tmp_path / "out") == ["old"]
    for options in (["--overwrite-any", "./out"], ["--overwrite"]):
        assert run("apply", "model.py", "r.yaml", "-o", "out", *options).exit_code == 0
        assert "old" not in listing(tmp_path / "out")
        (tmp_path / "out" / "old").write_text("")


def test_a_pool_that_does_not_fit_in_memory(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("keys: 8", "keys: 65536"))
    assert run("plan", "model.py", "r.yaml").exit_code == 0  # the plan shows the size
    done = run("apply", "model.py", "r.yaml", "-o", "out")
    assert done.exit_code == 2
    assert "--allow-large" in done.stderr


# ------------------------------------------------------------------------------------------- failed checks and own bugs


def test_a_failed_check_shows_the_checks_and_exits_1(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from memrewrite.errors import VerificationError
    from memrewrite.report import Check

    whole = pipeline.apply

    def failing(*arguments: Any, **options: Any) -> Any:
        report = whole(*arguments, **options)
        failed = Check(name="frame", outcome="failed", number=3.0, sentence="3 values differ")
        raise VerificationError("the check 'frame' failed").with_report(report.model_copy(update={"checks": (failed,)}))

    monkeypatch.setattr(pipeline, "apply", failing)
    done = run("apply", "model.py", "r.yaml", "-o", "out")
    assert done.exit_code == 1
    assert "frame  failed" in done.stdout
    assert "error: the check 'frame' failed" in done.stderr
    document = json.loads(run("apply", "model.py", "r.yaml", "--json").stdout)
    assert document["error"]["kind"] == "VerificationError"
    assert document["report"]["checks"][0]["outcome"] == "failed"
    assert not Path("out").exists()


class _Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ZeroDivisionError("odd"), 1),
        (KeyboardInterrupt(), 130),
        (_Interrupt("mine"), 2),
        (SystemExit(0), 2),
        (SystemExit("why"), 2),
        (GeneratorExit(), 2),
        (typer.Exit(0), 1),
        (BrokenPipeError(errno.EPIPE, "a socket of the model"), 1),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),
        (MemoryError(), 1),
    ],
    ids=repr,
)
def test_bugs_and_interrupts(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    """Whatever the model's code raises: one message, and the exit code is never the one that it asks for."""

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(pipeline, "inspect", fail)
    done = run("inspect", "model.py")
    assert done.exit_code == code
    assert not done.stdout
    assert "Traceback" not in done.stderr
    assert ("this is a bug" in done.stderr) == isinstance(raised, ZeroDivisionError | typer.Exit)
    if code != 130:
        error = json.loads(run("inspect", "model.py", "--json").stdout)["error"]
        assert error["exit_code"] == code
        assert error["hint"]
    if code == 2:
        assert f"the model's code ended the command: {type(raised).__name__}" in done.stderr
    if isinstance(raised, ZeroDivisionError):
        assert "a bug in memrewrite: ZeroDivisionError: odd" in done.stderr
        assert "Traceback" in run("--debug", "inspect", "model.py").stderr


def test_verbose_logs_every_replacement(run: Callable[..., Any]) -> None:
    assert "info: memory_plus replaces the MLP blocks.0.mlp" in run("-v", "apply", "model.py", "r.yaml").stderr


def test_sizes_have_units() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**30, 2**50)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "1,024.0 TiB"]


def test_the_command_line_can_turn_the_checks_off(run: Callable[..., Any]) -> None:
    done = run("apply", "model.py", "r.yaml", "-o", "out", "--verify", "off")
    assert done.exit_code == 0, done.stderr
    assert "no checks were run" in done.stdout
    assert "verify: 'off'" in Path("out/recipe.yaml").read_text() or 'verify: "off"' in Path("out/recipe.yaml").read_text()
    assert run("apply", "model.py", "r.yaml", "--verify", "some").exit_code == 2


def test_hints_name_options_of_the_command_line_or_arguments_of_python(run: Callable[..., Any]) -> None:
    assert run("apply", "model.py", "r.yaml", "-o", "out", "--verify", "off").exit_code == 0
    refused = run("apply", "model.py", "r.yaml", "-o", "out")
    assert "--overwrite to replace" in refused.stderr
    assert "overwrite=True" not in refused.stderr


def test_the_title_of_the_page_is_the_name_of_the_model(run: Callable[..., Any]) -> None:
    assert run("inspect", str(Path("model.py").resolve()), "--html", "out.html").exit_code == 0
    assert "<title>model.py · memrewrite</title>" in Path("out.html").read_text(encoding="utf-8")
