"""Two blocks."""

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
