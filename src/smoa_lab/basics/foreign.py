"""Silences warnings that pass between other libraries, about which neither a user nor the lab can do anything."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

BETWEEN_OTHERS = (
    r"`is_gradient_checkpointing` is deprecated",  # PEFT and transformers
    r"`gradient_checkpointing\w*` is deprecated",  # TRL and transformers
)


def ignore_foreign_warnings() -> None:
    """Ignore these warnings from now on."""
    for message in BETWEEN_OTHERS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def foreign_warnings_ignored() -> Iterator[None]:
    """Ignore these warnings within the block."""
    with warnings.catch_warnings():
        ignore_foreign_warnings()
        yield
