"""What `import memrewrite` registers, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from memrewrite.on_import import when_imported

ORDERS = ["memrewrite, torch", "torch, memrewrite"]


def printed(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("imports", ORDERS)
def test_an_exported_program_is_read(imports: str, tmp_path: Path) -> None:
    model, inputs = tiny.rewritten("modular")
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (), inputs), tmp_path / "model.pt2")
        expected = float(model(**inputs).double().sum())
    code = f"import sys, {imports}\nprogram = torch.export.load(sys.argv[1])\n"
    code += "args, kwargs = program.example_inputs\nprint(float(program.module()(*args, **kwargs).double().sum()))"
    assert float(printed(code, str(tmp_path / "model.pt2"))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("imports", ORDERS)
def test_a_script_is_read(imports: str, tmp_path: Path) -> None:
    model, inputs = tiny.rewritten("modular")
    with torch.no_grad():
        torch.jit.trace(model, (inputs["ids"],)).save(str(tmp_path / "model.pt"))
    code = f"import sys, {imports}\nprint(type(torch.jit.load(sys.argv[1])).__name__)"
    assert printed(code, str(tmp_path / "model.pt")) == "RecursiveScriptModule"


def test_the_import_alone_loads_neither() -> None:
    assert printed("import sys, memrewrite\nprint('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"


def test_an_action_runs_once_after_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_module_of_a_test.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    before = list(sys.meta_path)
    when_imported("some_module_of_a_test", lambda: seen.append(sys.modules["some_module_of_a_test"].value))
    assert not seen
    import some_module_of_a_test  # type: ignore[import-not-found]

    assert seen == [1]
    assert sys.meta_path == before
    assert type(some_module_of_a_test.__spec__.loader).__name__ != "_Loader"
    when_imported("some_module_of_a_test", lambda: seen.append(2))
    assert seen == [1, 2]
