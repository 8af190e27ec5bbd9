"""The benchmark of slot use in a retrofit, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch


def test_every_setting_runs(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    command = bench("retrofit_slots")
    real = torch.arange(6) < torch.tensor([[6], [4], [5]])
    data = command.Data(
        hidden=torch.randn(3, 6, tiny.WIDTH, generator=torch.Generator().manual_seed(0)),
        real=real,
        answers=real & (torch.arange(6) > 1),
        targets=tiny.tokens(3, 6),
        text=torch.randn(1, 7, tiny.WIDTH),
        text_targets=tiny.tokens(1, 7)[0],
    )
    monkeypatch.setattr(command, "prepare", lambda _: (tiny.llama().requires_grad_(False), data))
    monkeypatch.setattr(command, "OPTIONS", {"heads": 2, "topk": 4, "key_dim": 8})
    monkeypatch.setattr(command, "KEYS", 8)
    path = tmp_path / "slots.json"
    command.main(["--settings", *command.SETTINGS, "--seeds", "0", "--steps", "3", "--json", str(path)])
    rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == list(command.SETTINGS)
    for row in rows.values():
        assert [len(step["slots"]) for step in row["course"]] == [2] * 3
        assert row["slots_before"] == row["course"][0]["slots"]
        assert 0 < row["loss"] < row["course"][0]["loss"]
    assert rows["frozen keys"]["slots_before"] == rows["plain"]["slots_before"]
    assert rows["frozen keys"]["slots_after"][0] == rows["frozen keys"]["slots_before"][0]
    assert rows["calibrated"]["slots_before"][0] > rows["plain"]["slots_before"][0]
    assert f"plain (seed 0): slots {rows['plain']['slots_before'][0]} / " in capsys.readouterr().out


def test_the_spread_loss(bench: Any) -> None:
    """It is zero for keys that all tokens use alike, and log √N where all use one."""
    from memrewrite.layers.product_keys import ProductKeys

    keys = ProductKeys(6, 8, heads=2, topk=2, key_dim=4)
    keys.reset_parameters(torch.Generator().manual_seed(0))
    loss, x = bench("retrofit_slots").spread_loss, torch.randn(50, 6)
    with torch.no_grad():
        q, half_keys = keys.query(x).view(50, 4, 2), keys.keys.flatten(0, 1)
        shares = [(q[:, half] @ half_keys[half].T).softmax(-1).mean(0) for half in range(4)]
        entropy = torch.special.entr(torch.stack(shares)).sum(-1).mean()
        assert float(loss(keys, x)) == pytest.approx(math.log(8) - float(entropy), abs=1e-6)
        keys.query.weight.zero_()
        assert float(loss(keys, x)) == pytest.approx(0.0, abs=1e-6)
        keys.query.bias.fill_(1e4)
        assert float(loss(keys, x)) == pytest.approx(math.log(8), abs=1e-5)
