"""A saved adapter's folder, looked at before PEFT opens its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .digest import kind_of, tensors_digest
from .errors import AdapterFileError


@dataclass(frozen=True)
class Factors:
    """What the file of an adapter's weights holds: rows of its largest factor A, and the digest of all its tensors."""

    file: Path
    largest_rank: int
    digest: str | None


def read_factors(folder: Path) -> Factors | None:
    """Of the weights in a local folder; None if there are none, or it is no folder.

    Raises:
        AdapterFileError: the weights are a pickle, no regular file, no whole safetensors file, or hold no factor A.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        _refuse_pickle(folder / WEIGHTS_NAME)
        return None
    if not file.is_file():
        raise AdapterFileError(f"{file}: is no regular file; save the adapter again")
    try:
        with safe_open(file, "pt") as tensors:
            kinds = {key: kind for key in tensors.keys() if (kind := kind_of(key))}  # noqa: SIM118  (no mapping)
            shapes = [tensors.get_slice(key).get_shape() for key, kind in kinds.items() if kind == "smoa_A"]
            digest = tensors_digest((kind, tensors.get_tensor(key)) for key, kind in kinds.items())
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file}: no whole safetensors file ({error}); save or fetch it again") from None
    if not shapes:
        raise AdapterFileError(
            f"{file}: lacks every smoa_A factor, so it isn't of the adapter that {CONFIG_NAME} is of"
        )
    return Factors(file, max(shape[0] if shape else 0 for shape in shapes), digest)


def _refuse_pickle(file: Path) -> None:
    if file.exists():
        raise AdapterFileError(
            f"{file}: smoa reads no pickles, which can run code; have the adapter saved as {SAFETENSORS_WEIGHTS_NAME}"
        )
