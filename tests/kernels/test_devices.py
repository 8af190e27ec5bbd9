"""The operators compiled, and captured as a CUDA graph: on the CPU in `make test`, on CUDA under the marker `gpu`."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from devices import DEVICES, graphed
from torch import Tensor

from memrewrite.kernels import ops


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Both(torch.nn.Module):
    """Top-k with its softmax, then the lookup."""

    def forward(self, values: Tensor, scores1: Tensor, scores2: Tensor) -> Tensor:
        weights, slots = ops.product_key_topk(scores1, scores2, 7, softmax=True)
        return ops.sparse_lookup(values, slots, weights)


def inputs(device: str, t: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((400, 20), (t, 20), (t, 20))
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("t", [5, 63, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_top_k_is_the_eager_one(device, dtype, t):
    """Replayed on other scores, bit for bit: with plans for few and for many rows."""
    still, fresh = (inputs(device, t, dtype, seed) for seed in (0, 1))
    with torch.no_grad():
        replay = graphed(lambda: ops.product_key_topk(*still[1:], 7, softmax=True), device)
        for one, other in zip(still, fresh, strict=True):
            one.copy_(other)
        got, want = replay(), ops.product_key_topk(*fresh[1:], 7, softmax=True)
    for one, right in zip(got, want, strict=True):
        assert one.device.type == device
        assert torch.equal(one, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_lookup_and_its_gradients_are_the_eager_ones(device, dtype):
    still, fresh = (inputs(device, 63, dtype, seed) for seed in (0, 1))

    def run(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(Both()(*leaves).float().square().sum(), leaves)

    replay = graphed(lambda: run(still), device)
    with torch.no_grad():
        for one, other in zip(still, fresh, strict=True):
            one.copy_(other)
    for got, want in zip(replay(), run(fresh), strict=True):
        assert got.device.type == device
        assert torch.equal(got, want)


def test_one_compiled_graph_serves_every_number_of_tokens(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(Both(), fullgraph=True, dynamic=True, backend=counter)
    for t in (63, 5, 1030):
        given = inputs(device, t, torch.float32)
        got, want = compiled(*given), Both()(*given)
        assert got.device.type == device
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), given) for out in (got, want)))
    assert counter.frame_count == 1
