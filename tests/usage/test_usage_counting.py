"""`memrewrite.watch`: counts equal a count by hand in every mode that a model runs in, and nothing is left when it ends."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_layers import layer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite.errors import ModelError, UserError
from memrewrite.kernels import read_counts
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.product_keys import ProductKeys
from memrewrite.usage.watch import Usage


class ByHand:
    """What hooks on the product keys see: reads and weights per slot, entropy and tokens of every module, in Python numbers."""

    def __init__(self) -> None:
        self.reads: Counter[int] = Counter()
        self.weight: Counter[int] = Counter()
        self.entropy, self.rows = 0.0, 0

    def __call__(self, keys: nn.Module, _: Any, out: tuple[Tensor, Tensor]) -> None:
        slots, weights = (t.detach().reshape(-1) for t in out)
        for slot, weight in zip(slots.tolist(), weights.double().tolist(), strict=True):
            self.reads[slot] += 1
            self.weight[slot] += weight
            self.entropy -= weight * torch.tensor(weight).double().log().item() if weight else 0.0
        self.rows += len(slots) // keys.topk


@contextmanager
def by_hand(model: nn.Module) -> Iterator[dict[str, ByHand]]:
    """A count of every layer, by the layer's path."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, ProductKeys):
            found[name.removesuffix(".product_keys")] = counted = ByHand()
            handles.append(module.register_forward_hook(counted))
    yield found
    for handle in handles:
        handle.remove()


def assert_equal(usage: Usage, expected: dict[str, ByHand]) -> None:
    assert list(usage.reads) == list(expected)
    statistics = {layer.layer: layer for layer in usage.statistics().layers}
    for name, hand in expected.items():
        slots = len(usage.reads[name])
        assert usage.reads[name].tolist() == [hand.reads[n] for n in range(slots)]
        torch.testing.assert_close(usage.weight[name], torch.tensor([float(hand.weight[n]) for n in range(slots)]).double())
        if hand.rows:
            assert statistics[name].entropy == pytest.approx(hand.entropy / hand.rows, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------------ exact


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["memory_plus", "pkm", "peer"]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 9),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.booleans(),
)
def test_counts_equal_a_count_by_hand(kind: str, keys: int, heads: int, topk: int, batches: list[int], training: bool) -> None:
    model = layer(kind, keys, heads, min(topk, keys)).train(training)
    with by_hand(model) as expected, memrewrite.watch(model) as usage:
        for seed, tokens in enumerate(batches):
            model(torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)))
    assert_equal(usage, {"(root)": next(iter(expected.values()))})
    assert usage.statistics().layers[0].tokens == sum(batches)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "albert", "loose", "shared"])
@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_every_layer_of_a_rewritten_model_is_counted(name: str, placement: str) -> None:
    model, inputs = tiny.rewritten(name, placement)
    with by_hand(model) as expected, memrewrite.watch(model) as usage, torch.inference_mode():
        model(**inputs)
        model(**inputs)
    assert_equal(usage, expected)
    assert all(layer.pool == "shared" for layer in usage.statistics().layers)


def test_counts_in_inference_mode_and_outside_add_up() -> None:
    model, x = layer(), torch.randn(4, 8)
    with torch.inference_mode(), memrewrite.watch(model) as usage:
        model(x)
        with torch.inference_mode(False):
            model(x.clone())
    assert usage.statistics().layers[0].tokens == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = layer().to(dtype)
    with by_hand(model) as expected, memrewrite.watch(model) as usage, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(7, 8, dtype=dtype))
    assert_equal(usage, {"(root)": next(iter(expected.values()))})


@pytest.mark.parametrize("gate", ["swilu", "sigmoid"])
def test_the_gate_is_what_multiplies_the_values(gate: str) -> None:
    model, x = layer(gate=gate), torch.randn(2, 3, 8)
    with memrewrite.watch(model) as usage:
        model(x)
    made = nn.functional.linear(x.double(), model.gate.weight.double(), model.gate.bias.double())  # type: ignore[union-attr,arg-type]
    factor = made * made.sigmoid() if gate == "swilu" else made.sigmoid()
    assert usage.statistics().layers[0].gate_rms == pytest.approx(factor.square().mean().sqrt().item(), rel=1e-5)


def test_the_gate_of_peer_is_the_activation_of_every_expert_read() -> None:
    model, x = layer("peer"), torch.randn(2, 3, 8)
    with memrewrite.watch(model) as usage:
        model(x)
    slots, _ = model.product_keys(x.view(6, 8))  # type: ignore[operator]
    rows = model.pool.inputs.values.detach().double()[slots]  # type: ignore[union-attr]
    gate = nn.functional.gelu((rows * x.view(6, 1, 8)).sum(-1))
    assert usage.statistics().layers[0].gate_rms == pytest.approx(gate.square().mean().sqrt().item(), rel=1e-5)


def test_pkm_has_no_gate() -> None:
    model = layer("pkm")
    with memrewrite.watch(model) as usage:
        model(torch.randn(3, 8))
    assert usage.statistics().layers[0].gate_rms is None


# --------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_checkpointing_repeats_counts_once(reentrant: bool) -> None:
    model, x = layer().train(), torch.randn(6, 8, requires_grad=True)
    with memrewrite.watch(model) as usage, by_hand(model) as expected:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert expected["product_keys"].rows == 2 * 6 * 2  # the forward ran twice
    assert usage.statistics().layers[0].tokens == 6


def test_gradients_are_the_same_while_it_counts() -> None:
    model, inputs = tiny.rewritten("llama")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with memrewrite.watch(model) as usage:
        watched = gradients()
    assert all(map(torch.equal, plain, watched))
    assert usage.statistics().layers[0].tokens == 10


def test_under_torch_func() -> None:
    model, x = layer(), torch.randn(4, 3, 8)
    with memrewrite.watch(model) as usage:
        torch.func.grad(lambda x: model(x).sum())(x)
        torch.func.vmap(model)(x)
        torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x)
        torch.func.jvp(model, (x,), (x,))
    assert usage.statistics().layers[0].tokens == 4 * 12
    with memrewrite.watch(model) as plain:
        model(x)
    assert torch.equal(usage.reads["(root)"], 4 * plain.reads["(root)"])


# ------------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_compiles_once_more_and_goes_back(backend: str) -> None:
    torch._dynamo.reset()
    model, inputs = tiny.rewritten("llama")
    compiler = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    compiled(**inputs)
    assert compiler.frame_count == 1
    with by_hand(model) as expected:  # the hooks are compiled into another graph, which the watched one must not disturb
        model(**inputs)
    for _ in range(3):
        with memrewrite.watch(model) as usage:
            compiled(**inputs)
        assert_equal(usage, expected)
        compiled(**inputs)
    assert compiler.frame_count == 2
    assert_equal(usage, expected)
    graphs = [[str(n.target) for n in g.graph.nodes if n.op == "call_function"] for g in compiler.graphs]
    assert [sum("count_" in op for op in ops) for ops in graphs] == [0, 6]
    assert [op for op in graphs[1] if "count_" not in op] == graphs[0]


def test_a_watched_module_by_its_compiled_wrapper_has_the_same_names() -> None:
    model, inputs = tiny.rewritten("llama")
    compiled = torch.compile(model, backend="eager")
    with memrewrite.watch(compiled) as usage:
        compiled(**inputs)
    assert list(usage.reads) == [f"model.layers.{i}.mlp" for i in range(3)]
    assert usage.statistics().layers[0].tokens == 10


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_with_checkpointing_counts_once(backend: str) -> None:
    torch._dynamo.reset()
    model, x = layer().train(), torch.randn(6, 8, requires_grad=True)
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend=backend)
    with memrewrite.watch(model) as usage:
        compiled(x).sum().backward()
        compiled(x).sum().backward()
    with memrewrite.watch(model) as plain:
        model(x)
    assert torch.equal(usage.reads["(root)"], 2 * plain.reads["(root)"])
    assert usage.statistics().layers[0].gate_rms == pytest.approx(plain.statistics().layers[0].gate_rms, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ nothing when off


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def operators(call: Callable[[], object]) -> list[str]:
    with Operators() as seen:
        call()
    return seen.names


def test_nothing_runs_and_nothing_is_left_when_off() -> None:
    model, inputs = tiny.rewritten("llama")
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    before = operators(lambda: model(**inputs))
    with memrewrite.watch(model):
        during = operators(lambda: model(**inputs))
    assert operators(lambda: model(**inputs)) == before
    assert [name for name in during if "count_" not in name] == before
    assert len(during) == len(before) + 2 * 3  # reads and gate of three layers
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes


def test_an_exported_program_never_counts() -> None:
    model, inputs = tiny.rewritten("modular")
    nodes = lambda: [str(n.target) for n in torch.export.export(model, (), inputs).graph.nodes]  # noqa: E731
    before = nodes()
    with memrewrite.watch(model) as usage:
        assert nodes() == before
    assert usage.statistics().layers[0].tokens == 0
    assert nodes() == before


def test_the_operators_are_registered_by_the_first_watch() -> None:
    import subprocess
    import sys

    code = (
        "import torch, memrewrite.layers.kinds; from memrewrite.kernels import ops;"
        "print(hasattr(torch.ops.memrewrite, 'count_reads_'), hasattr(torch.ops.memrewrite, 'sparse_lookup'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_an_error_inside_of_the_block_ends_the_watch() -> None:
    model = layer()
    with pytest.raises(RuntimeError, match="mine"), memrewrite.watch(model):
        raise RuntimeError("mine")
    assert model.counter is None
    with memrewrite.watch(model):
        pass


def test_a_copy_is_not_watched() -> None:
    model, inputs = tiny.rewritten("llama")
    with memrewrite.watch(model) as usage:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            other(**inputs)
            assert all(m.counter is None for m in other.modules() if isinstance(m, MemoryLayer))
            with memrewrite.watch(other) as theirs:
                other(**inputs)
            assert theirs.statistics().layers[0].tokens == 10
        assert usage.statistics().layers[0].tokens == 0
        model(**inputs)
    assert torch.equal(usage.reads["model.layers.0.mlp"], theirs.reads["model.layers.0.mlp"])


def test_counting_never_waits_for_the_device() -> None:
    """A fake tensor has no values: anything that copies one to the host raises an error."""
    with FakeTensorMode():
        reads, weight, sums = (torch.zeros(n, dtype=d) for n, d in ((9, torch.int64), (9, torch.int64), (2, torch.float64)))
        read_counts.count_reads_(reads, weight, sums, torch.zeros(4, 6, dtype=torch.int64), torch.rand(4, 6))
        read_counts.count_gate_(sums, torch.rand(4, 3))


# ----------------------------------------------------------------------------------------------------- several at a time


def test_forwards_of_several_threads_all_count() -> None:
    model, x = layer(), torch.randn(64, 8)
    with memrewrite.watch(model) as usage:
        threads = [threading.Thread(target=lambda: [model(x) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with memrewrite.watch(model) as once:
        model(x)
    assert torch.equal(usage.reads["(root)"], 80 * once.reads["(root)"])
    assert torch.equal(usage.weight["(root)"], 80 * once.weight["(root)"])


def test_a_model_that_is_watched_already_is_refused() -> None:
    model = layer()
    with memrewrite.watch(model) as usage:
        with pytest.raises(ModelError, match="watched already"), memrewrite.watch(model):
            pass
        model(torch.randn(3, 8))
    assert usage.statistics().layers[0].tokens == 3


def test_merge_adds_and_reset_clears() -> None:
    model = layer()
    with memrewrite.watch(model) as a:
        model(torch.randn(3, 8))
    with memrewrite.watch(model) as b:
        model(torch.randn(5, 8))
    total = {name: a.reads[name] + b.reads[name] for name in a.reads}
    a.merge(b)
    assert torch.equal(a.reads["(root)"], total["(root)"])
    assert a.statistics().layers[0].tokens == 8
    with memrewrite.watch(layer(keys=6)) as other:
        pass
    with pytest.raises(UserError, match="two different models"):
        a.merge(other)
    a.reset()
    assert a.statistics().layers[0].reads == 0


# --------------------------------------------------------------------------------------------------------------- bad input


def test_models_that_cannot_be_watched() -> None:
    with pytest.raises(ModelError, match="no memory layers"), memrewrite.watch(tiny.modular()):
        pass
    with pytest.raises(ModelError, match="on meta"), memrewrite.watch(layer().to("meta")):
        pass
