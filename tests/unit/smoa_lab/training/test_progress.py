from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from smoa_lab.training.loaded_run import ProgressReport


def test_a_bar_follows_the_run_on_a_terminal() -> None:
    report = ProgressReport()
    report.on_terminal = True
    arguments, state = (
        TrainingArguments(use_cpu=True),
        SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0),
    )
    report.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    state.global_step = 2
    report.on_step_end(arguments, state, None)  # type: ignore[arg-type]
    report.on_log(arguments, state, None, {"loss": 1.5})  # type: ignore[arg-type]
    assert report.bar.tasks[0].completed == 2
    assert report.bar.tasks[0].description == "loss 1.5"
    report.on_train_end(arguments, state, None)  # type: ignore[arg-type]
    assert not report.bar.live.is_started


def test_in_a_pipe_there_is_not_even_an_empty_line(capfd: pytest.CaptureFixture[str]) -> None:
    report = ProgressReport()
    arguments, state = TrainingArguments(use_cpu=True), SimpleNamespace(is_world_process_zero=True, global_step=0)
    report.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    report.on_train_end(arguments, state, None)
    found = capfd.readouterr()
    assert found.out + found.err == ""
