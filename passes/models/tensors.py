"""The parameters and buffers of a module by name."""

from __future__ import annotations

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
