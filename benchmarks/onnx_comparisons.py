"""The comparisons of `onnx_cpu`: lookups, top-ks, a whole model; their inputs, and the checks of their results.

Flow: sample inputs → a session for each route of a file → each implementation bound to each input set → results compared with
the formula.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).with_name("gpu")))

from onnx_operators import Call, Inputs, Op, Outputs, bound, operator_file, outputs_of

from memrewrite.errors import MemrewriteError, UserError, in_one_line
from memrewrite.kernels import ops, reference

DRAWS = 64  # input sets for one token, each with different rows: a row that was just read would be in a cache
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of ‖difference‖ / ‖reference‖
GIVE_INPUTS = "--inputs FILE.npz, with an array for every input"

Maker = Callable[[Inputs], Call]


@dataclass(frozen=True)
class Comparison:
    """Implementations that are measured together: `makers` bind each of them to one of the input sets `draws`."""

    name: str
    size: str
    draws: list[Inputs]
    makers: Mapping[str, Maker]  # "native", "function" and perhaps "torch"
    check: Callable[[Inputs, str, Outputs], None]


def sessions(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """A session for each route, with as many threads as torch has."""
    import onnxruntime

    from memrewrite.passes.onnx.session import onnx_session

    created = {}
    for who, route in (("native", "native"), ("function", "standard")):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = args.threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        created[who] = onnx_session(path, op=route, library=args.library, options=options)
    return created


def routes(args: argparse.Namespace, op: Op, inputs: Inputs, held: tuple[str, ...] = (), **attributes: int) -> dict[str, Maker]:
    """Both routes of a file with one operator; the inputs named in `held` are stored in the file."""

    def make(session: Any, given: Inputs) -> Call:
        fed = {name: x for name, x in given.items() if name not in held}
        return bound(session, fed, outputs_of(op, given, attributes.get("k", 0)))

    created = sessions(args, operator_file(args.folder, op, inputs, held, **attributes))
    return {who: partial(make, session) for who, session in created.items()}


def lookup(args: argparse.Namespace, values: Tensor, tokens: int) -> Comparison:
    """SparseLookup of T tokens, compared with one embedding bag per token."""
    draws: list[Inputs] = [lookup_inputs(args, values, tokens) for _ in range(max(1, DRAWS // tokens))]

    def bags(given: Inputs) -> Call:
        flat = given["indices"], given["values"]
        return lambda: (F.embedding_bag(*flat, per_sample_weights=given["weights"], mode="sum"),)

    def check(given: Inputs, who: str, found: Outputs) -> None:
        parts = zip(given["indices"].split(32), given["weights"].split(32), strict=True)
        want = torch.cat([torch.einsum("tk,tkd->td", w.double(), values[i].double()) for i, w in parts])
        near(f"SparseLookup by {who}", found[0], want, TOLERANCE[str(values.dtype)[6:]])

    makers = {**routes(args, "SparseLookup", draws[0], ("values",)), "torch": bags}
    return Comparison("SparseLookup", lookup_size(args, tokens, str(values.dtype)[6:]), draws, makers, check)


def lookup_size(args: argparse.Namespace, tokens: int, dtype: str) -> str:
    """The label of a lookup in the table."""
    return f"T={tokens} K={args.reads} D={args.dim} N={args.slots} {dtype}"


def lookup_inputs(args: argparse.Namespace, values: Tensor, tokens: int) -> Inputs:
    """Slots sampled uniformly, softmax weights."""
    weights = torch.randn(tokens, args.reads).softmax(-1).to(values.dtype)
    return {"values": values, "indices": torch.randint(0, values.shape[0], (tokens, args.reads)), "weights": weights}


def table(args: argparse.Namespace, dtype: str) -> Tensor:
    """[N, D] from N(0, 1)."""
    return torch.empty(args.slots, args.dim, dtype=getattr(torch, dtype)).normal_()


def topk(args: argparse.Namespace, keys: int, dtype: str, tokens: int) -> Comparison:
    """ProductKeyTopk of every head of T tokens, compared with the operator in torch."""
    shape, k = (args.heads, tokens, keys), args.topk
    draws: list[Inputs] = [
        {name: torch.randn(shape).to(getattr(torch, dtype)) for name in ("scores1", "scores2")}
        for _ in range(max(1, DRAWS // tokens))
    ]

    def ours(given: Inputs) -> Call:
        return lambda: ops.product_key_topk(given["scores1"], given["scores2"], k)

    def check(given: Inputs, who: str, found: Outputs) -> None:
        one, two = (given[name].float() for name in given)
        want = reference.product_key_topk(one[:1, :8], two[:1, :8], k)[0]
        sums = one.gather(-1, found[1] // keys) + two.gather(-1, found[1] % keys)
        distinct = bool((found[1].sort(-1).values.diff(dim=-1) > 0).all())
        if not (torch.equal(found[0][:1, :8], want) and torch.equal(sums, found[0]) and distinct):
            raise MemrewriteError(f"ProductKeyTopk by {who}: not the best sums", where=f"n={keys} T={tokens}")

    size = f"T={tokens} h={args.heads} n={keys} k={k} {dtype}"
    return Comparison("ProductKeyTopk", size, draws, {**routes(args, "ProductKeyTopk", draws[0], k=k), "torch": ours}, check)


def model(args: argparse.Namespace) -> Comparison:
    """A whole exported file by both routes, with inputs from a file or sampled ones."""
    created = sessions(args, args.model)
    tokens = max(args.tokens)
    feeds = dict(np.load(args.inputs)) if args.inputs else {p.name: sampled(p, tokens) for p in created["native"].get_inputs()}
    first: list[Outputs] = []

    def make(session: Any, _: Inputs) -> Call:
        def call() -> Outputs:
            try:
                return tuple(map(torch.from_numpy, session.run(None, feeds)))
            except Exception as error:  # onnxruntime has many exception classes
                what = f"onnxruntime cannot run the model: {in_one_line(error, kind=False)}"
                raise UserError(what, where=str(args.model), hint=GIVE_INPUTS) from error

        return call

    def check(_: Inputs, who: str, found: Outputs) -> None:
        first.append(found)
        for output, one, two in zip(created["native"].get_outputs(), found, first[0], strict=True):
            near(f"{output.name} by {who}", one, two, 1e-3 if one.dtype == torch.float32 else 2e-2)

    kernels = ", ".join(f"{name}: {how}" for name, how in created["native"].memory_kernels.items())
    size = f"{'given inputs' if args.inputs else f'T={tokens}'}; {kernels}"
    return Comparison(args.model.name, size, [{}], {who: partial(make, session) for who, session in created.items()}, check)


def sampled(port: Any, tokens: int) -> np.ndarray[Any, Any]:
    """Values for an input of a model: integers below 50, or samples of N(0, 1). Dynamic axes have length `tokens`, a batch 1.
    Raises UserError for an axis whose length depends on other axes."""
    if any(isinstance(axis, str) and not re.fullmatch(r"\w+", axis) for axis in port.shape):
        what = f"no inputs can be sampled for {port.name} {port.shape}: its axes depend on each other"
        raise UserError(what, hint=GIVE_INPUTS)
    shape = [axis if isinstance(axis, int) else 1 if axis == "batch" else tokens for axis in port.shape]
    kind = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bool)": "bool"}.get(port.type, "int64")
    chance = np.random.default_rng(0)
    return (chance.standard_normal(shape) if kind.startswith("float") else chance.integers(0, 50, shape)).astype(kind)


def near(what: str, found: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise MemrewriteError unless ‖found - want‖ <= `tolerance` · ‖want‖; NaN always raises."""
    error = float((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise MemrewriteError(f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}")
