"""Tables at the widths of terminals: names that users copy stay whole."""

from __future__ import annotations

import io

import pytest
import tiny
from rich.console import Console

import memrewrite
from memrewrite.cli import text_output


def printed(width: int) -> str:
    model, inputs = tiny.named("llama")
    out = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    text_output.show_sites(out, memrewrite.inspect(model, inputs).sites)
    text_output.show_report(out, memrewrite.apply(model, tiny.recipe("parallel"), inputs), None)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_paths_and_numbers_are_not_broken(width: int) -> None:
    text = printed(width)
    for path in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert text.count(f"{path} ") == 3  # sites, plan, scales
    assert "16 → 32 → 16" in text
    assert "1,536 → " in text  # parameters of an MLP and of its layer
    if width >= 80:
        assert max(len(line) for line in text.splitlines() if line.startswith(" ")) <= width
    assert ("left out at this width" in text) == (width < 200)


def test_a_path_wider_than_the_terminal_is_whole() -> None:
    out = Console(width=40, force_terminal=True, color_system=None, file=io.StringIO())
    path = ".".join(["a_long_name"] * 8)
    text_output.table(out, ("path", "reason"), [(path, "because of some long reason that has many words")])
    assert isinstance(out.file, io.StringIO)
    assert path in out.file.getvalue()
