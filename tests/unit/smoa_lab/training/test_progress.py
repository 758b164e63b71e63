from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_lab.training.loaded_run import ProgressReport


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_bar_follows_the_run_on_a_terminal_alone(on_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = io.StringIO()
    stream.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    report, arguments = ProgressReport(), SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)
    report.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    state.global_step = 2
    report.on_step_end(arguments, state, None)  # type: ignore[arg-type]
    report.on_log(arguments, state, None, {"loss": 1.5})  # type: ignore[arg-type]
    report.on_train_end(arguments, state, None)
    assert ("2/4" in stream.getvalue() and "loss 1.5" in stream.getvalue()) == on_terminal
    assert on_terminal or not stream.getvalue()  # not even an empty line
