"""A process that is killed in the middle of its work, at any call to the operating system that Python can see."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

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
