"""A saved adapter's folder, looked at before PEFT opens its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from smoa.errors import AdapterFileError
from smoa.files.digest import factors_digest, kind_of, tensors_digest


def find_weights(folder: Path) -> Path | None:
    """The weights in a local folder; None if there are none, or it is no folder.

    Raises:
        AdapterFileError: they are a pickle, or no regular file.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.exists() and not file.is_file():
        raise AdapterFileError(f"{file}: is no regular file; save the adapter again")
    pickle = folder / WEIGHTS_NAME
    if not file.exists() and pickle.exists():
        raise AdapterFileError(
            f"{pickle}: smoa reads no pickles, which can run code; have the adapter saved as {SAFETENSORS_WEIGHTS_NAME}"
        )
    return file if file.exists() else None


def largest_rank(file: Path) -> int:
    """Rows of the largest factor A in a file of weights, of which the header alone is read.

    Raises:
        AdapterFileError: it is no whole safetensors file, or has no factor A.
    """
    with _opened(file) as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys() if kind_of(key) == "smoa_A"]  # noqa: SIM118
    if not shapes:
        raise AdapterFileError(
            f"{file}: lacks every smoa_A factor, so it isn't of the adapter that {CONFIG_NAME} is of"
        )
    return max(shape[0] if shape else 0 for shape in shapes)


def saved_digest(file: Path, factors: str | None = None) -> str | None:
    """Digest of all tensors in a file of weights; None if `factors` is given and is not that of its factors."""
    with _opened(file) as tensors:
        everything = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118  (no mapping)
    if factors not in (None, factors_digest(everything)):
        return None
    return tensors_digest((kind_of(key) or "other", tensor) for key, tensor in everything.items())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, RuntimeError) as error:  # the last from torch, when it can't map the file
        raise AdapterFileError(f"{file}: no whole safetensors file ({error}); save or fetch it again") from None
