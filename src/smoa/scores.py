"""The spectral scores of weights, which smoa keeps on disk.

They are kept by a hash of the weight's content, so that a second adapter on the same weight needs no decomposition,
whatever its K. They are in the user's cache folder, or in the one that the environment variable `SMOA_SPECTRUM_CACHE`
names; "off" keeps none. docs/cli.md says how large they get.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from smoa.spectrum import decomposition_device, spectral_scores

CACHE_VARIABLE = "SMOA_SPECTRUM_CACHE"
DISK_LIMIT = 512 << 20
"""Bytes that the files take: the scores of all experts of a mixture of 30B parameters fit."""
VERSION = "3"
"""Part of the key, to be increased when a change of the code changes the scores of a weight."""


def cached_spectral_scores(weight: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    """`spectral_scores(weight, precise)`, from disk if a weight of equal content was decomposed before."""
    if (folder := _folder()) is None:
        return spectral_scores(weight, precise)
    content = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{VERSION} {precise} {content.dtype} {tuple(content.shape)} ".encode())
    digest.update(content.flatten().view(torch.uint8).numpy().data)
    path, sizes = folder / f"{digest.hexdigest()}.scores", list(weight.shape)
    dtype = torch.float64 if precise or weight.dtype == torch.float64 else torch.float32
    with suppress(OSError):
        values = bytearray(path.read_bytes())
        if len(values) == sum(sizes) * dtype.itemsize:
            path.touch()  # used now
            rows, cols = torch.frombuffer(values, dtype=dtype).to(decomposition_device(weight.device)).split(sizes)
            return rows, cols
    rows, cols = spectral_scores(weight, precise)
    with suppress(OSError):  # a full disk, or a folder of others
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(torch.cat([rows, cols]).cpu().numpy().tobytes())  # a part of it has another length
        _delete_oldest(folder)
    return rows, cols


def clear_spectrum_cache() -> None:
    """Delete the scores that smoa keeps on disk."""
    if (folder := _folder()) is not None:
        for path in folder.glob("*.scores"):
            path.unlink(missing_ok=True)


def _folder() -> Path | None:
    """Where scores are kept; None if nowhere."""
    caches = os.environ.get("SMOA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "smoa")
    folder = os.environ.get(CACHE_VARIABLE, str(Path(caches, "scores")))
    return None if folder in ("", "0", "off") else Path(folder).expanduser()


def _delete_oldest(folder: Path) -> None:
    """Delete the files that were used longest ago, until the others take `DISK_LIMIT` at most."""
    files = sorted(((own.stat(), own) for own in folder.glob("*.scores")), key=lambda file: file[0].st_mtime_ns)
    excess = sum(stat.st_size for stat, _ in files) - DISK_LIMIT
    for stat, path in files:
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= stat.st_size
