"""Trainings that are killed, within this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from smoa_lab.training.trainer import ProgressReport


@contextmanager
def killed_after_saving(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever trains within is killed once it has saved the checkpoint of this step; it fails if it never is."""

    def kill(self: ProgressReport, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "on_save", kill)
        with pytest.raises(KeyboardInterrupt):
            yield
