"""Which module inside of a wrapper is the model: adapters, trainers and pipelines keep a model in modules of their own."""

from __future__ import annotations

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # they run or list all children: no place for another one


def model_inside(model: nn.Module) -> str:
    """The path of the innermost module that contains all tensors of `model` and is no container; "" for the root.

    A wrapper has one child with tensors and none of its own. A model of transformers is no wrapper, whatever it contains: its
    config describes it as a whole.
    """
    path, inside, names = "", model, []
    while not (_is_whole(inside) or _has_tensors(inside, recurse=False)):
        children = [(name, child) for name, child in inside.named_children() if _has_tensors(child, recurse=True)]
        if len(children) != 1:
            break
        name, inside = children[0]
        names.append(name)
        if not isinstance(inside, _CONTAINERS):
            path = ".".join(names)
    return path


def _has_tensors(module: nn.Module, *, recurse: bool) -> bool:
    tensors = (module.parameters(recurse), module.buffers(recurse))
    return any(next(found, None) is not None for found in tensors)


def _is_whole(module: nn.Module) -> bool:
    return any(base.__module__ == "transformers.modeling_utils" for base in type(module).__mro__)
