"""The operators `torch.ops.memrewrite.*`: schemas and registration of their implementations and derivatives.

Each backward is a separate operator, so that export, compile and the profiler see a gather and a scatter by name; the
backwards with dense gradients are differentiable too. Importing this module registers the operators, once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.library import Library, register_fake, register_vmap

from memrewrite.kernels import batching, derivatives, flops, forward_mode
from memrewrite.kernels import lookup_update as _update
from memrewrite.kernels import product_key_topk as _topk
from memrewrite.kernels import product_keys as _keys
from memrewrite.kernels import sparse_dots as _dots
from memrewrite.kernels import sparse_lookup as _lookup
from memrewrite.kernels.derivatives import Rules
from memrewrite.kernels.lookup_checks import NO_KEEP, NO_ROWS


class _Op(NamedTuple):
    """One operator: schema, implementations, and what `vmap` and differentiation do with it."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    batched: Callable[..., Any]
    rules: Rules | str  # or why there is no derivative
    tags: tuple[torch.Tag, ...] = ()


def _nothing(*_: Any) -> None:
    """A context that saves nothing."""


_NO_UPDATE = "an update of a table has no derivative, and no batch of tables; call it under torch.no_grad(), outside torch.func"
_LOOKUP = "Tensor values, Tensor indices, Tensor weights"
_TABLE = "Tensor(a!) values, Tensor(b!)? scale"
_READS = "Tensor[] grads, Tensor[] indices, Tensor[] weights"
_OPS = (
    _Op(
        f"sparse_lookup({_LOOKUP}, Tensor? scale=None, str gradient='dense', str backend='auto', "
        "Tensor? pending=None, int handle=0, ScalarType? dtype=None) -> Tensor",
        _lookup.forward,
        _lookup.forward_fake,
        batching.sparse_lookup,
        Rules(_lookup.grad_of, _lookup.context, forward_mode.sparse_lookup),
    ),
    _Op(
        f"sparse_lookup_backward(Tensor grad, {_LOOKUP}, bool need_values, bool need_weights, Tensor? scale=None, "
        "str backend='auto') -> (Tensor, Tensor)",
        _lookup.backward,
        _lookup.backward_fake,
        batching.sparse_lookup_backward,
        Rules(_lookup.backward_grad, _lookup.backward_context, forward_mode.sparse_lookup_backward),
    ),
    _Op(
        "sparse_lookup_rows(Tensor grad, Tensor indices, Tensor weights, SymInt slots, str backend='auto') -> Tensor",
        _lookup.rows,
        _lookup.rows_fake,
        derivatives.refuse(NO_ROWS),
        Rules(derivatives.refuse(NO_ROWS), _nothing, derivatives.refuse(NO_ROWS)),
    ),
    _Op(
        "sparse_lookup_keep(Tensor grad, Tensor indices, Tensor weights, Tensor(a!) pending, int handle) -> ()",
        _lookup.keep,
        _lookup.keep_fake,
        derivatives.refuse(NO_KEEP),
        NO_KEEP,
        tags=(torch.Tag.cudagraph_unsafe,),  # a replayed CUDA graph would not update the queue
    ),
    _Op(
        "sparse_dots(Tensor values, Tensor indices, Tensor x, Tensor? scale=None, str gradient='dense', str backend='auto', "
        "Tensor? pending=None, int handle=0) -> Tensor",
        _dots.forward,
        _dots.forward_fake,
        batching.sparse_dots,
        Rules(_dots.grad_of, _dots.context, forward_mode.sparse_dots),
    ),
    _Op(
        f"rowwise_adagrad_({_TABLE}, Tensor(c!) total, {_READS}, float lr, float eps, float weight_decay, int seed, "
        "str backend='auto') -> ()",
        _update.adagrad,
        _update.adagrad_fake,
        derivatives.refuse(_NO_UPDATE),
        _NO_UPDATE,
    ),
    _Op(
        f"rowwise_adam_({_TABLE}, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, {_READS}, float lr, float beta1, float beta2, "
        "float eps, float weight_decay, int step, int seed, str backend='auto') -> ()",
        _update.adam,
        _update.adam_fake,
        derivatives.refuse(_NO_UPDATE),
        _NO_UPDATE,
    ),
    _Op(
        f"lazy_adam_({_TABLE}, Tensor(c!) exp_avg, Tensor(d!)? exp_avg_scale, Tensor(e!) exp_avg_sq, "
        f"Tensor(f!)? exp_avg_sq_scale, {_READS}, float lr, float beta1, float beta2, float eps, float weight_decay, int step, "
        "int seed, str backend='auto') -> ()",
        _update.lazy_adam,
        _update.lazy_adam_fake,
        derivatives.refuse(_NO_UPDATE),
        _NO_UPDATE,
    ),
    _Op(
        "product_key_topk(Tensor scores1, Tensor scores2, int k, bool softmax=False, str backend='auto') -> (Tensor, Tensor)",
        _topk.forward,
        _topk.forward_fake,
        batching.product_key_topk,
        Rules(_topk.grad_of, _topk.context, forward_mode.product_key_topk),
    ),
    _Op(
        "product_key_topk_backward(Tensor grad, Tensor indices, SymInt n1, SymInt n2, str backend='auto') -> (Tensor, Tensor)",
        _topk.backward,
        _topk.backward_fake,
        batching.product_key_topk_backward,
        Rules(_topk.backward_grad, _topk.backward_context, forward_mode.product_key_topk_backward),
    ),
    _Op(
        "product_keys(Tensor queries, Tensor keys, int k, bool softmax=True, str backend='auto') -> (Tensor, Tensor)",
        _keys.forward,
        _keys.forward_fake,
        batching.product_keys,
        Rules(_keys.grad_of, _keys.context, forward_mode.product_keys),
    ),
    _Op(
        "product_keys_backward(Tensor grad, Tensor slots, Tensor queries, Tensor keys, bool need_queries, bool need_keys, "
        "str backend='auto') -> (Tensor, Tensor)",
        _keys.backward,
        _keys.backward_fake,
        batching.product_keys_backward,
        Rules(_keys.backward_grad, _keys.backward_context, forward_mode.product_keys_backward),
    ),
)
# Opaque to export and compile: the inside of a backend is never traced.
_LIBRARY = Library("memrewrite", "DEF")  # type: ignore[no-untyped-call]
for _op in _OPS:
    _name = _op.schema.partition("(")[0]
    _LIBRARY.define(_op.schema, tags=_op.tags)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _op.run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # `run` dispatches by device
    register_fake(f"memrewrite::{_name}", _op.fake, lib=_LIBRARY)
    register_vmap(f"memrewrite::{_name}", _op.batched, lib=_LIBRARY)
    _overload = getattr(torch.ops.memrewrite, _name).default
    _kernel = (
        derivatives.refusing_kernel(_overload, _op.rules)
        if isinstance(_op.rules, str)
        else derivatives.kernel(_overload, _op.rules)
    )
    _LIBRARY.impl(_name, _kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("product_keys", _keys.autocast(_device), f"Autocast{_device}")  # type: ignore[no-untyped-call]
flops.register_when_imported()
