"""Every error is a SmoaError and also the builtin error that fits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class SmoaError(Exception):
    """Base class of all errors that smoa raises on purpose."""


class ConfigError(SmoaError, ValueError):
    """A setting, option or argument is invalid."""


class UnknownSettingError(ConfigError, TypeError):
    """A setting that there is not. PEFT leaves those of newer versions out, which it knows by Python's TypeError."""


class PartitionError(SmoaError, ValueError):
    """A weight can't be partitioned as asked, or labels are not a valid partition of the layer."""


class UnsupportedModuleError(SmoaError, TypeError):
    """SMoA can't adapt this kind of module, or can't change it in its current state."""


class AdapterFileError(SmoaError, ValueError):
    """A saved adapter is damaged, incomplete, or doesn't fit the model."""


class MergeError(SmoaError, ValueError):
    """Adapters can't be merged, unmerged or combined safely."""


class DataError(SmoaError, ValueError):
    """A data set, task or record is invalid."""


class UnsupportedVersionError(SmoaError, ImportError):
    """This release doesn't support the installed version of a required library."""


@contextmanager
def named(place: object) -> Iterator[None]:
    """Put a place before the message of an error of ours in the block, unless the place is None."""
    try:
        yield
    except SmoaError as error:
        if place is None:
            raise
        raise type(error)(f"{place}: {error}") from None


def first_of(names: Sequence[str], shown: int = 3) -> str:
    """The first names and how many more there are: "a, b, c and 2 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the names to choose from if there are at most 20, or nothing."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= 20 else ""
