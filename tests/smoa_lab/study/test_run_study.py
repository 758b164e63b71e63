"""What is run, in which order, once, and what of it is kept. Nothing is trained; tests/slow has workers that train."""

import logging
import math
import os
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest
import torch

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import run_study
from smoa_lab.study.run_study import duration, next_jobs, work, work_side_by_side
from smoa_lab.training.run_folder import OfAnother, RunFolder
from tests.support.studies import StudyLife

pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.fixture
def no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies run all their rounds: for tests of what is run, and not of what ends it."""
    monkeypatch.setattr(run_study, "verdict", lambda *_: {})


def test_a_study_is_a_folder_of_run_folders_and_a_second_start_runs_nothing(life: StudyLife, no_answers: None) -> None:
    life.start()
    assert life.failed == {}
    ran = len(life.runs.ran)
    assert len(life.named("*/lr-*/metrics.json")) + 2 == ran == 2 + 3 + 3 + 5 + 9
    life.start()
    assert len(life.runs.ran) == ran


def test_the_base_comes_first_then_searches_and_rounds_a_turn_of_all_entries_at_a_time(life: StudyLife) -> None:
    jobs = next_jobs(life.study, {})
    assert [job.name for job in jobs[:2]] == ["untouched", "untouched-validation"]
    assert [job.entry for job in jobs[2:]] == ["ours", "lora", "full"] * 3
    life.start("lora", "full")
    rounds = [path.rsplit("/", 2)[1] for path in life.runs.ran if path.endswith(("seed-0", "seed-1", "seed-2"))]
    assert rounds == ["lora", "full"] * (len(rounds) // 2) + ["lora"] * (len(rounds) % 2)


def test_a_budget_with_its_answer_runs_no_further_and_each_run_is_reported(
    life: StudyLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(run_study, "report", lambda *_: told.append(len(life.runs.ran)))
    life.ask(seeds=7)
    life.start()
    assert told == [number for number, _ in enumerate(life.runs.ran, start=1)]
    assert {name: one.round for name, one in life.verdicts.items()} == {"small": 2, "large": 2}
    assert len(life.named("*/lr-*-seed-?")) == 2 * 3


def test_the_vertex_is_run_and_where_all_rates_are_too_high_the_search_steps_down(life: StudyLife) -> None:
    best = {"smoa": 0.012, "lora": 0.002 / 10}  # of LoRA 6 and more around its start, and the base model reaches 4

    def loss(config: RunConfig) -> float:
        return 2.0 + 8 * math.log10(config.training["learning_rate"] / best.get(config.method, 0.001)) ** 2

    life.runs.loss = loss
    life.start()
    ours, lora = life.chosen("ours"), life.chosen("lora")
    assert (ours.learning_rate, ours.place) == (0.012, "vertex")
    assert life.named("ours/lr-1.2e-2-seed-?")[:2] == [f"ours/lr-1.2e-2-seed-{seed}" for seed in (0, 1)]
    assert [f"{tried:g}" for tried in lora.losses] == ["0.00011", "0.0002", "0.00036", "0.0011", "0.002", "0.0036"]
    assert lora.learning_rate == 0.0002


def test_a_search_that_ended_at_its_edge_goes_on_with_more_runs_and_removes_no_adapter(life: StudyLife) -> None:
    life.edit("entries.lora.learning_rate=8e-5", "keep=all")  # 0.002 is best
    assert "tuning.max_runs" in life.start().verdict[0]
    kept = life.named("lora/*/adapter")
    life.edit("tuning.max_runs=9")
    assert "take lora" in life.start().verdict[0]
    lora = life.chosen("lora")
    assert (lora.place, len(lora.losses)) == ("vertex", 9)
    assert len(kept) >= 2
    assert {*kept} <= {*life.named("lora/*/adapter")}
    assert life.said() == life.alone().said()


def test_without_a_search_entries_run_at_their_own_rates(life: StudyLife) -> None:
    life.edit("tuning.max_runs=0")
    life.start()
    for name, entry in life.study.entries.items():
        assert (life.chosen(name).learning_rate, life.chosen(name).place) == (entry.learning_rate, "named")
    assert life.named("untouched-validation") == []


def test_adapters_are_kept_as_the_study_says_and_none_of_a_search(life: StudyLife, no_answers: None) -> None:
    life.runs.loss = lambda config: life.runs.usual_loss(config) + 0.1 * abs(int(config.training["seed"]) - 1)
    life.edit("keep=all")
    life.start()
    assert life.named("lora/*/adapter") == [f"lora/lr-2e-3-seed-{seed}/adapter" for seed in (0, 1, 2)]
    for keep, kept in (("best", ["lora/lr-2e-3-seed-1/adapter"]), ("none", [])):
        life.edit(f"keep={keep}")
        life.start()
        assert life.named("lora/*/adapter") == kept


def test_a_search_without_final_runs_keeps_the_best_adapter(life: StudyLife) -> None:
    life.edit("seeds=[]")
    life.start("lora")
    assert life.named("*/*/adapter") == ["lora/lr-2e-3-seed-100/adapter"]
    assert life.named("untouched") == []


def test_an_entry_that_fails_is_left_out_and_tried_again_by_the_next_command(life: StudyLife) -> None:
    life.fail("lora")
    life.start()
    assert life.failed == {"lora": "RuntimeError: no memory."}
    assert life.named("lora/*/metrics.json") == []
    assert len(life.named("full/*/metrics.json")) > 5
    life.fail(None)
    life.start()
    assert life.failed == {}
    assert life.said() == life.alone().said()


def test_where_all_entries_fail_the_last_error_ends_the_command(life: StudyLife) -> None:
    life.edit("entries={lora: {method: lora, learning_rate: 0.002}}")
    life.fail("lora")
    with pytest.raises(RuntimeError, match="no memory"):
        life.start()


def raises(error: Exception) -> Any:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


def test_an_unfinished_run_that_cannot_go_on_ends_the_study(life: StudyLife, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_study, "run", raises(OfAnother("an unfinished run of another config")))
    with pytest.raises(OfAnother):
        life.start()


def test_a_run_that_diverged_is_finished_and_the_worst(life: StudyLife, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: RunConfig, may_diverge: bool) -> dict[str, Any]:
        has_diverged = config.method == "lora" and config.training["learning_rate"] > 0.003
        life.runs.loss = (lambda config: None) if has_diverged else life.runs.usual_loss
        return life.runs.run(config)

    monkeypatch.setattr(run_study, "run", run)
    life.start("lora")
    lora = life.chosen("lora")
    assert (lora.losses[0.0036], lora.learning_rate) == (None, 0.002)


def test_a_base_model_whose_loss_is_not_finite_ends_the_study(life: StudyLife) -> None:
    life.runs.untouched_loss = None
    with pytest.raises(ConfigError, match=r"model.*not finite.*float32"):
        work(life.file)


def test_nothing_starts_after_the_deadline(life: StudyLife, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    life.start(deadline=time.time() - 1)
    assert life.runs.ran == []
    assert "time is used" in caplog.text


def test_times_are_told_in_words() -> None:
    assert [duration(seconds) for seconds in (40, 180, 9000)] == ["40 s", "3 min", "2.5 h"]


@pytest.mark.parametrize(("metric", "key"), [("exact", "exact"), ("choice", "accuracy")])
def test_the_log_says_what_a_run_reached_and_a_search_goes_by_the_loss(
    metric: str, key: str, life: StudyLife, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(config: RunConfig, may_diverge: bool) -> dict[str, Any]:
        metrics = life.runs.run(config)
        metrics["evaluation"]["after"] |= {} if config.data.metric is None else {key: 0.75}
        return metrics

    life.runs.kind = "choices" if metric == "choice" else "messages"
    monkeypatch.setattr(run_study, "run", run)
    caplog.set_level("INFO")
    life.edit(f"shared.data.metric={metric}")
    life.start("lora")
    assert "lora/lr-2e-3-seed-100: loss 2.1000 (" in caplog.text
    final = next(record.message for record in caplog.records if record.message.startswith("lora/lr-2e-3-seed-0: "))
    assert "75.0 %, loss 2.1000" in final


# several processes


@pytest.fixture
def slow(life: StudyLife, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The thread and the folder of each run, which takes a moment."""
    ran: list[tuple[str, str]] = []

    def loss(config: RunConfig) -> float | None:
        ran.append((current_thread().name, "/".join(config.folder.parts[-2:])))
        time.sleep(0.02)
        return life.runs.usual_loss(config)

    life.runs.loss = loss
    return ran


def test_two_processes_share_a_study_and_run_no_job_twice(life: StudyLife, slow: list[tuple[str, str]]) -> None:
    life.edit("tuning.max_runs=3")
    life.start("full")  # imports TRL, which two threads can't do at once
    slow.clear()
    drivers = [Thread(target=work, args=(life.file, ["small"]), name=name) for name in "ab"]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(name for _, name in slow) == life.named("[lo]*/lr-*")
    assert {driver for driver, _ in slow} == {"a", "b"}
    life.check()


def test_a_process_that_finds_a_job_taken_runs_the_next_and_comes_back(
    life: StudyLife, slow: list[tuple[str, str]]
) -> None:
    taken = next(job for job in next_jobs(life.study, {}) if job.entry == "lora" and job.stage == "search")
    with RunFolder(life.file.parent / taken.name).alone():
        driver = Thread(target=work, args=(life.file, ["lora"]), daemon=True)
        driver.start()
        deadline = time.monotonic() + 30
        while not slow and time.monotonic() < deadline:
            time.sleep(0.01)
        assert slow
        assert taken.name not in [name for _, name in slow]
    driver.join(30)
    assert taken.name in [name for _, name in slow]


def test_a_killed_process_loses_one_run_and_the_same_command_goes_on_to_the_same_bounds(life: StudyLife) -> None:
    for after in (2, 7, 1):
        life.kill(after)
    assert len(life.runs.ran) == 2 + 2 + 7 + 1
    life.start()
    assert life.said() == life.alone().said()


def test_workers_have_the_folder_and_trust_of_the_command_its_cores_and_a_gpu_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    seen: list[Any] = []

    class Pool:
        """Of one process, this one, which does nothing."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(self, task: Any, places: Any) -> Any:
            for place in places:
                task(place)
                seen.append((os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()))
            return [{}, {"lora": "failed"}, {}]

    threads = torch.get_num_threads()
    monkeypatch.setattr(run_study, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(run_study, "work", lambda *given: seen.append(given[1:]))
    try:
        assert work_side_by_side(Path("study.yaml"), ["lora"], 9.0, 3) == {"lora": "failed"}
    finally:
        torch.set_num_threads(threads)
        logging.getLogger("smoa_lab.study").handlers = []
    assert seen[::2] == [(["lora"], 9.0)] * 3
    assert seen[1::2] == [("5", 2), ("7", 2), ("5", 2)]
    monkeypatch.setattr(Pool, "map", raises(BrokenProcessPool()))
    with pytest.raises(DataError, match="a worker died"):
        work_side_by_side(Path("study.yaml"), (), 9.0, 1)
