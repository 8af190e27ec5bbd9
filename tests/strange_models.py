"""Models and inputs that are valid in torch and unusual: each builds a model and its example inputs, or is refused by torch.

`STRANGE` maps a name to a function that returns `(model, inputs)`. All contain two MLPs in a residual stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

D = 8


class Block(nn.Module):
    """An MLP, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks; `first` changes the input, and `last` the output."""

    def __init__(self, first: Callable[..., Any] | None = None, last: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.first, self.last, self.calls = first, last, 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        x = self.first(self, *inputs, **named) if self.first else inputs[0]
        for block in self.blocks:
            x = block(x)
        return self.last(self, x) if self.last else x


class Pair(NamedTuple):
    """A structure with names."""

    a: Tensor
    b: Tensor


class Wrapped(Tensor):
    """A subclass of tensors without behaviour of its own."""


class Unpicklable:
    """An input that cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


X = (2, 3, D)
STRANGE: dict[str, Callable[[], tuple[Any, Any]]] = {}


def strange(name: str) -> Callable[[Callable[[], tuple[Any, Any]]], Callable[[], tuple[Any, Any]]]:
    """Register a builder."""

    def register(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        STRANGE[name] = build
        return build

    return register


def _simple(name: str, inputs: Callable[[], Any], first: Any = None, last: Any = None) -> None:
    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        return Net(first, last).eval(), inputs()

    STRANGE[name] = build


def _raise_at(count: int, error: Callable[[], BaseException]) -> Callable[..., Any]:
    def last(model: Net, x: Tensor) -> Tensor:
        if model.calls >= count:
            raise error()
        return x

    return last


def _recursing(model: Net, x: Tensor) -> Tensor:
    return _recursing(model, x)


# ---------------------------------------------------------------------------------------------------------- sizes, layouts

_simple("plain", lambda: (seeded(*X),))
_simple("zero batch", lambda: (seeded(0, 3, D),))
_simple("zero tokens", lambda: (seeded(2, 0, D),))
_simple("zero batch and tokens", lambda: (seeded(0, 0, D),))
_simple("one token without batch", lambda: (seeded(D),))
_simple("one token", lambda: (seeded(1, 1, D),))
_simple("five axes", lambda: (seeded(2, 1, 2, 1, D),))
_simple("wrong width", lambda: (seeded(2, 3, D + 1),))
_simple("zero width", lambda: (seeded(2, 3, 0),))
_simple("scalar", lambda: (torch.tensor(1.0),))
_simple("not contiguous", lambda: (seeded(3, 2, D).transpose(0, 1),))
_simple("expanded", lambda: (seeded(1, 1, D).expand(2, 3, D),))
_simple("strided", lambda: (seeded(2, 3, 2 * D)[..., ::2],))
_simple("overlapping", lambda: (seeded(16).as_strided((2, 3, D), (1, 1, 1)),))
_simple("requires grad", lambda: (seeded(*X).requires_grad_(),))
_simple("with autograd history", lambda: (seeded(*X).requires_grad_() * 2,))
_simple("parameter as input", lambda: (nn.Parameter(seeded(*X)),))
_simple("NaN", lambda: (torch.full(X, torch.nan),))
_simple("infinite", lambda: (torch.full(X, torch.inf),))
_simple("zeros", lambda: (torch.zeros(X),))
_simple("float64 input", lambda: (seeded(*X).double(),))
_simple("float16 input", lambda: (seeded(*X).half(),))
_simple("integer input", lambda: (torch.ones(X, dtype=torch.long),))
_simple("boolean input", lambda: (torch.ones(X, dtype=torch.bool),), lambda m, x: x.float())
_simple("complex input", lambda: (torch.complex(seeded(*X), seeded(*X)),))
_simple("complex input, real part", lambda: (torch.complex(seeded(*X), seeded(*X)),), lambda m, x: x.real)
_simple("conjugate input", lambda: (torch.complex(seeded(*X), seeded(*X)).conj(),), lambda m, x: x.imag)
_simple("negative bit", lambda: (torch.complex(seeded(*X), seeded(*X)).conj().imag,))
_simple("COO input", lambda: (seeded(*X).to_sparse(),), lambda m, x: x.to_dense())
_simple("COO input, not densified", lambda: (seeded(*X).to_sparse(),))
_simple("CSR input", lambda: (seeded(6, D).to_sparse_csr(),), lambda m, x: x.to_dense())
_simple("CSR input, not densified", lambda: (seeded(6, D).to_sparse_csr(),))
_simple("CSC input", lambda: (seeded(6, D).to_sparse_csc(),), lambda m, x: x.to_dense())
_simple("BSR input", lambda: (seeded(6, D).to_sparse_bsr((2, 2)),), lambda m, x: x.to_dense())
_simple("mkldnn input", lambda: (seeded(*X).to_mkldnn(),), lambda m, x: x.to_dense())
_simple("quantized input", lambda: (_quantized(seeded(*X)),), lambda m, x: x.dequantize())
_simple("quantized input, not dequantized", lambda: (_quantized(seeded(*X)),))
_simple("meta input", lambda: (torch.empty(X, device="meta"),))
_simple("subclass input", lambda: (seeded(*X).as_subclass(Wrapped),))
_simple("8-bit float input", lambda: (seeded(*X).to(torch.float8_e4m3fn),), lambda m, x: x.float())


@strange("nested input")
def _nested() -> tuple[Any, Any]:
    return Net().eval(), (torch.nested.nested_tensor([seeded(2, D), seeded(3, D)]),)


@strange("jagged input")
def _jagged() -> tuple[Any, Any]:
    return Net().eval(), (torch.nested.nested_tensor([seeded(2, D), seeded(3, D)], layout=torch.jagged),)


@strange("inference input")
def _inference() -> tuple[Any, Any]:
    with torch.inference_mode():
        return Net().eval().requires_grad_(False), (torch.randn(X),)  # the model, too


@strange("inference input of a normal model")
def _inference_input() -> tuple[Any, Any]:
    model = Net().eval()
    with torch.inference_mode():
        return model, (torch.randn(X),)


@strange("fake input")
def _fake() -> tuple[Any, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return Net().eval(), (FakeTensorMode().from_tensor(seeded(*X)),)


@strange("fake weights")
def _fake_weights() -> tuple[Any, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return Net().eval(), (torch.randn(X),)


@strange("input is a buffer of the model")
def _shared() -> tuple[Any, Any]:
    model = Net().eval()
    model.register_buffer("state", seeded(*X))
    return model, (model.state,)


@strange("input is a view of a weight")
def _view() -> tuple[Any, Any]:
    model = Net().eval()
    return model, (model.blocks[0].up.weight.view(2, 2 * D, D),)


# ---------------------------------------------------------------------------------------------------------- kinds of inputs

_simple("no input", lambda: ())
_simple("empty dict", dict)
_simple("no example inputs", lambda: None)
_simple("a string", lambda: "hello")
_simple("bytes", lambda: b"hello")
_simple("a number", lambda: 3)
_simple("a set", lambda: {1})
_simple("an array", lambda: seeded(*X).numpy())
_simple("a generator", lambda: (seeded(*X) for _ in range(2)))
_simple("a tuple with a generator", lambda: ((row for row in seeded(*X)),), lambda m, x: torch.stack(list(x)))
_simple("a tuple with an iterator", lambda: (iter([seeded(*X)]),), lambda m, x: next(x))
_simple("a tuple with a map", lambda: (map(abs, [seeded(*X)]),), lambda m, x: next(x))
_simple("a tuple with an array", lambda: (seeded(*X).numpy(),), lambda m, x: torch.from_numpy(x))
_simple("a tuple with a string", lambda: (seeded(*X), "mode"), lambda m, x, mode: x)
_simple("a tuple with None", lambda: (seeded(*X), None), lambda m, x, mask: x)
_simple("a tuple of None", lambda: (None,))
_simple("a named tuple", lambda: (Pair(seeded(*X), seeded(*X)),), lambda m, p: p.a + p.b)
_simple("a named tuple as inputs", lambda: Pair(seeded(*X), seeded(*X)), lambda m, a, b: a + b)
_simple("a list of a dict", lambda: [{"x": seeded(*X)}], lambda m, d: d["x"])
_simple("a keyword", lambda: {"x": seeded(*X)}, lambda m, x: x)
_simple("a keyword that is no name", lambda: {"not a name": seeded(*X)}, lambda m, **named: named["not a name"])
_simple("a key that is no string", lambda: {1: seeded(*X)})
_simple("a function", lambda: (seeded(*X), torch.relu), lambda m, x, f: f(x))
_simple("a module", lambda: (seeded(*X), nn.ReLU()), lambda m, x, f: f(x))
_simple("an object", lambda: (seeded(*X), object()), lambda m, x, f: x)
_simple("an object that cannot be copied", lambda: (seeded(*X), Unpicklable()), lambda m, x, f: x)
_simple("too many inputs", lambda: (seeded(*X), seeded(*X)), lambda m, x: x)
_simple("a class", lambda: torch.Tensor)

# ---------------------------------------------------------------------------------------------------------- kinds of outputs

_simple("returns None", lambda: (seeded(*X),), None, lambda m, x: None)
_simple("returns a scalar", lambda: (seeded(*X),), None, lambda m, x: x.sum())
_simple("returns a number", lambda: (seeded(*X),), None, lambda m, x: float(x.sum()))
_simple("returns a string", lambda: (seeded(*X),), None, lambda m, x: "done")
_simple("returns an empty tuple", lambda: (seeded(*X),), None, lambda m, x: ())
_simple("returns a generator", lambda: (seeded(*X),), None, lambda m, x: (row for row in x))
_simple("returns an iterator", lambda: (seeded(*X),), None, lambda m, x: iter([x]))
_simple("returns an array", lambda: (seeded(*X),), None, lambda m, x: x.detach().numpy())
_simple("returns itself", lambda: (seeded(*X),), None, lambda m, x: m)
_simple("returns an object", lambda: (seeded(*X),), None, lambda m, x: object())
_simple("returns a set", lambda: (seeded(*X),), None, lambda m, x: {1})
_simple("returns a named tuple", lambda: (seeded(*X),), None, lambda m, x: Pair(x, x))
_simple("returns a sparse tensor", lambda: (seeded(*X),), None, lambda m, x: x.relu().to_sparse())
_simple("returns a complex tensor", lambda: (seeded(*X),), None, lambda m, x: torch.complex(x, x))
_simple("returns a quantized tensor", lambda: (seeded(*X),), None, lambda m, x: _quantized(x))
_simple("returns a nested tensor", lambda: (seeded(*X),), None, lambda m, x: torch.nested.nested_tensor([x[0], x[1, :2]]))
_simple("returns integers", lambda: (seeded(*X),), None, lambda m, x: x.argmax(-1))
_simple("returns a boolean", lambda: (seeded(*X),), None, lambda m, x: x > 0)
_simple("returns a detached tensor", lambda: (seeded(*X),), None, lambda m, x: x.detach())
_simple("returns its input", lambda: (seeded(*X),), lambda m, x: (setattr(m, "x", x), x)[1], lambda m, x: m.x)
_simple("returns a weight", lambda: (seeded(*X),), None, lambda m, x: m.blocks[0].up.weight)
_simple("returns other structures", lambda: (seeded(*X),), None, lambda m, x: (x,) * (m.calls % 3 + 1))
_simple("returns other sizes", lambda: (seeded(*X),), None, lambda m, x: x[:, : m.calls % 3 + 1])
_simple("returns other dtypes", lambda: (seeded(*X),), None, lambda m, x: x.double() if m.calls % 2 else x)
_simple("returns None the second time", lambda: (seeded(*X),), None, lambda m, x: x if m.calls == 1 else None)

# -------------------------------------------------------------------------------------------------------- forwards that fail

for _count in (1, 2, 3, 5, 8):
    _simple(f"raises at call {_count}", lambda: (seeded(*X),), None, _raise_at(_count, lambda: ValueError("no more")))
    _simple(f"exits at call {_count}", lambda: (seeded(*X),), None, _raise_at(_count, lambda: SystemExit(3)))
_simple("exits without a code", lambda: (seeded(*X),), None, _raise_at(1, SystemExit))
_simple("raises an empty error", lambda: (seeded(*X),), None, _raise_at(1, Exception))
_simple("raises StopIteration", lambda: (seeded(*X),), None, _raise_at(1, StopIteration))
_simple("raises an assertion", lambda: (seeded(*X),), None, _raise_at(2, AssertionError))
_simple("raises MemoryError", lambda: (seeded(*X),), None, _raise_at(1, MemoryError))
_simple("recurses without end", lambda: (seeded(*X),), None, _recursing)
_simple("is random", lambda: (seeded(*X),), None, lambda m, x: x + torch.rand_like(x))
_simple("is random, unseeded", lambda: (seeded(*X),), None, lambda m, x: x + torch.rand(x.shape, generator=_ENTROPY))
_simple("counts its calls", lambda: (seeded(*X),), None, lambda m, x: x + m.calls)
_simple("calls itself", lambda: (seeded(*X),), None, lambda m, x: m(x) if m.calls == 1 else x)
_simple("writes its weights", lambda: (seeded(*X),), None, lambda m, x: (m.blocks[0].up.weight.data.mul_(2), x)[1])
_simple("adds a parameter", lambda: (seeded(*X),), None, lambda m, x: (setattr(m, f"p{m.calls}", nn.Parameter(x)), x)[1])
_simple("frees a weight", lambda: (seeded(*X),), None, lambda m, x: (setattr(m.blocks[0].up, "weight", None), x)[1])
_simple("goes to train mode", lambda: (seeded(*X),), None, lambda m, x: (m.train(), x)[1])
_simple("needs gradients", lambda: (seeded(*X),), None, lambda m, x: torch.autograd.grad(x.sum(), m.blocks[0].up.weight)[0])
_simple("branches on values", lambda: (seeded(*X),), None, lambda m, x: x if x.sum() > 0 else -x)
_simple("sorts on values", lambda: (seeded(*X),), None, lambda m, x: x[x[..., 0] > 0])
_simple("raises on meta and in traces", lambda: (seeded(*X),), None, lambda m, x: x + float(x.sum()))
_simple("is in inference mode", lambda: (seeded(*X),), lambda m, x: _inside(torch.inference_mode, x))
_ENTROPY = torch.Generator()
_ENTROPY.seed()


def _inside(context: Callable[[], Any], x: Tensor) -> Tensor:
    with context():
        return x * 2


# ------------------------------------------------------------------------------------------------------------ kinds of models

_simple("autocast inside", lambda: (seeded(*X),), lambda m, x: _inside(lambda: torch.autocast("cpu"), x))


@strange("no parameters")
def _none() -> tuple[Any, Any]:
    return nn.ReLU(), (seeded(*X),)


@strange("no modules")
def _empty() -> tuple[Any, Any]:
    return nn.Sequential(), (seeded(*X),)


@strange("no forward")
def _no_forward() -> tuple[Any, Any]:
    return nn.ModuleList([Block()]), (seeded(*X),)


@strange("no super().__init__()")
def _uninitialised() -> tuple[Any, Any]:
    class Bare(nn.Module):
        def __init__(self) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return x

    return Bare(), (seeded(*X),)


@strange("a lazy module")
def _lazy() -> tuple[Any, Any]:
    model = Net().eval()
    model.blocks[0].up = nn.LazyLinear(4 * D)
    return model, (seeded(*X),)


@strange("not a module")
def _function() -> tuple[Any, Any]:
    return torch.relu, (seeded(*X),)


@strange("a class of modules")
def _class() -> tuple[Any, Any]:
    return Net, (seeded(*X),)


@strange("None")
def _nothing() -> tuple[Any, Any]:
    return None, (seeded(*X),)


def _changed(name: str, change: Callable[[Net], Any], inputs: Callable[[], Any] = lambda: (seeded(*X),)) -> None:
    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = Net().eval()
        changed = change(model)
        return model if changed is None else changed, inputs()

    STRANGE[name] = build


def _dynamic(model: Net) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _weight(convert: Callable[[Tensor], Tensor]) -> Callable[[Net], None]:
    def change(model: Net) -> None:
        model.blocks[0].up.weight = nn.Parameter(convert(model.blocks[0].up.weight.detach()), requires_grad=False)

    return change


def _compiled(model: Net) -> Any:
    return torch.compile(model, backend="eager")


_changed("dynamically quantized", _dynamic)
_changed("quantized weight", _weight(lambda w: _quantized(w)))
_changed("COO weight", _weight(lambda w: w.to_sparse()))
_changed("CSR weight", _weight(lambda w: w.to_sparse_csr()))
_changed("mkldnn weight", _weight(lambda w: w.to_mkldnn()))
_changed("integer weight", _weight(lambda w: w.to(torch.int8)))
_changed("8-bit float weight", _weight(lambda w: w.to(torch.float8_e4m3fn)))
_changed("float64 weight", _weight(lambda w: w.double()))
_changed("subclass weight", _weight(lambda w: w.as_subclass(Wrapped)))
_changed("expanded weight", _weight(lambda w: w[:1].expand_as(w)))
_changed("transposed weight", _weight(lambda w: w.t().contiguous().t()))
_changed("weight with NaN", _weight(lambda w: w * torch.nan))
_changed("weight of zeros", _weight(torch.zeros_like))
_changed("weight on meta", _weight(lambda w: w.to("meta")))
_changed("empty weight", _weight(lambda w: w[:0]))
_changed("all on meta", lambda m: m.to("meta"))
_changed("buffer on meta", lambda m: m.register_buffer("b", torch.empty(2, device="meta")))
_changed("sparse buffer", lambda m: m.register_buffer("b", torch.eye(3).to_sparse()))
_changed("CSR buffer", lambda m: m.register_buffer("b", torch.eye(3).to_sparse_csr()))
_changed("quantized buffer", lambda m: m.register_buffer("b", _quantized(torch.eye(3))))
_changed("nested buffer", lambda m: m.register_buffer("b", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])))
_changed("complex buffer", lambda m: m.register_buffer("b", torch.ones(2, dtype=torch.complex64)))
_changed("conjugate buffer", lambda m: m.register_buffer("b", torch.ones(2, dtype=torch.complex64).conj()))
_changed("subclass buffer", lambda m: m.register_buffer("b", torch.ones(2).as_subclass(Wrapped)))
_changed("4-bit buffer", lambda m: m.register_buffer("b", torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)))
_changed("empty buffer", lambda m: m.register_buffer("b", torch.empty(0, 3)))
_changed("complex model", lambda m: m.to(torch.complex64), lambda: (torch.complex(seeded(*X), seeded(*X)),))
_changed("bfloat16 model", lambda m: m.bfloat16(), lambda: (seeded(*X).bfloat16(),))
_changed("float64 model", lambda m: m.double(), lambda: (seeded(*X).double(),))
_changed("float16 model", lambda m: m.half(), lambda: (seeded(*X).half(),))
_changed("frozen", lambda m: m.requires_grad_(False))
_changed("weight norm", lambda m: (nn.utils.parametrizations.weight_norm(m.blocks[0].up), None)[1])
_changed("spectral norm", lambda m: (nn.utils.parametrizations.spectral_norm(m.blocks[0].up), None)[1])
_changed("old weight norm", lambda m: (torch.nn.utils.weight_norm(m.blocks[0].up), None)[1])
_changed("pruned", lambda m: (prune.l1_unstructured(m.blocks[0].up, "weight", 0.5), None)[1])
_changed("scripted", lambda m: torch.jit.script(Scripted()))
_changed("traced by jit", lambda m: torch.jit.trace(m, (seeded(*X),), check_trace=False))
_changed("scripted block", lambda m: (m.blocks.__setitem__(0, torch.jit.script(m.blocks[0])), None)[1])
_changed("compiled", _compiled)
_changed("compiled block", lambda m: (m.blocks.__setitem__(0, torch.compile(m.blocks[0], backend="eager")), None)[1])
_changed("DataParallel", nn.DataParallel)
_changed("a block twice", lambda m: (m.blocks.__setitem__(1, m.blocks[0]), None)[1])
_changed("a cycle of modules", lambda m: object.__setattr__(m.blocks[0], "owner", m))
_changed("forward replaced", lambda m: setattr(m, "forward", m.forward))
_changed("hook that raises", lambda m: (m.register_forward_hook(_raising_hook), None)[1])
_changed("hook that exits", lambda m: (m.blocks[0].register_forward_pre_hook(_exiting_hook), None)[1])
_changed("attribute named memory", lambda m: setattr(m, "memory", 3))


class Scripted(nn.Module):
    """A model that `torch.jit.script` accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def _raising_hook(*_: Any) -> None:
    raise KeyError("hook")


def _exiting_hook(*_: Any) -> None:
    raise SystemExit("hook")
