"""What the recorder notes of one forward: every call, and the first inputs of repeated blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memrewrite.passes.models.call_recorder import Call, Recorder

X, IDS, MASK = torch.randn(2, 3), torch.ones(2).long(), torch.ones(2)


class Echo(nn.Module):
    """Returns what `give` makes of its arguments."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.give = give

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.give(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "give", "call"),
    [
        ((X,), {}, lambda x: x, Call(0, True, ((2, 3),), None)),
        ((), {"x": X}, lambda x: x, Call("x", True, ((2, 3),), None)),
        ((X, 2), {}, lambda x, n: (x, None), Call(0, False, ((2, 3), None), 2)),
        ((X, IDS), {}, lambda x, ids: x, Call(0, False, ((2, 3),), None)),
        ((IDS,), {}, lambda ids: ids, Call(0, True, ((2,),), None)),
        ((X, MASK), {}, lambda x, mask: x, Call(None, False, ((2, 3),), None)),
        (([X],), {}, lambda xs: xs[0], Call(None, True, ((2, 3),), None)),
        ((), {}, lambda: {"x": X}, Call(None, False, (None,), 1)),
    ],
    ids=["by position", "by keyword", "a tuple", "with token ids", "token ids alone", "two tensors", "in a list", "no tensor"],
)
def test_a_call(args: tuple[Any, ...], kwargs: dict[str, Any], give: Any, call: Call) -> None:
    model = Echo(give)
    with Recorder(model) as recorder:
        model(*args, **kwargs)
    assert recorder.calls == {"": (call,)}


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_the_first_inputs_of_blocks_are_copied() -> None:
    block = Doubles()
    model = Echo(nn.Sequential(block, Doubles(), nn.Sequential(block)))
    with Recorder(model, also={"give.2.0"}) as recorder:
        model(torch.ones(2))
    inputs = {path: args[0].tolist() for path, (args, _) in recorder.block_inputs.items()}
    assert inputs == {"give.0": [1, 1], "give.1": [2, 2], "give.2": [4, 4], "give.2.0": [1, 1]}  # 2.0 is the module 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
