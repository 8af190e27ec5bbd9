"""State of the process that a forward may change: random number generators, and switches of torch such as gradients and dtypes.

Flow: `process_restorers` reads every state → code runs → each restorer writes its state back. `seeded` gives fixed seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

SEED = 0
Restorer = Callable[[], object]


def process_restorers() -> list[Restorer]:
    """Functions that restore the random number generators and the switches of torch as they are now."""
    return [*_rng_restorers(), *_switch_restorers()]


@contextmanager
def seeded() -> Iterator[None]:
    """Context manager: fixed seeds for the generators of torch, Python and NumPy; restores their states on exit."""
    restorers = _rng_restorers()
    try:
        for generator in _generators():
            generator.manual_seed(SEED)
        random.seed(SEED)
        if _numpy_state()["bit_generator"] == "MT19937":  # no other can be seeded; its state is the same for every forward
            np.random.seed(SEED)
        yield
    finally:
        for restore in restorers:
            restore()


def _rng_restorers() -> list[Restorer]:
    restorers: list[Restorer] = [partial(g.set_state, g.get_state()) for g in _generators()]
    return [*restorers, partial(random.setstate, random.getstate()), partial(np.random.set_state, _numpy_state())]


def _numpy_state() -> Any:
    return np.random.get_state(legacy=False)


def _generators() -> list[torch.Generator]:
    """The default generators of the devices in use. `torch.manual_seed` would also seed devices that are used later."""
    found: list[torch.Generator] = [torch.default_generator]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            found += device.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


def _switch_restorers() -> list[Restorer]:
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    restorers: list[Restorer] = [
        partial(torch._C._set_grad_enabled, torch.is_grad_enabled()),
        partial(torch.set_default_dtype, torch.get_default_dtype()),
        partial(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only),
    ]
    for device in ("cpu", "cuda"):
        restorers.append(partial(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device)))
        restorers.append(partial(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device)))
    return restorers
