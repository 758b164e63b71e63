"""Finds a saved adapter in a folder or on the Hub, and checks its header."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import AdapterFileError
from smoa.files.save_id import BYTES, is_id

HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "repo_type")


@dataclass(frozen=True)
class AdapterFile:
    """The weights of a saved SMoA adapter, and what their header says."""

    path: Path
    largest_rank: int
    save_id: str | None

    @classmethod
    def opened(cls, path: Path) -> AdapterFile:
        """Read the header.

        Raises:
            AdapterFileError: it is not a regular file or not a whole safetensors file, or has no factor A.
        """
        if not path.is_file():
            raise AdapterFileError(f"{path}: is not a regular file; save the adapter again")
        with _opened(path) as tensors:
            keys = list(tensors.keys())
            shapes = [tensors.get_slice(key).get_shape() for key in keys if key.endswith(".smoa_A.weight")]
            save_id = next((_id(tensors, key) for key in keys if is_id(key)), None)
        if not shapes:
            raise AdapterFileError(f"{path}: has no smoa_A factor, so it does not belong to {CONFIG_NAME}")
        return cls(path, max(shape[0] if shape else 0 for shape in shapes), save_id)

    def read(self) -> dict[str, Tensor]:
        """All tensors except the id, on the CPU.

        Raises:
            AdapterFileError: the file can't be read.
        """
        with _opened(self.path) as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if not is_id(key)}  # noqa: SIM118

    def check_rank(self, module: str, rank: int) -> None:
        """Raise AdapterFileError if the config gives a module a larger rank than any factor in the file has.

        Called for each adapted module before anything of that size is allocated.
        """
        if rank > self.largest_rank:
            raise AdapterFileError(
                f"{self.path.with_name(CONFIG_NAME)}: r or rank_pattern asks for rank {rank} in {module}, but the "
                f"largest factor in {self.path.name} has {self.largest_rank} rows; they come from different adapters"
            )


def smoa_adapter(source: str | os.PathLike[str], **options: Any) -> AdapterFile:
    """Like `find_adapter`, but never None.

    Raises:
        AdapterFileError: there is no SMoA adapter, or `find_adapter` refuses it.
    """
    found = find_adapter(source, **options)
    if found is None:
        raise AdapterFileError(f"{source}: has no {SAFETENSORS_WEIGHTS_NAME} of a SMoA adapter")
    return found


def find_adapter(source: str | os.PathLike[str], config: object = None, **options: Any) -> AdapterFile | None:
    """The weights of the SMoA adapter in a folder or on the Hub.

    Args:
        source: Folder or hub id.
        config: The config to load it with, by default the one in the folder.
        options: PEFT's options, such as `subfolder`, `revision` and `token`. Options not for the Hub are ignored.

    Returns:
        None if there is none or it belongs to another method. PEFT then loads it, or reports what is missing.

    Raises:
        AdapterFileError: the weights are a pickle, are damaged, or come from another adapter than the config.
    """
    options = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    saved = _json(_located(source, CONFIG_NAME, options))
    ours = saved.get("peft_type") == "SMOA" if config is None else isinstance(config, SmoaConfig)
    path = _weights(source, options) if ours else None
    if path is None:
        return None
    file = AdapterFile.opened(path)
    if isinstance(saved.get("save_id"), str) and saved["save_id"] != file.save_id:
        raise AdapterFileError(
            f"{path}: comes from another adapter than {CONFIG_NAME}: their save_id differ; use two files of one save, "
            f"or delete save_id from {CONFIG_NAME} if they do belong together"
        )
    return file


def _id(tensors: Any, key: str) -> str | None:
    view = tensors.get_slice(key)
    whole = view.get_dtype() == "U8" and view.get_shape() == [BYTES]
    return bytes(tensors.get_tensor(key).tolist()).hex() if whole else None


def _weights(source: str | os.PathLike[str], options: dict[str, Any]) -> Path | None:
    path = _located(source, SAFETENSORS_WEIGHTS_NAME, options)
    if path is not None and path.exists():
        return path
    pickle = _located(source, WEIGHTS_NAME, options)
    if pickle is not None and pickle.exists():
        raise AdapterFileError(
            f"{pickle}: is a pickle, which can run code when it is read; save the adapter as {SAFETENSORS_WEIGHTS_NAME}"
        )
    return None


def _located(source: str | os.PathLike[str], name: str, options: dict[str, Any]) -> Path | None:
    """Path of a file in a folder, which may not exist, or downloaded from the Hub; None if the Hub does not have it."""
    if Path(source).exists():
        return Path(source, options.get("subfolder", ""), name)
    try:
        return Path(hf_hub_download(str(source), name, **options))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def _json(path: Path | None) -> dict[str, Any]:
    """The content of a config; empty if it can't be read, which PEFT then reports."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch can't map the file
        raise AdapterFileError(f"{path}: is not a whole safetensors file ({error}); save or fetch it again") from None
