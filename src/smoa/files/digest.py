"""Digests by which a saved adapter recognises itself: against damaged and mixed-up files, not against forgery.

`adapter_config.json` keeps one of its own settings and one of the tensors that were saved with it. Names of tensors do
not count, since hosts rename modules between versions, so what is compared is which factors and labels there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LENGTH = 32
"""Hexadecimal digits that are kept: 128 bits."""


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Of JSON values by name; collections other than `block_ranks` have no order."""
    plain = {name: value if name == "block_ranks" else _sorted(value) for name, value in settings.items()}
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _sorted(value: Any) -> Any:
    return sorted(value, key=repr) if isinstance(value, (list, tuple, set, frozenset, range)) else value


def kind_of(key: str) -> str | None:
    """`smoa_A`, `smoa_B`, `smoa_row_labels` or `smoa_col_labels`: the kind of a tensor by its name, of others None."""
    _, found, rest = key.rpartition(".smoa_")
    return f"smoa_{rest.split('.')[0]}" if found else None


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Of (kind, tensor) pairs in any order; None where values are not at hand: on the meta device, or sharded."""
    parts = []
    for kind, tensor in tensors:
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return None
        digest = hashlib.sha256(f"{kind} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        parts.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:LENGTH]


def factors_digest(tensors: Mapping[str, Tensor]) -> str | None:
    """Of the factors and labels among named tensors."""
    return tensors_digest((kind, tensor) for key, tensor in tensors.items() if (kind := kind_of(key)))
