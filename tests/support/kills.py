"""Trainings that are killed, within this process."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
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


# processes

CALLS = ("open", "os.", "shutil.", "tempfile.")


def killed_at(
    number: int, action: Callable[[], object], counts: Callable[[str, tuple[Any, ...]], bool] | None = None
) -> bool:
    """Run `action` in a forked process that is killed (SIGKILL) at its call of that number; False if there are fewer.

    `counts` says by a call's name and arguments whether it counts; by default every one does.
    """
    process = os.fork()
    if process == 0:
        _run_and_die(number, action, counts or (lambda *call: True))
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the action failed"
    return os.WIFSIGNALED(status)


def _run_and_die(number: int, action: Callable[[], object], counts: Callable[[str, tuple[Any, ...]], bool]) -> None:
    seen = 0

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.startswith(CALLS) and counts(event, arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)
