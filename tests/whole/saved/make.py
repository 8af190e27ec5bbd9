"""Makes the saved directories beside this file, which later versions must load: `python tests/whole/saved/make.py`.

They were made at commit cbe1b24 (version 0.1.0). `module-graph` and `module-graph-parallel` have format 1 of graphs.json, which
is not written any more; those with `-2` have format 2. Make them again only for a new format, beside the old ones. Each
directory has an `example.safetensors` next to it: the inputs, and the output of the model that was saved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import tiny  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import memrewrite  # noqa: E402
from memrewrite.passes.storage.base_model import Base  # noqa: E402

CODE = '''"""Two blocks."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def build():
    return nn.Sequential(Block(), Block())


def inputs():
    return {"input": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))}
'''


class Bare(torch.nn.Module):
    """A block whose MLP's matrices are parameters of its own: its forward becomes a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(tiny.WIDTH)
        self.up = torch.nn.Parameter(torch.randn(tiny.WIDTH, 32) / 4)
        self.down = torch.nn.Parameter(torch.randn(32, tiny.WIDTH) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(x) @ self.up) @ self.down


def bare() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny.Tiny([Bare() for _ in range(tiny.BLOCKS)]).eval()


def save(name: str, model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    tiny.open_up(model)
    memrewrite.save(model.eval(), HERE / name, overwrite=True, **options)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    save_file({**tensors, "output": tiny.values_of(model, inputs)}, HERE / f"{name}.example.safetensors")


def main() -> None:
    for name, build, placement in (
        ("huggingface", "llama", "replace"),
        ("huggingface-parallel", "llama", "parallel"),
        ("huggingface-span", "bert", "replace"),
        ("given", "loose", "parallel"),
    ):
        model, inputs = tiny.named(build)
        memrewrite.apply(model, tiny.recipe(placement), inputs)
        save(name, model, inputs)
    for name, placement in (("module-graph-2", "replace"), ("module-graph-2-parallel", "parallel")):
        model, inputs = bare(), {"ids": tiny.tokens()}
        memrewrite.apply(model, tiny.recipe(placement), inputs)
        save(name, model, inputs)
    model, inputs = tiny.named("modular")
    save("graph", memrewrite.apply(model, tiny.recipe(), inputs, emit="graph").model, inputs)
    of_code()


def of_code() -> None:
    code = HERE / "model.py"
    code.write_text(CODE)
    space: dict[str, Any] = {}
    exec(CODE, space)
    torch.manual_seed(0)
    model, inputs = space["build"](), space["inputs"]()
    memrewrite.apply(model, tiny.recipe(), inputs)
    save("python", model, inputs, source=Base(kind="python", code=code, builder="build"))
    code.unlink()


if __name__ == "__main__":
    main()
