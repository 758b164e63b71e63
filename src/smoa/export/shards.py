"""Reads and writes safetensors checkpoints one tensor at a time.

`safetensors.torch.save_file` takes all tensors of a file at once and copies them. Here only one is in memory, for any
shard size. A file consists of eight bytes with the header's length (little endian), the header (JSON: name → dtype,
shape, offsets), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from smoa.errors import MergeError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
CHUNK = 1 << 22
"""Number of entries that are cast and written at a time."""


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor's entry in a checkpoint's header; `dtype` as safetensors names it ("F32", "BF16", …)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * SIZES.get(self.dtype, 1)

    def cast(self, dtype: torch.dtype | None) -> HeaderEntry:
        """The entry in another dtype. Without a dtype, or for a tensor that is not a float, the entry itself."""
        return self if dtype is None or self.dtype not in FLOATS else HeaderEntry(NAMES[dtype], self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> HeaderEntry:
        """HeaderEntry of a floating-point tensor in memory."""
        return cls(NAMES[tensor.dtype], tuple(tensor.shape))


class Checkpoint:
    """The safetensors files of a folder: `entries` come from their headers, `read` loads one tensor.

    Raises:
        MergeError: the index names a file that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.entries: dict[str, HeaderEntry] = {}
        for file in sorted(set(self.files.values())):
            with safe_open(folder / file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (safe_open is not a dict)
                    part = opened.get_slice(key)
                    self.entries[key] = HeaderEntry(part.get_dtype(), tuple(part.get_shape()))

    def read(self, key: str) -> Tensor:
        """One tensor. The file is opened for it only, so that its mapped memory is freed with the tensor."""
        with safe_open(self.folder / self.files[key], "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor


def has_safetensors(folder: Path) -> bool:
    """Whether the folder has weights that `Checkpoint` can read."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def _files(folder: Path) -> dict[str, str]:
    """The file of every tensor."""
    if not (folder / INDEX).is_file():
        with safe_open(folder / SINGLE, "pt") as opened:
            return dict.fromkeys(opened.keys(), SINGLE)
    files: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise MergeError(
            f"{folder / INDEX}: names {', '.join(missing[:3])}, which is missing; download the checkpoint again"
        )
    return files


def write_checkpoint(
    folder: Path, entries: dict[str, HeaderEntry], read: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Write `model.safetensors`, or shards and their index.

    Args:
        folder: An existing folder.
        entries: Dtype and shape of each tensor, by name.
        read: Called once for each tensor, in turn. A tensor of another dtype is cast.
        max_shard_size: Largest file, in bytes or as text ("5GB").
    """
    plan: Any = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, keys in plan.filename_to_tensors.items():
        _write_file(folder / file, {key: entries[key] for key in keys}, read)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: dict[str, HeaderEntry], read: Callable[[str], Tensor]) -> None:
    """Write one file, wide dtypes first, so that every tensor is aligned."""
    order = sorted(entries, key=lambda key: -SIZES.get(entries[key].dtype, 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        entry = entries[key]
        span = [offset, offset + entry.nbytes]
        header[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            file.writelines(_chunks(read(key), entries[key]))


def _chunks(tensor: Tensor, entry: HeaderEntry) -> Iterable[memoryview]:
    dtype = FLOATS.get(entry.dtype, tensor.dtype)
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        yield chunk.to(dtype).contiguous().view(torch.uint8).numpy().data
