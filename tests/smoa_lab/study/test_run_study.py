"""What is run, in which order, once, and what of it is kept. Nothing is trained."""

import logging
import math
import os
import signal
import time
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import run_study
from smoa_lab.study.finished import chosen, done, finals, read_finished, search
from smoa_lab.study.run_study import at_most_left, duration, next_jobs, work
from smoa_lab.study.study import edit, load_study
from smoa_lab.training.run_folder import OfAnother, RunFolder
from smoa_lab.training.trainer import Diverged
from tests.support.studies import BEST, WrittenRuns, finished, tiny_study, verdicts

pytestmark = pytest.mark.usefixtures("quick_pictures")


def folders(file: Path, pattern: str = "*/lr-*") -> list[str]:
    return sorted(path.relative_to(file.parent).as_posix() for path in file.parent.glob(pattern))


def without_answers(patch: pytest.MonkeyPatch) -> None:
    """Studies run all their rounds: for tests of what is run, and not of what ends it."""
    patch.setattr("smoa_lab.study.run_study.verdict", lambda *_: {})


@pytest.fixture
def no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    without_answers(monkeypatch)


def test_a_study_is_a_folder_of_run_folders_each_run_once(file: Path, written: WrittenRuns, no_answers: None) -> None:
    assert work(file) == {}
    ran = [Path(path).relative_to(file.parent).as_posix() for path in written.ran]
    assert sorted(ran) == [*folders(file), "untouched", "untouched-validation"]
    assert len(ran) == 2 + 3 + 3 + 5 + 9
    work(file)
    assert len(written.ran) == len(ran)


def test_the_base_comes_first_then_searches_and_rounds_a_turn_of_all_entries_at_a_time(
    file: Path, written: WrittenRuns
) -> None:
    jobs = next_jobs(load_study(file), {})
    assert [job.name for job in jobs[:2]] == ["untouched", "untouched-validation"]
    assert [job.entry for job in jobs[2:]] == ["ours", "lora", "full"] * 3
    work(file, ["lora", "full"])
    rounds = [path.rsplit("/", 2)[1:] for path in written.ran if path.endswith(("seed-0", "seed-1", "seed-2"))]
    assert [entry for entry, _ in rounds] == ["lora", "full"] * (len(rounds) // 2) + ["lora"] * (len(rounds) % 2)


def test_a_budget_with_its_answer_runs_no_further(file: Path, written: WrittenRuns) -> None:
    edit(file, ["seeds=[0,1,2,3,4,5,6]"])
    finished(file)
    assert {name: one.round for name, one in verdicts(file).items()} == {"small": 2, "large": 2}
    assert len(folders(file, "*/lr-*-seed-?")) == 2 * 3


def test_the_vertex_is_run_and_where_all_rates_are_too_high_the_search_steps_down(
    file: Path, written: WrittenRuns
) -> None:
    best = {"smoa": 0.012, "lora": 0.002 / 10}

    def loss(config: RunConfig) -> float:
        return 2.0 + 8 * math.log10(config.training["learning_rate"] / best.get(config.method, 0.001)) ** 2

    written.loss = loss  # of LoRA 6 and more around its start, and the base model reaches 4
    work(file)
    study = load_study(file)
    ours, lora = (chosen(study, read_finished(study), name) for name in ("ours", "lora"))
    assert ours is not None
    assert lora is not None
    assert (ours.learning_rate, ours.place) == (0.012, "vertex")
    assert folders(file, "ours/lr-1.2e-2-seed-?")[:2] == [f"ours/lr-1.2e-2-seed-{seed}" for seed in (0, 1)]
    assert [f"{tried:g}" for tried in lora.losses] == ["0.00011", "0.0002", "0.00036", "0.0011", "0.002", "0.0036"]
    assert lora.learning_rate == 0.0002


def test_a_search_that_ended_at_its_edge_goes_on_with_more_runs(file: Path, written: WrittenRuns) -> None:
    edit(file, ["entries.lora.learning_rate=8e-5"])  # 0.002 is best
    assert "tuning.max_runs" in finished(file).verdict[0]
    edit(file, ["tuning.max_runs=9"])
    assert "take lora" in finished(file).verdict[0]
    study = load_study(file)
    lora = chosen(study, read_finished(study), "lora")
    assert lora is not None
    assert (lora.place, len(lora.losses)) == ("vertex", 9)
    assert len(written.ran) == len(set(written.ran))


@pytest.mark.parametrize("best", [0.002, 0.006])
def test_a_search_waits_for_the_untouched_model_after_its_first_rates(
    best: float, file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it goes, or whether it is over, is not decided by which worker is quicker."""
    monkeypatch.setitem(BEST, "lora", best)
    work(file, ["lora"])
    study, known = load_study(file), dict(read_finished(load_study(file)))
    del known["untouched-validation"]
    losses, jobs = search(study, known, "lora")
    assert (len(losses), [job.name for job in jobs]) == (3, ["untouched-validation"])
    assert chosen(study, known, "lora") is None
    assert finals(study, known, "lora") == {}
    assert chosen(study, read_finished(study), "lora") is not None


def test_without_a_search_entries_run_at_their_own_rates(file: Path, written: WrittenRuns) -> None:
    edit(file, ["tuning.max_runs=0"])
    work(file)
    study = load_study(file)
    for name, entry in study.entries.items():
        one = chosen(study, read_finished(study), name)
        assert one is not None
        assert (one.learning_rate, one.place) == (entry.learning_rate, "named")
    assert not (file.parent / "untouched-validation").exists()


@pytest.mark.parametrize(("keep", "adapters"), [("best", 1), ("all", 3), ("none", 0)])
def test_adapters_are_kept_as_the_study_says_and_none_of_a_search(
    keep: str, adapters: int, file: Path, written: WrittenRuns, no_answers: None
) -> None:
    written.loss = lambda config: written.usual_loss(config) + 0.1 * abs(int(config.training["seed"]) - 1)
    edit(file, [f"keep={keep}"])
    work(file)
    kept = folders(file, "lora/*/adapter")
    assert kept == folders(file, "lora/lr-2e-3-seed-[012]/adapter")
    assert len(kept) == adapters
    if keep == "best":
        assert kept == ["lora/lr-2e-3-seed-1/adapter"]


def test_a_search_that_goes_on_removes_no_adapter_of_final_runs(file: Path, written: WrittenRuns) -> None:
    edit(file, ["entries.lora.learning_rate=8e-5", "keep=all"])
    work(file)
    kept = folders(file, "lora/*/adapter")
    edit(file, ["tuning.max_runs=9"])
    work(file)
    assert len(kept) >= 2
    assert {*kept} <= {*folders(file, "lora/*/adapter")}


def test_a_search_without_final_runs_keeps_the_best_adapter(file: Path, written: WrittenRuns) -> None:
    edit(file, ["seeds=[]"])
    work(file, ["lora"])
    assert folders(file, "*/*/adapter") == ["lora/lr-2e-3-seed-100/adapter"]
    assert not (file.parent / "untouched").exists()


def test_an_entry_that_fails_is_left_out_and_tried_again_by_the_next_command(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        if config.method == "lora":
            raise RuntimeError("out of memory")
        return written.run(config)

    monkeypatch.setattr(run_study, "run", run)
    assert work(file) == {"lora": "RuntimeError: out of memory"}
    assert not list((file.parent / "lora").glob("*/metrics.json"))
    assert len(list(file.parent.glob("full/*/metrics.json"))) > 5
    monkeypatch.setattr(run_study, "run", written.run)
    assert work(file) == {}
    assert len(list((file.parent / "lora").glob("*/metrics.json"))) >= 5


def test_where_all_entries_fail_the_last_error_ends_the_command(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        raise MemoryError(config.method)

    monkeypatch.setattr(run_study, "run", run)
    with pytest.raises(MemoryError):
        work(file)


def test_an_unfinished_run_that_cannot_go_on_ends_the_study(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        raise OfAnother("an unfinished run of another config")

    monkeypatch.setattr(run_study, "run", run)
    with pytest.raises(OfAnother):
        work(file)


def test_a_run_that_diverged_is_finished_and_the_worst(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        if config.method == "lora" and config.training["learning_rate"] > 0.003:
            error = Diverged("diverged")
            written.loss = lambda config: None
            error.finish = lambda: written.write(config)
            raise error
        written.loss = written.usual_loss
        return written.run(config)

    monkeypatch.setattr(run_study, "run", run)
    work(file, ["lora"])
    study = load_study(file)
    one = chosen(study, read_finished(study), "lora")
    assert one is not None
    assert (one.losses[0.0036], one.learning_rate) == (None, 0.002)


def test_a_base_model_whose_loss_is_not_finite_ends_the_study(
    file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(config: RunConfig) -> dict[str, Any]:
        metrics = written.untouched(config)
        metrics["evaluation"]["before"]["loss"] = None
        return metrics

    monkeypatch.setattr(run_study, "score_untouched", untouched)
    with pytest.raises(ConfigError, match="model: the base model's loss is not finite"):
        work(file)


def test_nothing_starts_after_the_deadline(file: Path, written: WrittenRuns, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    work(file, deadline=time.time() - 1)
    assert written.ran == []
    assert "time is used" in caplog.text


def test_what_is_left_is_never_more_than_told(file: Path, written: WrittenRuns) -> None:
    study, left = load_study(file), list[int]()

    def loss(config: RunConfig) -> float | None:
        left.append(at_most_left(study, read_finished(study), [], {}))
        return written.usual_loss(config)

    written.loss = loss
    work(file)
    left.append(at_most_left(study, read_finished(study), [], {}))
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert [duration(seconds) for seconds in (40, 180, 9000)] == ["40 s", "3 min", "2.5 h"]


@pytest.mark.parametrize(("metric", "key"), [("exact", "exact"), ("choice", "accuracy")])
def test_the_log_says_what_a_run_reached_and_a_search_goes_by_the_loss(
    metric: str, key: str, file: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        metrics = written.run(config)
        metrics["evaluation"]["after"] |= {} if config.data.metric is None else {key: 0.75}
        return metrics

    written.kind = "choices" if metric == "choice" else "messages"
    monkeypatch.setattr(run_study, "run", run)
    caplog.set_level("INFO")
    edit(file, [f"shared.data.metric={metric}"])
    work(file, ["lora"])
    lines = [record.message for record in caplog.records]
    assert any(line.startswith("lora/lr-2e-3-seed-100: loss 2.1000 (") for line in lines)
    final = next(line for line in lines if line.startswith("lora/lr-2e-3-seed-0: "))
    assert "75.0 %, loss 2.1000" in final


# several processes


@pytest.fixture
def slow(written: WrittenRuns, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The thread and the folder of each run, which takes a moment."""
    ran: list[tuple[str, str]] = []

    def run(config: RunConfig) -> dict[str, Any]:
        with RunFolder(config.folder).alone():
            if RunFolder(config.folder).finished:
                raise ConfigError("contains a finished run")
            ran.append((current_thread().name, "/".join(config.folder.parts[-2:])))
            time.sleep(0.02)
            return written.write(config)

    monkeypatch.setattr(run_study, "run", run)
    monkeypatch.setattr(run_study, "report", lambda *_: None)  # which threads can't draw at once
    return ran


def test_two_processes_share_a_study_and_run_no_job_twice(file: Path, slow: list[tuple[str, str]]) -> None:
    edit(file, ["tuning.max_runs=3"])
    work(file, ["full"])  # imports TRL, which two threads can't do at once
    slow.clear()
    drivers = [Thread(target=work, args=(file, ["small"]), name=name) for name in "ab"]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(name for _, name in slow) == folders(file, "[lo]*/lr-*")
    assert {driver for driver, _ in slow} == {"a", "b"}


def test_a_process_that_finds_a_job_taken_runs_the_next_and_comes_back(file: Path, slow: list[tuple[str, str]]) -> None:
    study = load_study(file)
    taken = next(job for job in next_jobs(study, {}) if job.entry == "lora" and job.stage == "search")
    with RunFolder(file.parent / taken.name).alone():
        driver = Thread(target=work, args=(file, ["lora"]), daemon=True)
        driver.start()
        deadline = time.monotonic() + 30
        while not slow and time.monotonic() < deadline:
            time.sleep(0.01)
        assert slow
        assert taken.name not in [name for _, name in slow]
    driver.join(30)
    assert taken.name in [name for _, name in slow]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_process_loses_one_run_and_the_same_command_goes_on_to_the_same_bounds(
    file: Path, tmp_path: Path, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(tiny_study(tmp_path / "whole")).summary

    for victim in ("lr-2e-3-seed-100", "lr-1e-2-seed-0", "lr-2e-3-seed-1"):

        def dying(config: RunConfig, victim: str = victim) -> dict[str, Any]:
            with RunFolder(config.folder).alone():
                if config.folder.name == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                return written.write(config)

        if (process := os.fork()) == 0:
            monkeypatch.setattr(run_study, "run", dying)
            work(file)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status)
    written.ran.clear()
    again = finished(file).summary
    assert 0 < len(written.ran) < 8
    for name, budget in whole["budgets"].items():
        assert {key: again["budgets"][name][key] for key in ("pairs", "gains", "take", "round")} == {
            key: budget[key] for key in ("pairs", "gains", "take", "round")
        }


# whose run it is


def test_a_run_of_another_config_is_refused_whatever_made_it_differ(file: Path, written: WrittenRuns) -> None:
    finished(file)
    edit(file, ["shared.training.max_steps=7"])
    study = load_study(file)
    with pytest.raises(ConfigError, match=r"has a run with another training\.max_steps"):
        next_jobs(study, read_finished(study))
    edit(file, ["shared.training.max_steps=100", "entries.lora.adapter={r: 4}"])
    study = load_study(file)
    with pytest.raises(ConfigError, match=r"lora/.*another adapter\.r"):
        next_jobs(study, read_finished(study))


def test_the_base_model_is_the_same_whatever_is_trained(file: Path, written: WrittenRuns) -> None:
    work(file)
    edit(file, ["shared.training.max_steps=7", "entries.ours.adapter={r: 4}"])
    study = load_study(file)
    assert done(study, read_finished(study), study.untouched("untouched")) is not None
    edit(file, ["shared.data.max_length=64"])
    study = load_study(file)
    with pytest.raises(ConfigError, match=r"untouched: .*data\.max_length"):
        done(study, read_finished(study), study.untouched("untouched"))


def test_runs_on_other_rows_or_another_base_are_refused(file: Path, written: WrittenRuns) -> None:
    work(file, ["lora"])
    written.digests["base"] = "other"
    with pytest.raises(DataError, match="another base"):
        work(file)


def test_a_damaged_file_of_a_run_is_named(file: Path, written: WrittenRuns) -> None:
    finished(file)
    victim = next(file.parent.glob("lora/lr-2e-3-seed-0/rows.jsonl.gz"))
    victim.write_bytes(victim.read_bytes()[:40])
    (victim.parent / "metrics.json").touch()
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: is damaged"):
        finished(file)
