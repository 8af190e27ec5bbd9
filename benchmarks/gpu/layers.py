"""The Memory+ layer and the SwiGLU MLP that it replaces: forward, training step, decoding; and checks of torch.compile.

The hidden width of the MLP is 3.5 × d_model, as in Llama 3 8B; the ratio is the MLP's time divided by the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import data as data
import torch
import torch._dynamo.utils
from harness import Bench, Case, Result, Run
from lookup import unless_missing
from models import DTYPE, SwiGLU, memory_layer, optimizer_step
from torch import Tensor, nn


def layer_cases(bench: Bench) -> Iterator[Case]:
    """The widest first, where the memory layer should be faster."""
    for dim in dict.fromkeys((bench.sizes.dims[-1], bench.sizes.dims[0])):
        yield Case(f"forward D={dim}", partial(forward, dim=dim, tokens=bench.sizes.tokens))
        yield Case(f"decode D={dim}", partial(forward, dim=dim, tokens=1))
        yield Case(f"step D={dim}", partial(step, dim=dim))


def _keys(bench: Bench, dim: int) -> int:
    return bench.keys_within(bench.sizes.train_keys, dim, 16, 0.6)  # bytes per table entry, all implementations together


def _dense(bench: Bench, dim: int) -> SwiGLU:
    return SwiGLU(dim, dim * bench.sizes.hidden // 2, bench.device)


def forward(bench: Bench, dim: int, tokens: int) -> list[Result]:
    """Without gradients; one token with a CUDA graph, as in serving."""
    keys = _keys(bench, dim)
    memory, dense = memory_layer(bench, dim, keys), _dense(bench, dim)
    x = data.normal(tokens, dim, dtype=DTYPE, device=bench.device)

    def inference(module: Callable[[Tensor], Any]) -> Run:
        def run() -> None:
            with torch.no_grad():
                module(x)

        return bench.graphed(run) if tokens == 1 else run

    runs: dict[str, Run] = {
        "ours": inference(memory),
        "ours, compiled": unless_missing(lambda: inference(bench.compile(memory, fullgraph=True))),
        "dense MLP": inference(dense),
        "dense MLP, compiled": unless_missing(lambda: inference(bench.compile(dense, fullgraph=True))),
    }
    kind = "decode" if tokens == 1 else "forward"
    return [bench.result("layer", f"{kind} T={tokens} D={dim} N={keys}²", bench.race(runs))]


def step(bench: Bench, dim: int) -> list[Result]:
    """Forward, backward and optimizer; ours with fused row-wise Adagrad, and with a dense gradient and AdamW."""
    keys = _keys(bench, dim)
    x = data.normal(bench.sizes.tokens, dim, dtype=DTYPE, device=bench.device)

    def ours(gradient: str, rule: str | None, compiled: bool = False) -> Run:
        return unless_missing(
            lambda: optimizer_step(bench, memory_layer(bench, dim, keys, gradient=gradient), x, rule, compiled)
        )

    runs: dict[str, Run] = {
        "ours": ours("fused", "adagrad"),
        "ours, compiled": ours("fused", "adagrad", True),
        "ours, dense gradient + AdamW": ours("dense", None),
        "dense MLP": optimizer_step(bench, _dense(bench, dim), x),
        "dense MLP, compiled": unless_missing(lambda: optimizer_step(bench, _dense(bench, dim), x, compiled=True)),
    }
    return [bench.result("layer", f"training step T={x.shape[0]} D={dim} N={keys}²", bench.race(runs))]


# ------------------------------------------------------------------------------------------------------- torch.compile


def compile_cases(bench: Bench) -> Iterator[Case]:
    """Checks of torch.compile: no recompilation, and results equal to eager."""
    yield Case("no recompilation when T changes", partial(recompiles, train=False))
    yield Case("no recompilation when T changes, training", partial(recompiles, train=True))
    yield Case("CUDA graphs equal eager", graphs)


def recompiles(bench: Bench, train: bool) -> list[Result]:
    """One dynamic graph must be enough for all numbers of tokens, in the layer's forward or its training step."""
    dim = bench.sizes.dims[0]
    memory = memory_layer(bench, dim, min(_keys(bench, dim), 128))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = bench.compile(memory, fullgraph=True, dynamic=True)
    worst = 0.0
    for tokens in (5, 17, 64, 65, 200) if bench.rehearse else (5, 17, 64, 65, 1000, 4096):
        x = data.normal(tokens, dim, dtype=DTYPE, device=bench.device, seed=tokens).requires_grad_(train)
        with torch.set_grad_enabled(train):
            got, want = compiled(x), memory(x)
        if train:
            got.backward(torch.ones_like(got))
        worst = max(worst, float((got.float() - want.float()).norm().detach() / want.float().norm().detach()))
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    met = made == 1 and worst < 2e-2
    note = f"{made} graph(s) for the numbers of tokens; largest difference from eager {worst:.1e}"
    name = "no recompilation when T changes" + (", training" if train else "")
    return [Result("compile", name, _status(bench), targets=[("1 graph, equal results", met)], note=note)]


def graphs(bench: Bench) -> list[Result]:
    """mode="reduce-overhead" replays CUDA graphs: on new inputs its results must match eager's to the dtype's precision."""
    dim = bench.sizes.dims[0]
    memory = memory_layer(bench, dim, min(_keys(bench, dim), 128))
    torch._dynamo.reset()
    compiled = bench.compile(memory, mode="reduce-overhead", fullgraph=True)
    worst = 0.0
    with torch.no_grad():
        for seed in range(5):
            x = data.normal(64, dim, dtype=DTYPE, device=bench.device, seed=seed)
            got = compiled(x).clone()
            want = memory(x)
            worst = max(worst, float((got.float() - want.float()).norm() / want.float().norm()))
    exact = _captured(bench, memory, dim)
    bits = "the same" if exact else "different"
    note = f"largest difference of reduce-overhead {worst:.1e}; a manually captured graph gives {bits} bits"
    return [
        Result("compile", "CUDA graphs equal eager", _status(bench), targets=[("equal", worst < 2e-2 and exact)], note=note)
    ]


def _captured(bench: Bench, model: nn.Module, dim: int) -> bool:
    """True if a graph that was captured with one input gives the same bits as eager for another input."""
    still, fresh = (data.normal(64, dim, dtype=DTYPE, device=bench.device, seed=s) for s in (20, 21))
    kept: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            kept[:] = [model(still)]

    replay = bench.graphed(run)
    still.copy_(fresh)
    replay()
    with torch.no_grad():
        return torch.equal(kept[0], model(fresh))


def _status(bench: Bench) -> str:
    return "rehearsed" if bench.rehearse else "ok"
