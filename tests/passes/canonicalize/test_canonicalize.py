"""Canonical graphs: every product with a weight is a `linear`, casts and copies are dropped, and the results stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import BATCH, FAMILIES, HIDDEN, TOKENS, D, states
from torch import Tensor, fx, nn
from torch.nn import functional as F

from memrewrite.passes.canonicalize.canonicalize import ORIGIN, PASSES, canonicalize
from memrewrite.passes.capture.capture import capture
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.dataflow import LITERAL, WEIGHT, Dataflow
from memrewrite.passes.graphs.ops import op_name

ATOL = 1e-5


class Written(nn.Module):
    """`how(x, up, across, bias)` of an input and its weights: [HIDDEN, D], [D, HIDDEN] and [HIDDEN]."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(HIDDEN, D)), nn.Parameter(torch.randn(D, HIDDEN))
        self.b, self.how = nn.Parameter(torch.randn(HIDDEN)), how

    def forward(self, *xs: Tensor) -> Tensor:
        return self.how(*xs, self.w, self.v, self.b)


def canonical(model: nn.Module, *inputs: Tensor) -> tuple[Segment, fx.Graph]:
    (segment,) = capture(model.eval(), inputs).segments
    return segment, canonicalize(segment.graph, segment.weights, segment.literals)


def names(graph: fx.Graph) -> list[str]:
    return [op_name(node) for node in graph.nodes if node.op == "call_function"]


class Interpreter(fx.Interpreter):
    """Runs a canonical graph, which has no `contiguous`: a view may have to copy."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        reshaping = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
        return super().call_function(reshaping, args, kwargs)


def computed(model: nn.Module, segment: Segment, graph: fx.Graph, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a canonical graph for real tensors."""
    given = iter(inputs)
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    read = [node.meta for node in graph.find_nodes(op="placeholder")]
    values = [held[m[WEIGHT]] if WEIGHT in m else m[LITERAL] if LITERAL in m else next(given) for m in read]
    with torch.no_grad():
        return Interpreter(fx.GraphModule({}, graph)).run(*values)


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, D)


def conv(x: Tensor, w: Tensor, b: Tensor | None, **options: Any) -> Tensor:
    return F.conv1d(x.transpose(1, 2), w.unsqueeze(-1), b, **options).transpose(1, 2)


def image(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x.transpose(1, 2).unsqueeze(-1), w[..., None, None], b).squeeze(-1).transpose(1, 2)


LINEAR_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, v, b: F.linear(x, w, b),
    "addmm and views": lambda x, w, v, b: torch.addmm(b, rows(x), v).view(*x.shape[:2], HIDDEN),
    "addmm of a transposed weight": lambda x, w, v, b: torch.addmm(b, rows(x), w.t()).view(*x.shape[:2], HIDDEN),
    "product with a weight": lambda x, w, v, b: x @ v,
    "product with a transposed weight": lambda x, w, v, b: x @ w.T,
    "product with swapped axes": lambda x, w, v, b: x.matmul(w.transpose(0, 1)) + b,
    "product with .mT": lambda x, w, v, b: x @ w.mT,
    "mm": lambda x, w, v, b: torch.mm(rows(x), v),
    "einsum": lambda x, w, v, b: torch.einsum("btd,df->btf", x, v),
    "einsum, transposed": lambda x, w, v, b: torch.einsum("btd,fd->btf", x, w),
    "einsum, weight first": lambda x, w, v, b: torch.einsum("df,btd->btf", v, x),
    "einsum, ellipsis": lambda x, w, v, b: torch.einsum("...d, fd -> ...f", x, w) + b,
    "1d convolution": lambda x, w, v, b: conv(x, w, b),
    "1d convolution, no bias": lambda x, w, v, b: conv(x, w, None),
    "1d convolution, padding by name": lambda x, w, v, b: conv(x, w, b, padding="same"),
    "2d convolution": lambda x, w, v, b: image(x, w, b),
    "separate bias": lambda x, w, v, b: F.linear(x, w) + b,
    "separate bias first": lambda x, w, v, b: b + x @ v,
    "separate bias, in place": lambda x, w, v, b: (x @ v).add_(b),
    "weight scaled": lambda x, w, v, b: F.linear(x, w * 0.5, b),
    "weight sliced": lambda x, w, v, b: F.linear(x, torch.cat([w, w])[HIDDEN:], b),
    "a batch of one weight": lambda x, w, v, b: torch.bmm(x, v.expand(x.shape[0], -1, -1)),
    "a batch of one weight, repeated": lambda x, w, v, b: x @ v.repeat(x.shape[0], 1, 1),
    "a batch of one": lambda x, w, v, b: x @ v[None],
    "baddbmm": lambda x, w, v, b: torch.baddbmm(b, x, v.expand(x.shape[0], -1, -1)),
    "baddbmm of a batch of biases": lambda x, w, v, b: torch.baddbmm(b.expand(BATCH, TOKENS, -1), x, v.expand(BATCH, -1, -1)),
    "addmm with factors": lambda x, w, v, b: torch.addmm(b, rows(x), v, beta=2, alpha=0.5),
    "weight first": lambda x, w, v, b: (w @ x.mT).mT,
    "weight first, with a bias": lambda x, w, v, b: (w @ x.mT + b[:, None]).mT,
    "weight first, a token at a time": lambda x, w, v, b: (w @ x.unsqueeze(-1)).squeeze(-1),
    "weight first, addmm": lambda x, w, v, b: torch.addmm(b[:, None], w, rows(x).t()).t(),
    "mv": lambda x, w, v, b: torch.mv(w, x[0, 0]) + b,
    "inner": lambda x, w, v, b: torch.inner(x, w) + b,
    "tensordot": lambda x, w, v, b: torch.tensordot(x, v, dims=1) + b,
    "tensordot, weight first": lambda x, w, v, b: torch.tensordot(w, x, dims=([1], [2])).permute(1, 2, 0),
    "einsum, implicit": lambda x, w, v, b: torch.einsum("abc,cd", x, v),
    "einsum, features second": lambda x, w, v, b: torch.einsum("btd,df->bft", x, v),
    "einsum, features first": lambda x, w, v, b: torch.einsum("btd,fd->fbt", x, w),
    "einsum of features second": lambda x, w, v, b: torch.einsum("bdt,df->btf", x.mT, v),
    "einsum to heads": lambda x, w, v, b: torch.einsum("btd,dhf->bthf", x, v.unflatten(1, (4, -1))),
    "einsum of heads": lambda x, w, v, b: torch.einsum("bthd,hdf->btf", x.unflatten(-1, (4, -1)), v.unflatten(0, (4, -1))),
    "einsum with two matrices": lambda x, w, v, b: torch.einsum("btd,cdf->cbtf", x, torch.stack([v, v * 2])),
    "over tokens": lambda x, w, v, b: torch.einsum("btd,st->bsd", x, w[:TOKENS, :TOKENS]),
    "over tokens, by product": lambda x, w, v, b: w[:TOKENS, :TOKENS] @ x,
    "3d convolution": lambda x, w, v, b: F.conv3d(x.mT[..., None, None], w[..., None, None, None], b),
    "transposed convolution": lambda x, w, v, b: F.conv_transpose1d(x.mT, v.unsqueeze(-1), b),
    "grouped convolution": lambda x, w, v, b: conv(x, w[:, : D // 2], b, groups=2),
    "summed slices": lambda x, w, v, b: sum(x[..., i : i + 8] @ v[i : i + 8] for i in range(0, D, 8)) + b,
    "summed chunks": lambda x, w, v, b: sum(a @ c for a, c in zip(x.chunk(2, -1), v.chunk(2), strict=True)),
    "summed with zeros": lambda x, w, v, b: x.new_zeros(BATCH, TOKENS, HIDDEN) + x[..., :9] @ v[:9] + x[..., 9:] @ v[9:],
    "concatenated": lambda x, w, v, b: torch.cat([x @ v[:, :9], x @ v[:, 9:]], -1),
    "concatenated, with biases": lambda x, w, v, b: torch.cat([F.linear(x, w[:9], b[:9]), F.linear(x, w[9:], b[9:])], -1),
    "low rank": lambda x, w, v, b: F.linear(F.linear(x, w[:4], b[:4]), w[:, :4], b),
    "and a low-rank change": lambda x, w, v, b: F.linear(x, w, b) + 0.5 * (x @ v[:, :4] @ v[:4]),
    "and a low-rank change, scaled by a weight": lambda x, w, v, b: x @ v[:, :4] @ v[:4] * b[:1] + F.linear(x, w),
    "weight in another type": lambda x, w, v, b: F.linear(x, w.double().to(x.dtype), b),
}
SQUARE = nn.Parameter(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))
OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {  # products that are no linear
    "two activations": lambda x, w, v, b: x @ x.transpose(1, 2),
    "wide convolution": lambda x, w, v, b: F.conv1d(x.transpose(1, 2), w.view(-1, D, 1).expand(-1, -1, 3).contiguous()),
    "strided convolution": lambda x, w, v, b: conv(x, w, b, stride=2),
    "padded convolution": lambda x, w, v, b: conv(x, w, b, padding=1),
    "depthwise convolution": lambda x, w, v, b: conv(x, w[:D, :1], None, groups=D),
    "a batch of weights": lambda x, w, v, b: torch.bmm(x, torch.stack([v, v * 2])),
    "a weight for each head": lambda x, w, v, b: torch.einsum(
        "bthd,hdf->bthf", x.unflatten(-1, (4, 8)), v.unflatten(0, (4, 8))
    ),
    "a weight for each expert": lambda x, w, v, b: torch.einsum("btd,edf->btef", x, torch.stack([v, v, v])),
    "one weight for many batches": lambda x, w, v, b: x[:1] @ v.expand(3, -1, -1),
    "a sum of another": lambda x, w, v, b: torch.addmm(rows(x), rows(x), SQUARE),
    "einsum of two activations": lambda x, w, v, b: torch.einsum("btd,btd->btd", x, x * 2),
}


PRODUCTS = {"addmm", "mm", "bmm", "matmul", "einsum", "conv1d", "conv2d", "add", "add_", "baddbmm", "tensordot", "inner", "mv"}


@pytest.mark.parametrize("name", LINEAR_FORMS)
def test_every_form_becomes_one_linear(name: str) -> None:
    model = Written(LINEAR_FORMS[name])
    _, graph = canonical(model, states())
    flow = Dataflow(graph)
    (linear,) = [node for node in graph.nodes if op_name(node) == "linear"]
    assert flow.is_linear(linear)
    assert not PRODUCTS & {op_name(node) for node in graph.nodes if node not in flow.constant}


@pytest.mark.parametrize("name", [*LINEAR_FORMS, *OTHERS])
def test_the_canonical_graph_computes_the_same(name: str) -> None:
    model = Written({**LINEAR_FORMS, **OTHERS}[name])
    segment, graph = canonical(model, states())
    (result,) = computed(model, segment, graph, (states(),))
    assert torch.allclose(result, model(states()), atol=ATOL)


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_stay(name: str) -> None:
    _, graph = canonical(Written(OTHERS[name]), states())
    assert "linear" not in names(graph)


@pytest.mark.parametrize("name", ["separate bias", "separate bias first", "separate bias, in place", "addmm and views"])
def test_the_bias_becomes_the_bias_of_the_linear(name: str) -> None:
    _, graph = canonical(Written(LINEAR_FORMS[name]), states())
    (linear,) = [node for node in graph.nodes if op_name(node) == "linear"]
    assert linear.args[2].meta[WEIGHT] == "b"


@pytest.mark.parametrize(
    "how",
    [
        lambda x, w, v, b: (x @ v) + b.view(HIDDEN, 1)[:TOKENS],  # one number a token
        lambda x, w, v, b: torch.add(x @ v, b, alpha=2),
        lambda x, w, v, b: F.linear(x, w, b) + b,  # it has a bias already
    ],
    ids=["a bias of tokens", "a scaled bias", "a second bias"],
)
def test_other_sums_stay_sums(how: Callable[..., Tensor]) -> None:
    model = Written(how)
    segment, graph = canonical(model, states())
    assert names(graph).count("add") == 1
    assert torch.allclose(computed(model, segment, graph, (states(),))[0], model(states()), atol=ATOL)


def test_the_bias_of_a_product_that_is_read_twice_stays_an_add() -> None:
    def how(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        product = x @ v
        return (product + b) * product

    model = Written(how)
    segment, graph = canonical(model, states())
    assert names(graph).count("add") == 1
    assert torch.allclose(computed(model, segment, graph, (states(),))[0], model(states()), atol=ATOL)


# -------------------------------------------------------------------------------------------------- ops that return their input

IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "to another type and back": lambda h: h.double().to(torch.float32),
    "to its own type": lambda h: h.to(h.dtype, copy=True),
    "clone": lambda h: h.clone(),
    "contiguous": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "detach": lambda h: h.detach(),
    "alias": lambda h: torch.ops.aten.alias(h),
    "dropout": lambda h: F.dropout(h, 0.5, False),
    "dropout of nothing": lambda h: F.dropout(h, 0.0, True),
    "native dropout": lambda h: torch.native_dropout(h, 0.5, False)[0],
    "feature dropout": lambda h: F.dropout1d(h, 0.5, False),
    "type of another": lambda h: h.type_as(h.float()),
}
LAID = {"transpose", "linear"}


@pytest.mark.parametrize("name", IDENTITIES)
def test_ops_that_return_their_input_are_dropped(name: str) -> None:
    model = Written(lambda x, w, v, b: IDENTITIES[name](F.linear(x, w, b)))
    segment, graph = canonical(model, states())
    assert set(names(graph)) <= LAID
    assert torch.allclose(computed(model, segment, graph, (states(),))[0], model(states()), atol=ATOL)


def test_assertions_are_dropped() -> None:
    def how(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        torch._assert_async(x.isfinite().all(), "finite")
        return F.linear(x.to(torch.float64).to(torch.float32), w, b)

    segment, graph = canonical(Written(how), states())
    assert any(op_name(node).startswith("_assert") for node in segment.graph.nodes)
    assert not any(op_name(node).startswith("_assert") for node in graph.nodes)


# ------------------------------------------------------------------------------------------------------------- in place


def half(x: Tensor) -> Tensor:
    return F.linear(x, SQUARE)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda x: half(x).add_(x),
    "mul_ and read again": lambda x: (h := half(x)).mul_(2) + h,
    "relu_": lambda x: F.relu(half(x), inplace=True),
    "written twice": lambda x: half(x).add_(1).mul_(3).relu_(),
    "+= of a name": lambda x: _plus_equal(x),
    "through a view": lambda x: _through_view(x),
    "through two views": lambda x: _through_two_views(x),
}


def _plus_equal(x: Tensor) -> Tensor:
    h = half(x)
    kept = h * 2
    h += x
    return h * kept


def _through_view(x: Tensor) -> Tensor:
    h = half(x)
    h.view(-1, D).add_(1.0)
    return h * 2


def _through_two_views(x: Tensor) -> Tensor:
    h = half(x)
    flat = h.view(-1)
    flat.view(-1, D).mul_(2.0)
    return h + 1


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_ops_become_functional(name: str) -> None:
    model = Written(lambda x, w, v, b: IN_PLACE[name](x))
    _, graph = canonical(model, states())
    assert not any(op.endswith("_") and not op.startswith("_") for op in names(graph))


@pytest.mark.parametrize("name", [name for name in IN_PLACE if "view" not in name])
def test_nodes_after_an_in_place_op_read_its_result(name: str) -> None:
    model = Written(lambda x, w, v, b: IN_PLACE[name](x))
    segment, graph = canonical(model, states())
    assert torch.allclose(computed(model, segment, graph, (states(),))[0], model(states()), atol=ATOL)


@pytest.mark.parametrize("name", ["through a view", "through two views"])
def test_an_in_place_op_on_a_view_changes_the_whole_tensor(name: str) -> None:
    """The dataflow is right; the shape is that of the view, which later passes look through."""
    _, graph = canonical(Written(lambda x, w, v, b: IN_PLACE[name](x)), states())
    (output,) = [node for node in graph.nodes if node.op == "output"]
    seen, pending = set[str](), list(output.all_input_nodes)
    while pending:
        node = pending.pop()
        seen.add(op_name(node))
        pending.extend(node.all_input_nodes)
    assert {"view", "linear"} < seen
    assert seen & {"add", "mul"}


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize(
    "name", ["gpt2", "falcon", "gptj", "albert", "swin", "bert, chunked", "einsum", "1×1 convolutions", "tied"]
)
def test_a_whole_model_computes_the_same(name: str) -> None:
    model, given = FAMILIES[name].build(), FAMILIES[name].inputs()
    inputs = tuple(given.values()) if isinstance(given, dict) else given
    (segment,) = capture(model, given).segments
    result = computed(model, segment, canonicalize(segment.graph, segment.weights, segment.literals), inputs)
    with torch.no_grad():
        wanted = model(**given) if isinstance(given, dict) else model(*given)
    assert torch.allclose(result[0], wanted if isinstance(wanted, Tensor) else wanted[0], atol=1e-4)


def test_every_node_names_the_recorded_node_that_it_represents() -> None:
    segment, graph = canonical(FAMILIES["einsum"].build(), *FAMILIES["einsum"].inputs())
    recorded = set(segment.graph.nodes)
    made = [node.meta[ORIGIN] for node in graph.nodes if ORIGIN in node.meta]
    assert set(made) <= recorded
    assert len(set(made)) == len(made)  # no two represent the same
    assert all(ORIGIN in node.meta for node in graph.nodes if op_name(node) == "linear")


def test_the_passes_run_one_by_one_on_other_graphs_too() -> None:
    segment, _ = canonical(Written(LINEAR_FORMS["einsum"]), states())
    module = torch.export.export(Written(LINEAR_FORMS["separate bias"]), (states(),)).module(check_guards=False)
    results = [step()(module) for step in PASSES]
    assert all(isinstance(result.graph_module, fx.GraphModule) for result in results)
    assert segment.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)  # still


def test_shapes_are_known_throughout() -> None:
    _, graph = canonical(FAMILIES["1×1 convolutions"].build(), *FAMILIES["1×1 convolutions"].inputs())
    assert all("val" in node.meta for node in graph.nodes if node.op == "call_function")
    linears = [node for node in graph.nodes if op_name(node) == "linear"]
    assert [tuple(node.meta["val"].shape) for node in linears] == [(1, 8, 8, HIDDEN), (1, 8, 8, D)]
    assert BATCH > 1
