"""Chunks of a weight, and the buffers that they reuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 25}
"""Entries of W handled at a time: few enough to stay in a CPU's cache, many enough to fill a GPU."""


def chunks(start: int, stop: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows of a matrix with `columns` columns, each of a bounded number of entries."""
    step = max(16, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"]) // max(columns, 1))
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class Scratch(threading.local):
    """Buffers that every chunk of every call reuses, on a CPU, where the system allocator would hand each one back to
    the kernel and page it in again: a fifth of a small layer's step. At most a few chunks' worth stays allocated.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """An uninitialized (rows, cols) with the dtype and device of `like`; the next `take` of that use reuses it."""
        size = rows * cols
        if like.device.type != "cpu" or size > 2 * CHUNK_ELEMENTS["cpu"]:
            return like.new_empty(rows, cols)
        key = (use, like.dtype)
        if key not in self.buffers or self.buffers[key].numel() < size:
            with torch.inference_mode(False):  # a buffer made in inference mode couldn't be written to outside
                self.buffers[key] = torch.empty(size, dtype=like.dtype)
        return self.buffers[key][:size].view(rows, cols)


SCRATCH = Scratch()
