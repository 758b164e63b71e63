from __future__ import annotations

import math
import time
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study.comparison import Comparison, Executor
from smoa_lab.study.runner import Runner
from smoa_lab.study.study import Entry, Study
from smoa_lab.study.trials import Trial, TrialStore, Untouched
from tests.support import lab
from tests.support.studies import finish


def test_the_untouched_model_is_scored_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.fill_cache(study.folder.with_name("cache"), lab.questions(4, "train"), lab.questions(4, "test"))
    comparison = Comparison(study)
    calls: list[str] = []

    def score(config: RunConfig, part: str) -> dict[str, Any]:
        calls.append(part)
        return {"config": config.model_dump(mode="json"), "scores": {}}

    monkeypatch.setattr(comparison.runner, "untouched", score)
    assert comparison.perform(Untouched()) == comparison.perform(Untouched())
    assert calls == ["test"]
    comparison.runner.shared["training"] = {"use_cpu": True, "max_steps": 3}
    comparison.perform(Untouched())  # no training took place
    comparison.runner.shared["data"] = {"tasks": ["arc_easy"], "test_examples": 2}
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of data"):
        comparison.perform(Untouched())


def test_a_search_is_what_the_study_as_it_is_asks_for(study: Study) -> None:
    """Neither runs of another seed, nor the quarter decades of an earlier search, though they are the best."""
    assert Comparison(study).stored_search("ours") is None
    finish(study, Trial("tuning", "ours", 0.03, 7), 1.0)
    for rate, loss in ((0.01, 2.0), (0.003, 2.2), (0.03, None), (0.006, 1.0), (0.02, 2.1)):
        finish(study, Trial("tuning", "ours", rate, 100), loss)
    search = Comparison(study).stored_search("ours")
    assert search is not None
    assert (search.losses, search.learning_rate) == ({0.003: 2.2, 0.01: 2.0, 0.03: None}, 0.01)


def test_two_drivers_share_a_study_and_run_no_job_twice(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def result(name: str, config: RunConfig) -> dict[str, Any]:
        ran.append((current_thread().name, name))
        time.sleep(0.02)
        loss = abs(math.log10(config.training.get("learning_rate", 1) / 0.1))
        scores = {"all": {"gold_loss": loss, "accuracy": 0.5}}
        return {"config": config.model_dump(mode="json"), "questions": {"nll": [loss]}, "scores": scores}

    def run(self: Runner, entry: Entry, rate: float, seed: int, part: str, work: Path) -> dict[str, Any]:
        return result(work.relative_to(study.folder / "work").as_posix(), self.config(entry, rate, seed))

    monkeypatch.setattr(Runner, "check_needs", lambda self, entry: None)
    monkeypatch.setattr(Runner, "untouched", lambda self, config, part: result("untouched", config))
    monkeypatch.setattr(Runner, "run", run)
    drivers = [Thread(target=Comparison(study).run, name=name) for name in "ab"]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(name for _, name in ran) == TrialStore(study.folder).names()
    assert {driver for driver, _ in ran} == {"a", "b"}
    assert sum(name.startswith("final/") for _, name in ran) == len(study.entries) * len(study.seeds)


def test_one_process_takes_one_job_at_a_time() -> None:
    executor = Executor(lambda job: {"name": job.name})
    assert not executor.is_full
    executor.start(Untouched())
    assert executor.is_full
    assert list(executor.running) == [Untouched()]
    assert executor.next_finished() == (Untouched(), {"name": "untouched"})
    assert not executor.is_full
