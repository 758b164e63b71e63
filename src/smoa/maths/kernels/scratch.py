"""Chunks of a weight, and the buffers that they reuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 25}
"""Entries of W in one chunk: few enough for a CPU's cache, many enough to fill a GPU."""


def chunks(start: int, stop: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of the rows from `start` to `stop` of a matrix with `columns` columns, bounded in entries."""
    step = max(16, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"]) // max(columns, 1))
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class Scratch(threading.local):
    """Buffers on a CPU that every chunk of every call reuses.

    The system allocator would return each buffer to the operating system and page it in again, which takes a fifth of
    a small layer's step. A few chunks' worth stays allocated in each thread.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """An uninitialized (rows, cols) tensor with dtype and device of `like`; the next `take` for `use` reuses it."""
        size = rows * cols
        if like.device.type != "cpu" or size > 2 * CHUNK_ELEMENTS["cpu"] or isinstance(like, FakeTensor):
            return like.new_empty(rows, cols)
        key = (use, like.dtype)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # buffers made in inference mode can't be written to outside
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            if not isinstance(buffer, FakeTensor):  # which holds no memory, for this call or a later one
                self.buffers[key] = buffer
        return buffer[:size].view(rows, cols)


SCRATCH = Scratch()
