"""Where a matrix is decomposed: on its own device, or on the CPU if that device can't."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def decomposable(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy on the CPU if its device has no float64 or no decompositions, as Apple's MPS."""
    return matrix.to(decomposition_device(matrix))


def decomposition_device(matrix: Tensor) -> torch.device:
    """The matrix's own device, or the CPU."""
    return matrix.device if _decomposes(matrix.device.type) else torch.device("cpu")


@cache
def _decomposes(device_type: str) -> bool:
    try:
        torch.linalg.eigh(torch.eye(2, device=device_type).double())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # PyTorch raises TypeError for a dtype that MPS lacks
        return False
    return True
