"""The parameters and buffers of a module by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter, then every buffer, each under all of its names: a tied tensor is listed several times."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def first_names(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter and buffer, by the tensor's id."""
    names: dict[int, str] = {}
    for name, tensor in tensors_of(model):
        names.setdefault(id(tensor), name)
    return names


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of which a tensor consists: of a sparse one its indices and values; else itself, without lazy views.

    Two tensors of the same class, layout and shape are equal if these are.
    """
    if tensor.is_nested:
        return [part for row in tensor.unbind() for part in strided_parts(row)]
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    if tensor.layout == torch.strided:
        return [tensor.resolve_conj().resolve_neg()]
    return sparse_parts(tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor)


def sparse_parts(tensor: Tensor) -> list[Tensor]:
    """The indices and values of a sparse tensor, as they are stored; [] for any other."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
