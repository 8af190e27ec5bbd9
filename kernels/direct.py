"""Whether an operator's implementation may be called directly: torch's dispatcher takes longer than a lookup of one token.

A call through the dispatcher and a direct call differ only if autograd, a mode, a transform or a profiler takes part. Within a
level of forward mode, tensors may have tangents; asking each of them takes longer than the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C import DispatchKey, DispatchKeySet

from memrewrite.kernels.derivatives import forward_mode

_PLAIN_TYPES = (Tensor, nn.Parameter)
# With other keys, of a tensor or of the thread, the dispatcher would run something before the implementation: a dispatch mode,
# vmap, autocast, tracing, a lazy negation. Autograd's keys do nothing if no gradient is recorded.
_PLAIN_KEYS = 0
for _key in (DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.ADInplaceOrView, DispatchKey.BackendSelect):
    _PLAIN_KEYS |= DispatchKeySet(_key).raw_repr()


def dispatch_adds_nothing(*tensors: Tensor | None) -> bool:
    """True if the dispatcher would run the implementation on these CPU tensors and nothing else."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
        return False
    if forward_mode():
        return False
    records = torch.is_grad_enabled()
    live = torch._C._dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or not tensor.is_cpu or (records and tensor.requires_grad):
            return False
        live |= torch._C._dispatch_keys(tensor).raw_repr()
    return not live & ~torch._C._dispatch_tls_local_exclude_set().raw_repr() & ~_PLAIN_KEYS
