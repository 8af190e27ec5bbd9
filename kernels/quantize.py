"""8-bit tables: rows of e4m3 codes with one fp32 scale each, from fp32 rows or sampled; no fp32 table exists."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from memrewrite.kernels import rounding, triton_backend
from memrewrite.kernels.torch_reads import CHUNK

SERIAL = 2**15 - 1  # elements: on fewer than 2**15, torch works in the calling thread


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 rows [R, D] as e4m3 codes [R, D], rounded to the nearest, and scales [R] as in `rounding.row_scale`."""
    if rows.numel() and triton_backend.runs_on(rows.device):
        return triton_backend.quantized(rows)
    codes = torch.empty(rows.shape, dtype=rounding.FP8, device=rows.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)

    def convert(piece: int, part: slice) -> None:
        _store(codes[part], scale[part], rows[part])

    _in_pieces(convert, rows)
    return codes, scale


def sample_(values: Tensor, scale: Tensor, spread: float, seed: int) -> None:
    """Fill an 8-bit table [N, D] and its scales [N] with samples of N(0, spread²), rounded to the nearest.

    The result depends only on the arguments and the type of the device: not on the number of threads.
    """
    if values.numel() and triton_backend.runs_on(values.device):
        triton_backend.sample_(values, scale, spread, seed)
        return

    def sample(piece: int, part: slice) -> None:
        generator = torch.Generator(values.device).manual_seed((seed + piece) % 2**63)
        codes = values[part]
        sampled = torch.empty(codes.shape, device=codes.device).normal_(0.0, spread, generator=generator)
        _store(codes, scale[part], sampled)

    _in_pieces(sample, values)


def _store(codes: Tensor, scale: Tensor, rows: Tensor) -> None:
    scale.copy_(rounding.row_scale(rows))
    codes.copy_(rows / scale.unsqueeze(-1))


def _in_pieces(work: Callable[[int, slice], None], table: Tensor) -> None:
    """Call `work` with the number and the rows of every piece of a table; on the CPU, by as many threads as torch uses."""
    cpu = table.device.type == "cpu"
    count = max(1, (SERIAL if cpu else CHUNK) // max(1, table.shape[1]))
    parts = [slice(first, first + count) for first in range(0, table.shape[0], count)]
    if not cpu:
        for piece, part in enumerate(parts):
            work(piece, part)
        return

    def without_gradients(piece: int) -> None:
        with torch.no_grad():  # a setting of the thread
            work(piece, parts[piece])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(without_gradients, range(len(parts))):  # raises what a thread raised
            pass
