"""A program that calls every operator directly on the CPU with every kind of wrong or unusual argument, in one process.

Each call prints its name first, so that the last line names a call that ended the process. A call must return what it returns
for the same numbers in contiguous tensors, or raise ValueError, TypeError or IndexError with a message; the fake implementation
must agree with it. Arguments: the backend, and the native library if it is "native".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from memrewrite.kernels import native_library, ops, rounding  # noqa: F401 (`ops` registers the operators)
from memrewrite.kernels.pending import Pending

OPS = torch.ops.memrewrite
Call = dict[str, Any]
REFUSALS = (ValueError, TypeError, IndexError)
N, D, T, K, H, KEYS, TOP = 7, 6, 4, 3, 2, 40, 3
DTYPES = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
DTYPES += (torch.float64, torch.complex64, rounding.FP8, torch.float8_e5m2)
QUEUE = Pending()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def indices(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high))


def calls(backend: str) -> dict[str, Call]:
    """A right call of every operator; those with a scale, without a number, are calls of their own."""
    reads: Call = {"indices": indices(N, T, K), "weights": randn(T, K)}
    wide = randn(N, D)
    scale = rounding.row_scale(wide)
    eight: Call = {"values": (wide / scale[:, None]).to(rounding.FP8), "scale": scale}
    lists: Call = {"grads": [randn(T, D)] * 2, "indices": [reads["indices"]] * 2, "weights": [reads["weights"]] * 2}
    numbers: Call = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1, "seed": 1, "backend": backend}
    adam: Call = {**numbers, "beta1": 0.5, "beta2": 0.75, "step": 2}
    moments: Call = {"exp_avg": randn(N, D), "exp_avg_sq": torch.ones(N)}
    roots = torch.rand(N, D, generator=torch.Generator().manual_seed(0))
    both_scales: Call = {"exp_avg_scale": rounding.block_scale(wide), "exp_avg_sq_scale": rounding.block_scale(roots)}
    elements: Call = {"exp_avg": randn(N, D), "exp_avg_scale": None, "exp_avg_sq": roots, "exp_avg_sq_scale": None}
    coded: Call = {**elements, "exp_avg": randn(N, D).to(rounding.FP8), "exp_avg_sq": roots.to(rounding.FP8), **both_scales}
    needs: Call = {"need_values": True, "need_weights": True, "backend": backend}
    halves: Call = {"slots": indices(KEYS**2, H, T, TOP), "queries": randn(T, 2 * H, D), "keys": randn(2 * H, KEYS, D)}
    few: Call = {**halves, "slots": indices(4, H, T, TOP), "keys": randn(2 * H, TOP, D)}
    both: Call = {"need_queries": True, "need_keys": True, "backend": backend, "grad": randn(H, T, TOP)}
    return {
        "sparse_lookup": {"values": wide, **reads, "gradient": "dense", "backend": backend, "dtype": torch.float32},
        "sparse_lookup with a scale": {**eight, **reads, "backend": backend},
        "sparse_lookup_backward": {"grad": randn(T, D), "values": wide, **reads, **needs},
        "sparse_lookup_backward with a scale": {"grad": randn(T, D), **eight, **reads, **needs, "need_values": False},
        "sparse_lookup_rows": {"grad": randn(T, D), **reads, "slots": N, "backend": backend},
        "sparse_lookup_keep": {"grad": randn(T, D), **reads, "pending": QUEUE.count, "handle": QUEUE.handle},
        "sparse_dots": {"values": wide, "indices": reads["indices"], "x": randn(T, D), "gradient": "dense", "backend": backend},
        "sparse_dots with a scale": {**eight, "indices": reads["indices"], "x": randn(T, D), "backend": backend},
        "rowwise_adagrad_": {"values": wide, "scale": None, "total": torch.ones(N), **lists, **numbers},
        "rowwise_adagrad_ with a scale": {**eight, "total": torch.ones(N), **lists, **numbers},
        "rowwise_adam_": {"values": wide, "scale": None, **moments, **lists, **adam},
        "rowwise_adam_ with a scale": {**eight, **moments, **lists, **adam},
        "lazy_adam_": {"values": wide, "scale": None, **elements, **lists, **adam},
        "lazy_adam_ with scales": {**eight, **coded, **lists, **adam},
        "product_key_topk": {"scores1": randn(T, KEYS), "scores2": randn(T, KEYS + 1), "k": TOP, "backend": backend},
        "product_key_topk_backward": {
            "grad": randn(T, TOP),
            "indices": indices(42, T, TOP),
            "n1": 6,
            "n2": 7,
            "backend": backend,
        },
        "product_keys": {"queries": halves["queries"], "keys": halves["keys"], "k": TOP, "backend": backend},
        "product_keys_backward by reading": {**both, **halves},
        "product_keys_backward by products": {**both, **few},
    }


# ------------------------------------------------------------------------------------------------------------- variations


def same_numbers(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other forms of one tensor, for which the result is the same."""
    bits = x.view(torch.uint8) if x.itemsize == 1 and x.is_floating_point() else x  # 8-bit floats cannot be repeated
    yield "strided", bits.repeat_interleave(2, -1).view(x.dtype)[..., ::2]
    yield "offset", torch.cat([bits.reshape(-1)[:1], bits.reshape(-1)]).view(x.dtype)[1:].view(x.shape)
    if x.dim() > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.is_floating_point() and x.itemsize > 1:
        yield "requires a gradient", x.clone().requires_grad_()


def others(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors with other numbers, shapes, dtypes, layouts and devices."""
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield f"of {dtype}", x.to(dtype)
    for dim in range(x.dim()):
        yield f"one less on {dim}", x.narrow(dim, 0, x.shape[dim] - 1)
        yield f"empty on {dim}", x.narrow(dim, 0, 0)
        yield f"one more on {dim}", torch.cat([x.float(), x.narrow(dim, 0, 1).float()], dim).to(x.dtype)
        yield f"expanded on {dim}", x.narrow(dim, 0, 1).expand(x.shape)
    yield "one number", x.reshape(-1)[0]
    yield "flat", x.reshape(-1)
    yield "with another dimension", x.unsqueeze(0)
    yield "with a last dimension", x.unsqueeze(-1)
    yield "sparse", x.float().to_sparse().to(x.dtype) if x.itemsize > 1 else x.float().to_sparse()
    yield "on the meta device", x.to("meta")
    if x.is_floating_point() and x.itemsize > 1:
        yield "not a number", torch.full_like(x, float("nan"))
        yield "infinite", torch.full_like(x, float("inf"))
    if not x.is_floating_point():
        for dtype in (torch.int32, torch.int64):
            for number in (
                -1,
                N,
                6 * 7,
                KEYS**2,
                2**31 - 1,
                -(2**31),
                *((2**63 - 1, -(2**63)) if dtype == torch.int64 else ()),
            ):
                wrong = x.to(dtype, copy=True)
                wrong.view(-1)[-1] = number
                yield f"{number} in {dtype}", wrong


NUMBERS: dict[str, tuple[Any, ...]] = {
    "k": (-(2**40), -1, 0, 1, KEYS, KEYS + 1, 2**40),
    "slots": (-1, 0, 1, N - 1, N + 1, 2**40),
    "n1": (-1, 0, 1, 5, 8),
    "n2": (-1, 0, 1, 6, 8),
    "step": (-1, 0, 2**40),
    "beta1": (-0.5, 1.0, 2.0, float("nan")),
    "beta2": (-0.5, 1.0, 2.0, float("nan")),
    "lr": (float("nan"), float("inf"), 1e300),
    "eps": (float("nan"), 1e300),
    "weight_decay": (float("nan"), -1e300),
    "seed": (-1, 2**63 - 1, -(2**63)),
    "backend": ("cuda", "triton", ""),
    "gradient": ("sparse", "fused", "none", ""),
    "dtype": (torch.int64, torch.bool, torch.complex64, rounding.FP8, torch.float16, torch.float64),
    "need_values": (False,),
    "need_weights": (False,),
    "need_queries": (False,),
    "need_keys": (False,),
    "softmax": (True, False),
    "handle": (-1, 0, 2**40),
}


def variations(call: Call) -> Iterator[tuple[str, Call, bool]]:
    """Name, arguments, and whether the result must be that of the original call."""
    for name, value in call.items():
        if isinstance(value, Tensor):
            for change, tensor in same_numbers(value):
                if name != "scale" or not tensor.requires_grad:  # a scale has no derivative
                    yield f"{name} {change}", {**call, name: tensor}, True
            for change, tensor in others(value):
                yield f"{name} {change}", {**call, name: tensor}, False
        elif isinstance(value, list):
            for change, tensor in same_numbers(value[0]):
                yield f"{name} {change}", {**call, name: [tensor, *value[1:]]}, True
            for change, tensor in others(value[0]):
                yield f"one of {name} {change}", {**call, name: [*value[1:], tensor]}, False
                yield f"all {name} {change}", {**call, name: [tensor] * 2}, False
            yield f"{name} of one", {**call, name: value[:1]}, False
            yield f"no {name}", {**call, name: []}, False
        else:
            for number in NUMBERS.get(name, ()):
                yield f"{name}={number}", {**call, name: number}, False
    if "grads" in call:
        yield "no lookups", {**call, "grads": [], "indices": [], "weights": []}, False
    yield from ((f"everything empty on {dim}", emptied(call, dim), False) for dim in (0, 1, -1))
    yield "everything without elements", {name: x[:0] if isinstance(x, Tensor) else x for name, x in call.items()}, False


def emptied(call: Call, dim: int) -> Call:
    def narrow(x: Any) -> Any:
        return x.narrow(dim, 0, 0) if isinstance(x, Tensor) and -x.dim() <= dim < x.dim() else x

    return pytree.tree_map(narrow, call)


# --------------------------------------------------------------------------------------------------------------- outcomes


def copied(x: Any) -> Any:
    return x.detach().clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) and not x.is_meta else x


def changed(call: Call) -> list[Tensor]:
    """What an update changes, as fp32 numbers."""
    names = ("values", "scale", "total", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    found = [call.get(name) for name in names]
    return [x.detach().float() for x in found if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta]


def outcome(op: Callable[..., Any], call: Call) -> Any:
    """What the operator returns, or changes; or the error."""
    try:
        with QUEUE.tried():
            found = op(**call)
    except REFUSALS as error:
        return error
    except RuntimeError as error:  # a queue that was deleted
        if "the table of queue" not in str(error):
            raise
        return error
    return found if found is not None else changed(call) if "lr" in call else None


def dense(x: Any) -> Any:
    return x.to_dense() if isinstance(x, Tensor) and x.layout is not torch.strided else x


def check(op: Callable[..., Any], call: Call, right: Any) -> str:
    """Run one variation. Returns "refused" or "ran"; raises AssertionError if the result is wrong."""
    before = [x.clone() for x in changed(call)]
    grad_mode = torch.no_grad if "lr" in call or "handle" in call else torch.enable_grad
    with grad_mode():
        found = outcome(op, call)
    if isinstance(found, Exception):
        assert len(str(found)) > 20, f"no message: {found!r}"
        assert right is None, f"refused: {found!r}"
        for one, other in zip(changed(call), before, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif right is not None:
        torch.testing.assert_close(pytree.tree_map(dense, found), pytree.tree_map(dense, right))
    agrees_with_fake(op, call, found)
    return "refused" if isinstance(found, Exception) else "ran"


def agrees_with_fake(op: Callable[..., Any], call: Call, found: Any) -> None:
    """The fake implementation raises the same error, or returns the same shapes and dtypes."""
    if " cannot: " in str(found) or isinstance(found, IndexError | RuntimeError):
        return  # fakes know no values, backends or queues
    try:
        mode = FakeTensorMode()
        fakes = pytree.tree_map(lambda x: mode.from_tensor(x.detach()) if isinstance(x, Tensor) else x, call)
        with torch.no_grad(), mode:
            fake = op(**fakes)
    except Exception as error:
        if type(error) is not type(found):
            raise AssertionError(f"{found!r}, but the fake implementation raises {error!r}") from error
        return
    assert not isinstance(found, Exception), f"{found!r}, but the fake implementation returns"
    if fake is not None:
        kinds = [[(x.shape, x.dtype, x.layout) for x in pytree.tree_leaves(result)] for result in (found, fake)]
        assert kinds[0] == kinds[1], f"{kinds[0]}, but the fake implementation returns {kinds[1]}"


def main(backend: str, library: str | None = None) -> int:
    if library is not None:
        native_library.built_library = lambda: Path(library)
    counts: dict[str, int] = {"refused": 0, "ran": 0, "wrong": 0}
    for name, call in calls(backend).items():
        op = getattr(OPS, name.split()[0])
        fresh = pytree.tree_map(copied, call)
        with torch.no_grad():
            right = outcome(op, fresh)
        assert not isinstance(right, Exception), (name, right)
        for change, varied, is_same in variations(call):
            print(f"{name}: {change}", flush=True)
            try:
                own = {n: x if n in ("pending",) else own_copy(x) for n, x in varied.items()}
                if "pending" in call and "pending" in change.split(" ")[0]:
                    own["pending"] = varied["pending"]
                counts[check(op, own, right if is_same else None)] += 1
            except Exception as error:  # noqa: BLE001 (all of them are reported)
                counts["wrong"] += 1
                print(f"WRONG {name}: {change}: {type(error).__name__}: {error}", flush=True)
    print(counts)
    return min(1, counts["wrong"])


def own_copy(x: Any) -> Any:
    """A copy in the same form: with the same strides, if it is not expanded."""
    if isinstance(x, list):
        return [own_copy(one) for one in x]
    if not isinstance(x, Tensor) or x.is_meta or x.layout is not torch.strided or x.is_complex():
        return x
    if any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)):
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    copy.copy_(x.detach())
    return copy.requires_grad_(x.requires_grad) if x.requires_grad else copy


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
