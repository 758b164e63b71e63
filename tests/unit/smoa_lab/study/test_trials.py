from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.study.trials import TrialStore
from tests.support.lab import files_with


def test_a_trial_that_diverged_is_stored_as_json_that_others_can_read(tmp_path: Path) -> None:
    result = {"config": {"training": {}}, "scores": {"all": {"gold_loss": math.inf}}, "questions": {"nll": [math.nan]}}
    store = TrialStore(tmp_path)
    first = store.get("final/lora/x", {}, lambda work: result)
    assert json.loads(store.file("final/lora/x").read_text(), parse_constant=pytest.fail) == first
    assert (first["scores"]["all"]["gold_loss"], first["questions"]["nll"]) == (None, [None])


def test_no_secret_is_in_a_stored_trial_and_a_changed_one_is_no_other_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of-this-machine")
    store = TrialStore(tmp_path)
    config = {"model": {"name": "x", "options": {"token": "hf_one"}}, "training": {"hub_token": "hf_two", "seed": 1}}
    stored = store.get("final/lora/x", config, lambda work: {"config": config, "told": "hf_of-this-machine"})
    assert stored["config"] == {"model": {"name": "x", "options": {}}, "training": {"seed": 1}}
    assert stored["told"] == "***"
    assert not {secret for secret in ("hf_one", "hf_two", "hf_of-") if files_with(secret, tmp_path)}
    config["training"]["hub_token"] = "hf_three"
    assert store.get("final/lora/x", config, pytest.fail)["config"] == stored["config"]


@pytest.mark.parametrize(("version", "accepted"), [("0.1.0", True), ("0.2.0", False)])
def test_a_trial_of_0_1_ran_with_the_papers_scale(version: str, accepted: bool, tmp_path: Path) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    config = {"method": "smoa", "adapter": {"r": 8}, "training": {}}
    store.file(name).parent.mkdir(parents=True)
    store.file(name).write_text(json.dumps({"config": config, "provenance": {"versions": {"smoa": version}}}))
    wanted = {**config, "adapter": {"r": 8, "scale": "paper"}}
    if accepted:
        assert store.get(name, wanted, pytest.fail)["config"] == config
    else:
        with pytest.raises(ConfigError, match="other values of adapter"):
            store.get(name, wanted, pytest.fail)


def test_a_trial_from_before_samples_were_written_is_the_same(tmp_path: Path) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    config = {"task": {"max_length": 96}, "training": {}}
    store.file(name).parent.mkdir(parents=True)
    store.file(name).write_text(json.dumps({"config": config}))
    assert store.get(name, {**config, "task": {"max_length": 96, "samples": 3}}, pytest.fail)["config"] == config


@pytest.mark.parametrize("recorded", [{}, {"elsewhere": None}, {"elsewhere": {"tasks": ["prose"]}}])
def test_a_trial_that_was_scored_on_another_text_is_refused_if_it_says_so(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    store.file(name).parent.mkdir(parents=True)
    store.file(name).write_text(json.dumps({"config": {"training": {}, **recorded}}))
    wanted = {"training": {}, "elsewhere": {"tasks": ["headlines"]}}
    if not recorded:  # it is from before that was recorded
        assert store.get(name, wanted, pytest.fail)["config"] == {"training": {}}
    else:
        with pytest.raises(ConfigError, match="other values of elsewhere; give the changed one another folder"):
            store.get(name, wanted, pytest.fail)


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
