"""The spectral scores of weights, which smoa keeps in memory, and on disk for other processes.

They are kept by a hash of the weight's content, so that a second adapter on the same weight needs no decomposition,
whatever its K. On disk they are in the user's cache folder, or in the one that the environment variable
`SMOA_SPECTRUM_CACHE` names; "off" keeps none there. docs/files.md says what the files hold.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from smoa.atomic import write_whole
from smoa.maths.spectrum import decomposition_device, spectral_scores

CACHE_VARIABLE = "SMOA_SPECTRUM_CACHE"
MEMORY_LIMIT = 64 << 20
"""Bytes of scores kept in memory. A weight takes 4(m+n), the 160 weights of a Llama-3-8B adapter take 8 MB."""
DISK_LIMIT = 512 << 20
"""Bytes that the files take on disk: the scores of all experts of a mixture of 30B parameters fit."""
FOLDERS = 16
"""The files are spread over folders by the first digit of their names, so that a writer looks at few of them."""
FILE_SYSTEM_BLOCK = 4096
"""Bytes that a smaller file takes too."""
VERSION = "2"
"""Part of the key, to be increased when a change of the code changes the scores of a weight."""

_memory: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()


def cached_spectral_scores(weight: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    """`spectral_scores(weight, precise)`, from memory or disk if a weight of equal content was decomposed before."""
    content = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{VERSION} {precise} {content.dtype} {tuple(content.shape)} ".encode())
    digest.update(content.flatten().view(torch.uint8).numpy().data)
    key = digest.hexdigest()
    dtype = torch.float64 if precise or weight.dtype == torch.float64 else torch.float32
    scores = _memory.get(key) or _read(key, weight.shape, dtype)
    if scores is None:
        row_scores, col_scores = spectral_scores(weight, precise)
        scores = row_scores.cpu(), col_scores.cpu()
        _write(key, scores)
    _memory[key] = scores
    _memory.move_to_end(key)
    while len(_memory) > 1 and sum(rows.nbytes + cols.nbytes for rows, cols in _memory.values()) > MEMORY_LIMIT:
        _memory.popitem(last=False)
    device = decomposition_device(weight.device)  # another may have no float64
    return scores[0].to(device), scores[1].to(device)


def clear_spectrum_cache() -> None:
    """Forget the scores kept in memory. Those on disk stay."""
    _memory.clear()


def _path(key: str) -> Path | None:
    """The file of a key; None if nothing is kept on disk, or there is no home folder."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder is None:
        caches = os.environ.get("SMOA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "smoa")
        folder = str(Path(caches, "scores"))
    if folder in ("", "0", "off"):
        return None
    try:
        return Path(folder).expanduser() / key[0] / key
    except RuntimeError:
        return None


def _read(key: str, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The scores in a file, unless it is missing or damaged."""
    if (path := _path(key)) is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, values = content[:32], content[32:]
    if len(values) != sum(shape) * dtype.itemsize or hashlib.sha256(values).digest() != checksum:
        return None  # computed and written again
    with suppress(OSError):  # others may own it
        os.utime(path)  # used now
    rows, cols = torch.frombuffer(bytearray(values), dtype=dtype).split(list(shape))
    return rows, cols


def _write(key: str, scores: tuple[Tensor, Tensor]) -> None:
    """Keep scores on disk: a checksum, the row scores and the column scores. If that fails, nothing else does."""
    if (path := _path(key)) is None:
        return
    values = torch.cat(scores).numpy().tobytes()
    try:
        write_whole(path, hashlib.sha256(values).digest() + values)
    except OSError as error:
        if CACHE_VARIABLE in os.environ:  # a user who named no folder may have none to write to
            told = f"{CACHE_VARIABLE}: can't write scores to {path.parent} ({error}); name another folder, or 'off'"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        return
    with suppress(OSError):  # another process may delete the same files
        _delete_oldest(path.parent)


def _delete_oldest(folder: Path) -> None:
    """Delete the files of scores that were used longest ago, until the others take its part of `DISK_LIMIT`."""
    with os.scandir(folder) as entries:  # a user may name a folder with other files
        files = [(own.stat(), own.path) for own in entries if re.fullmatch(r"\.?[0-9a-f]{64}(\..*)?", own.name)]
    taken = 0
    for stat, path in sorted(files, key=lambda file: -file[0].st_mtime_ns):
        taken += max(stat.st_size, FILE_SYSTEM_BLOCK)
        if taken > DISK_LIMIT // FOLDERS:
            Path(path).unlink(missing_ok=True)
