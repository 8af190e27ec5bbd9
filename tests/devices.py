"""The devices that a test runs on: the CPU in `make test`, CUDA under the marker `gpu` in `make test-gpu`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason=f"torch {torch.__version__} sees no CUDA device, or Triton is interpreted"),
)
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=GPU)]


def graphed(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`run` as a CUDA graph: a call replays it and returns the outputs of the capture. On the CPU, `run` itself."""
    if device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return kept

    return replay
