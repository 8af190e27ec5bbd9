"""The layers' modules and the fused updates need only torch: a GPU machine may have no pydantic."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "pydantic_core", "yaml", "rich", "typer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
from memrewrite.fused import fuse
from memrewrite.layers.product_keys import ProductKeys
from memrewrite.layers.value_table import ValueTable

table = ValueTable(64, 12, gradient="fused", seed=1)
keys = ProductKeys(12, 8, heads=2, topk=3, key_dim=6)
table.reset_parameters()
keys.reset_parameters(torch.Generator().manual_seed(0))
model = torch.nn.ModuleList([table, keys])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
fuse(optimizer, model)
before = table.values.detach().clone()
slots, weights = keys(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))
table(slots, weights).square().sum().backward()
optimizer.step()
changed = (table.values != before).any(1).nonzero().squeeze(1)
assert torch.equal(changed, slots.unique()), (changed, slots)
"""


def test_modules_and_fused_updates_run_without_pydantic() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
