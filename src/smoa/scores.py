"""The spectral scores of weights, which smoa keeps for the whole process.

They are kept by a hash of the weight's content, so that a second adapter on the same weight needs no decomposition,
whatever its K. If the environment variable `SMOA_SPECTRUM_CACHE` names a folder, the next process needs none either.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from smoa.atomic import write_whole
from smoa.maths.spectrum import decomposition_device, spectral_scores

CACHE_VARIABLE = "SMOA_SPECTRUM_CACHE"
MEMORY_LIMIT = 64 << 20
"""Bytes of scores kept in memory. A weight takes 4(m+n), the 160 weights of a Llama-3-8B adapter take 8 MB."""
VERSION = "2"
"""Part of the key, to be increased when a change of the code changes the scores of a weight."""

_memory: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()


def cached_spectral_scores(weight: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    """`spectral_scores(weight, precise)`, from memory or disk if a weight of equal content was decomposed before."""
    key = _content_key(weight, precise)
    scores = _memory.get(key) or _read(key, weight)
    if scores is None:
        row_scores, col_scores = spectral_scores(weight, precise)
        scores = row_scores.cpu(), col_scores.cpu()
        _write(key, scores)
    _memory[key] = scores
    _memory.move_to_end(key)
    while len(_memory) > 1 and sum(rows.nbytes + cols.nbytes for rows, cols in _memory.values()) > MEMORY_LIMIT:
        _memory.popitem(last=False)
    device = decomposition_device(weight)  # another may have no float64
    return scores[0].to(device), scores[1].to(device)


def clear_spectrum_cache() -> None:
    """Forget the scores kept in memory."""
    _memory.clear()


def _content_key(weight: Tensor, precise: bool) -> str:
    content = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{VERSION} {precise} {content.dtype} {tuple(content.shape)} ".encode())
    digest.update(content.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _path(key: str) -> Path | None:
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder).expanduser() / f"{key}.safetensors" if folder else None


def _read(key: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    path = _path(key)
    if path is None or not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None  # an unreadable entry is computed and written again
    rows, cols = tensors.get("row_scores"), tensors.get("col_scores")
    if rows is None or cols is None or (len(rows), len(cols)) != tuple(weight.shape):
        return None
    return rows, cols


def _write(key: str, scores: tuple[Tensor, Tensor]) -> None:
    path = _path(key)
    if path is None:
        return
    try:
        write_whole(path, save({"row_scores": scores[0].contiguous(), "col_scores": scores[1].contiguous()}))
    except OSError as error:
        warnings.warn(f"{CACHE_VARIABLE}: can't write scores to {path.parent} ({error})", RuntimeWarning, stacklevel=2)
