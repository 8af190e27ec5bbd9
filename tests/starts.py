"""What tests of a layer's start share: bases of several initializations, and the rms computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor, nn

from memrewrite.passes.rewrite.edit_module import layers_of
from memrewrite.plans import Plan
from memrewrite.site import Site


class PostBlock(tiny.Block):
    """Norms after the sums."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def post_norm() -> nn.Module:
    torch.manual_seed(0)
    return tiny.Tiny([PostBlock(tiny.WIDTH, lambda d: tiny.MLP(d, 2 * d), 0.0) for _ in range(tiny.BLOCKS)]).eval()


def mup() -> nn.Module:
    """Hidden matrices N(0, width^-1/2); outputs of MLPs 1/width times that, as after a muP scaling of readouts."""
    model = tiny.modular()
    for block in model.blocks:
        for matrix, gain in ((block.mlp.up, 1.0), (block.mlp.down, 1 / tiny.WIDTH)):
            nn.init.normal_(matrix.weight, 0.0, gain * matrix.in_features**-0.5)
            nn.init.zeros_(matrix.bias)
    return model


def pretrained() -> nn.Module:
    """Large orthogonal matrices, and MLPs of different scales."""
    model = tiny.modular()
    for number, block in enumerate(model.blocks):
        for matrix in (block.mlp.up, block.mlp.down):
            nn.init.orthogonal_(matrix.weight, gain=2.0 + number)
    return model


BASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    **{name: tiny.MODELS[name] for name in ("llama", "gpt2", "bert", "loose", "shared", "vit")},
    "post-norm": (post_norm, lambda: {"ids": tiny.tokens()}),
    "mup": (mup, lambda: {"ids": tiny.tokens()}),
    "pretrained": (pretrained, lambda: {"ids": tiny.tokens()}),
}


def rms(value: Tensor, width: int) -> float:
    """The rms of every row of features, in float64; of all rows that are not zero the (lower) median."""
    rows = np.sqrt((value.detach().double().reshape(-1, width).numpy() ** 2).mean(-1))
    rows = np.sort(rows[rows > 0])
    return float(rows[(len(rows) - 1) // 2]) if len(rows) else 0.0


def calls_of(model: nn.Module, inputs: dict[str, Any], site: Site) -> tuple[Tensor, Tensor]:
    """The MLP's inputs [n, d_in] and outputs [n, d_model] in the original model, from hooks on its modules."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    hooks = []
    seen: set[tuple[int, int]] = set()
    for binding in site.bindings:
        entry, exit_ = model.get_submodule(binding.entries[0]), model.get_submodule(binding.exit)
        if (id(entry), id(exit_)) not in seen:
            seen.add((id(entry), id(exit_)))
            hooks.append(entry.register_forward_pre_hook(lambda _, args: xs.append(args[0].movedim(site.axis, -1))))
            hooks.append(exit_.register_forward_hook(lambda *call: ys.append(call[-1].movedim(site.axis, -1))))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.cat([x.reshape(-1, site.d_in) for x in xs]), torch.cat([y.reshape(-1, site.d_model) for y in ys])


def compared(original: nn.Module, rewritten: nn.Module, inputs: dict[str, Any], plan: Plan) -> dict[str, tuple[float, float]]:
    """For each site: the rms of its MLP and of its layer, which reads what the MLP reads in the original model."""
    found = {}
    for path, layer in layers_of(rewritten, plan).items():
        site = next(s.site for s in plan.substitutions if s.site.path == path)
        x, y = calls_of(copy.deepcopy(original).eval(), inputs, site)
        with torch.no_grad():
            out = copy.deepcopy(layer).eval().forward(x)
        found[path] = rms(y, site.d_model), rms(out, site.d_model)
    return found
