"""Runs are stored and found, wherever a process is killed, and damage is named."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.study.trials import TrialStore


def test_how_many_samples_a_run_shows_makes_no_other_config(tmp_path: Path) -> None:
    store, config = TrialStore(tmp_path), {"training": {"seed": 1}, "task": {"max_length": 96}}
    stored = store.get("final/lora/x", config, lambda work: {"config": config})
    config["task"] = {"max_length": 96, "samples": 3}  # which earlier releases did not store
    assert store.get("final/lora/x", config, pytest.fail) == stored


def test_a_trial_that_another_process_runs_is_waited_for(tmp_path: Path) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    began, may_end = Event(), Event()

    def slow(work: Path) -> dict[str, Any]:
        began.set()
        assert may_end.wait(60)
        return {"config": {"training": {}}}

    assert not store.is_running(name)
    other = Thread(target=store.get, args=(name, {"training": {}}, slow))
    other.start()
    assert began.wait(60)
    assert store.is_running(name)
    may_end.set()
    assert store.get(name, {"training": {}}, pytest.fail) == store.find(name)
    other.join()
    assert not store.is_running(name)
    assert not list(tmp_path.glob("work/locks/*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_trial_whose_process_died_is_free(tmp_path: Path) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    process = os.fork()
    if process == 0:
        store.get(name, {"training": {}}, lambda work: os.kill(os.getpid(), signal.SIGKILL) or {})
    os.waitpid(process, 0)
    assert list(tmp_path.glob("work/locks/*"))
    assert not store.is_running(name)
    result = {"config": {"training": {}}}
    assert store.get(name, {"training": {}}, lambda work: result)["name"] == name


@pytest.mark.parametrize("content", ['{"config": ', ""])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, content: str) -> None:
    store = TrialStore(tmp_path)
    store.get("untouched", {}, lambda work: {"config": {"training": {}}})
    store.file("untouched").write_text(content)
    with pytest.raises(DataError, match=r"untouched\.json: is not JSON .*; delete it to run it again"):
        store.find("untouched")
