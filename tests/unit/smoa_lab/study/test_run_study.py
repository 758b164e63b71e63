"""What is run, in which order, once, and what of it is kept. Nothing is trained."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import peft
import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import run_study
from smoa_lab.study.bounds import level_of
from smoa_lab.study.plan import Plan, read_chosen
from smoa_lab.study.run_study import Comparison
from smoa_lab.study.study import Job, Study, Tuning, load_study
from smoa_lab.study.study_report import report
from smoa_lab.training.run_folder import OfAnother, RunFolder
from tests.support.studies import WrittenRuns, compared, entry, fake_time, finished

pytestmark = pytest.mark.usefixtures("no_looks")


def folders(study: Study, pattern: str = "*/lr-*") -> list[str]:
    return sorted(path.relative_to(study.folder).as_posix() for path in study.folder.glob(pattern))


def test_a_study_is_a_folder_of_run_folders_each_run_once(study: Study, written: WrittenRuns) -> None:
    compared(study).run()
    kept = written.ran
    assert len(kept) == len(set(kept)) == 2 + 3 + 3 + 5 + 9
    assert sorted(Path(path).relative_to(study.folder).as_posix() for path in kept) == [
        *folders(study),
        "untouched",
        "untouched-validation",
    ]
    assert not (study.folder / "timing").exists()
    ran = len(written.ran)
    compared(study).run()
    assert len(written.ran) == ran


def test_the_rates_of_all_entries_are_written_before_the_first_final_run(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = study.folder / "chosen.json", list[set[str]]()

    def run(config: RunConfig) -> dict[str, Any]:
        if config.scoring.part == "test":
            seen.append(set(json.loads(file.read_text())))
        return written.run(config)

    monkeypatch.setattr("smoa_lab.study.executor.run", run)
    compared(study).run()
    assert seen == [{"ours", "lora", "full"}] * 9
    chosen = json.loads(file.read_text())
    assert (chosen["lora"]["learning_rate"], chosen["lora"]["place"]) == (0.002, "interior")
    assert list(chosen["lora"]["losses"]) == ["0.0011", "0.002", "0.0036"]
    shutil.rmtree(study.folder / "lora" / "lr-2e-3-seed-100")
    ran = len(written.ran)
    compared(study).run()  # what was chosen is not searched again
    assert len(written.ran) == ran


def test_final_runs_are_at_the_vertex_and_where_all_rates_are_too_high_the_search_steps_down(
    study: Study, written: WrittenRuns
) -> None:
    best = {"smoa": 0.012, "lora": 0.002 / 10}

    def loss(config: RunConfig) -> float:
        return 2.0 + 8 * math.log10(config.training["learning_rate"] / best.get(config.method, 0.001)) ** 2

    written.loss = loss  # of LoRA 6 and more around its start, and the base model reaches 4
    written.untouched_loss = 4.0
    comparison = compared(study)
    comparison.run()
    chosen = json.loads((study.folder / "chosen.json").read_text())
    assert (chosen["ours"]["learning_rate"], chosen["ours"]["place"]) == (0.012, "vertex")
    assert folders(study, "ours/lr-1.2e-2-seed-*") == [f"ours/lr-1.2e-2-seed-{seed}" for seed in range(3)]
    assert [f"{tried:g}" for tried in comparison.chosen["lora"].losses] == [
        *("0.00011", "0.0002", "0.00036", "0.0011", "0.002", "0.0036"),
    ]
    assert comparison.chosen["lora"].learning_rate == 0.0002


def test_a_search_that_ended_at_its_edge_goes_on_with_more_runs(study: Study, written: WrittenRuns) -> None:
    far = study.entries["lora"].model_copy(update={"learning_rate": 8e-5})  # 0.002 is best
    study = study.model_copy(update={"entries": {**study.entries, "lora": far}})
    assert "small: Undecided: search further. Raise tuning.max_runs" in report(finished(study)).verdict[0]
    more = study.model_copy(update={"tuning": Tuning(max_runs=9)})
    comparison = finished(more)
    assert (comparison.chosen["lora"].place, len(comparison.chosen["lora"].losses)) == ("vertex", 9)
    assert (
        report(comparison).verdict[0].startswith("small: ours gained at least 6 % more than lora, after round 3 of 3")
    )
    assert len(written.ran) == len(set(written.ran)) == 2 + 3 + 9 + 5 + 9 + 3


def test_a_search_waits_for_the_untouched_model_after_its_first_rates(study: Study, written: WrittenRuns) -> None:
    comparison = compared(study)
    shutil.rmtree(study.folder / "untouched-validation")
    names = ["lora", "full"]  # whose best rate is inside of the first three, and beyond
    untouched, *searches = comparison.ready(names)
    assert untouched.name == "untouched"
    baseline, *searches = searches
    assert (baseline.name, len(searches)) == ("untouched-validation", 6)
    for job in searches:
        comparison.finish(job, written.write(comparison.config(job)))
    assert comparison.ready(names) == [untouched, baseline]
    assert comparison.chosen == {}
    comparison.finish(baseline, written.untouched(comparison.config(baseline)))
    assert list(comparison.chosen) == ["lora"]


def test_without_a_search_entries_run_at_their_own_rates(study: Study, written: WrittenRuns) -> None:
    study = study.model_copy(update={"tuning": Tuning(max_runs=0)})
    comparison = compared(study)
    comparison.run()
    assert {name: (one.learning_rate, one.place) for name, one in comparison.chosen.items()} == {
        name: (entry.learning_rate, "named") for name, entry in study.entries.items()
    }
    assert len(folders(study)) == 9


@pytest.mark.parametrize(("keep", "adapters"), [("best", 1), ("all", 3), ("none", 0)])
def test_adapters_are_kept_as_the_study_says_and_none_of_a_search(
    keep: str, adapters: int, study: Study, written: WrittenRuns
) -> None:
    written.loss = lambda config: written.usual_loss(config) + 0.1 * abs(int(config.training["seed"]) - 1)
    study = study.model_copy(update={"keep": keep})
    made = finished(study)
    kept = folders(study, "lora/*/adapter")
    named = {one.kept is None for budget in made.budgets().values() for one in budget.results}
    assert named == {keep == "none"}
    assert len(kept) == adapters
    assert kept == folders(study, "lora/lr-2e-3-seed-[012]/adapter")
    if keep == "best":
        assert kept == ["lora/lr-2e-3-seed-1/adapter"]


def test_a_resumed_study_looks_at_the_rows_of_each_run_once(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = study.model_copy(update={"seeds": list(range(8))})
    compared(many).run()
    asked: list[Path] = []
    usual = run_study.kept_by
    monkeypatch.setattr(run_study, "kept_by", lambda run, *rest: asked.append(run.folder.path) or usual(run, *rest))
    compared(many).run()
    assert len(asked) == len(set(asked)) == 3 * 8


@pytest.mark.parametrize(
    ("metric", "key", "told"), [("exact", "exact", "right answers (exact)"), ("choice", "accuracy", "accuracy")]
)
def test_a_finished_run_tells_what_decides(
    metric: str,
    key: str,
    told: str,
    study: Study,
    written: WrittenRuns,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(config: RunConfig) -> dict[str, Any]:
        metrics = written.run(config)
        metrics["evaluation"]["after"] |= {} if config.data.metric is None else {key: 0.75}
        return metrics

    monkeypatch.setattr("smoa_lab.study.executor.run", run)
    caplog.set_level("INFO")
    data = {"train": "chats.jsonl", "metric": metric}
    shared = {**study.shared, "data": data}
    compared(study.model_copy(update={"shared": shared, "keep": "all"})).run(["lora"])
    assert "lora/lr-2e-3-seed-100: loss 2.1000 (" in caplog.text, "the loss chooses the rate"
    assert f"lora/lr-2e-3-seed-0: {told} 75.0 %, loss 2.1000 (" in caplog.text


def test_a_search_without_final_runs_keeps_the_best_adapter(study: Study, written: WrittenRuns) -> None:
    study = study.model_copy(update={"seeds": []})
    compared(study).run(["lora"])
    assert folders(study, "*/*/adapter") == ["lora/lr-2e-3-seed-100/adapter"]
    assert not (study.folder / "untouched").exists()


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

    monkeypatch.setattr("smoa_lab.study.executor.run", run)
    return ran


def test_two_drivers_share_a_study_and_run_no_job_twice(
    study: Study, written: WrittenRuns, slow: list[tuple[str, str]]
) -> None:
    study.config("ours")  # imports TRL, which two threads can't do at once
    drivers = [Thread(target=lambda: compared(study).run(), name=name) for name in "ab"]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(name for _, name in slow) == folders(study)
    assert {driver for driver, _ in slow} == {"a", "b"}
    assert len(written.timed) == 3


def test_a_driver_that_finds_a_job_taken_runs_the_next_and_comes_back(
    study: Study, slow: list[tuple[str, str]]
) -> None:
    mine = compared(study)
    mine.run(["ours"])
    slow.clear()
    taken = mine.ready(["lora"])[0]
    with RunFolder(study.folder / taken.name).alone():
        driver = Thread(target=mine.run, args=(["lora"],), daemon=True)
        driver.start()
        deadline = time.monotonic() + 30
        while not slow and time.monotonic() < deadline:
            time.sleep(0.01)
        assert slow
        assert taken.name not in [name for _, name in slow]
    driver.join(30)
    assert taken.name in [name for _, name in slow]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_process_loses_one_run_and_the_same_command_goes_on(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = compared(study).plan

    def dying(config: RunConfig) -> dict[str, Any]:
        with RunFolder(config.folder).alone():
            if config.folder.name == "lr-2e-3-seed-1":
                os.kill(os.getpid(), signal.SIGKILL)
            return written.write(config)

    process = os.fork()
    if process == 0:
        monkeypatch.setattr("smoa_lab.study.executor.run", dying)
        Comparison(study, plan).run(["lora"])
    os.waitpid(process, 0)
    before = len(list(study.folder.glob("*/*/metrics.json")))
    assert before == 4
    written.ran.clear()
    compared(study).run(["lora"])
    assert len(written.ran) == 2


def carried_out(study: Study, plan: Plan, written: WrittenRuns, workers: int, seed: int) -> list[Job]:
    """The jobs in the order in which that many workers, of random speed, finish them."""
    comparison, names, chance = Comparison(study, plan), list(study.entries), random.Random(seed)
    running: list[Job] = []
    done: list[Job] = []
    while jobs := comparison.ready(names):
        running += [job for job in jobs if job not in running][: workers - len(running)]
        job = running.pop(chance.randrange(len(running)))
        loss = 1.0 if job.stage == "untouched" else written.loss(comparison.config(job))
        comparison.finish(job, {"evaluation": {"after": {"loss": loss}}, "training": {"resumed": True}})
        done.append(job)
    (study.folder / "chosen.json").unlink()
    return done


def test_an_entry_that_comes_back_is_timed_and_searched_again_and_finds_its_runs(
    study: Study, written: WrittenRuns
) -> None:
    finished(study)
    kept = study.model_copy(update={"entries": {n: one for n, one in study.entries.items() if n != "lora"}})
    finished(kept)
    ran = len(written.ran)
    finished(study)
    assert (len(written.timed), len(written.ran)) == (4, ran)
    finished(kept)
    written.parameters, written.step_seconds["lora"] = 4000, 0.9
    written.loss = lambda config: written.usual_loss(config) + 9 * (config.training["learning_rate"] == 0.002)
    large = study.entries["lora"].model_copy(update={"adapter": {"r": 64}})
    other = study.model_copy(update={"entries": {**study.entries, "lora": large}})
    with pytest.raises(ConfigError, match="was run with other values of adapter; move it away"):
        finished(other)
    shutil.rmtree(study.folder / "lora")
    timing = finished(other).plan.entries["lora"]
    assert (timing.parameters, timing.step) == (4000, pytest.approx(0.9))
    assert not folders(study, "lora/lr-2e-3-seed-[012]"), "the rate is not the one of before"


def test_a_process_with_an_older_file_keeps_the_rates_of_entries_that_it_does_not_know(
    study: Study, written: WrittenRuns
) -> None:
    older = compared(study)
    more = study.model_copy(update={"entries": {**study.entries, "dora": entry("lora")}})
    compared(more).run(["dora"])
    chosen = read_chosen(more)["dora"]
    older.run()
    assert read_chosen(more)["dora"] == chosen
    compared(study, minutes=60)
    assert set(read_chosen(more)) == {*study.entries, "dora"}


def test_the_time_left_is_never_underestimated_and_ends_at_none(study: Study, written: WrittenRuns) -> None:
    plan, names = compared(study).plan, list(study.entries)
    jobs = carried_out(study, plan, written, workers=1, seed=0)
    comparison = Comparison(study, plan)
    for number, job in enumerate(jobs):
        left = sum(plan.seconds(each.stage, each.entry) for each in jobs[number:] if not each.is_untouched)
        assert comparison.at_most_left(names) >= left - 1e-6
        loss = 1.0 if job.stage == "untouched" else written.loss(comparison.config(job))
        comparison.finish(job, {"evaluation": {"after": {"loss": loss}}, "training": {"resumed": True}})
    assert comparison.at_most_left(names) == 0


@pytest.fixture
def many(study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study that lists five seeds, in a time that passes by runs alone; a run takes 13 to 34 s."""
    fake_time(monkeypatch, written)
    return study.model_copy(update={"seeds": [0, 1, 2, 3, 4]})


def ran_seeds(study: Study) -> list[set[str]]:
    """The final seeds of each entry."""
    return [{path.name[-1] for path in study.folder.glob(f"{name}/lr-*-seed-?")} for name in study.entries]


@pytest.mark.parametrize("minutes", [10, 13, 14, 16, 30])
def test_time_that_searches_leave_buys_whole_rounds_of_seeds_and_a_study_ends_in_time(
    minutes: float, many: Study, written: WrittenRuns
) -> None:
    comparison = compared(many, minutes)
    planned = comparison.plan
    assert len(planned.seeds) == 3
    comparison.run()
    assert written.now <= 60 * minutes
    plan = compared(many).plan
    assert ran_seeds(many) == [set(map(str, plan.seeds))] * 3
    assert plan.seeds == [0, 1, 2, 3, 4][: len(plan.seeds)]
    round_ = sum(plan.seconds("final", name) for name in many.entries)
    assert len(plan.seeds) == 5 or written.now + 1.2 * round_ > 60 * minutes
    assert plan.used == pytest.approx(written.now, abs=1)


def test_seeds_are_bought_by_time_alone(many: Study, written: WrittenRuns, tmp_path: Path) -> None:
    compared(many, 14).run()
    other = many.model_copy(update={"folder": tmp_path / "other"})
    written.now = 0.0
    written.loss = lambda config: 10 + written.usual_loss(config) * (3 if config.method == "lora" else -1)
    written.untouched_loss = 99.0
    compared(other, 14).run()
    assert ran_seeds(other)[0] == ran_seeds(many)[0]


def test_on_a_machine_that_slows_down_nothing_starts_after_the_time_and_seeds_that_some_lack_are_left_out(
    many: Study, written: WrittenRuns, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = compared(many, 12)
    written.slower = 2.6
    caplog.set_level("INFO")
    comparison.run()
    longest = 2.6 * 25
    assert written.now <= 12 * 60 + longest
    assert "Searches end here: what is left of the time is for two seeds" in caplog.text
    told = re.findall(r"At most (\d+) min in all, not \d+ min", caplog.text)
    assert told, "an estimate was corrected"
    assert max(map(int, told)) <= 12, "nothing starts after the time"
    assert set.intersection(*ran_seeds(many)) == set("012"), "two seeds are reserved before searches"
    ran = len(written.ran)
    compared(many, 12).run()  # time that was used counts
    assert len(written.ran) == ran
    compared(many, number=3).run()  # those that were planned already
    assert ran_seeds(many) == [set("012")] * 3
    compared(many, number=4).run()
    assert compared(many).plan.seeds == [0, 1, 2, 3]
    assert ran_seeds(many) == [set("0123")] * 3
    assert len(written.ran) == len(set(written.ran))


def test_time_that_ends_before_the_planned_rounds_is_told_with_the_command_that_goes_on(
    many: Study, written: WrittenRuns
) -> None:
    minutes = 9
    comparison = compared(many, minutes)
    written.slower = 9.0
    comparison.run()
    assert len(set.intersection(*ran_seeds(many))) == 1
    *_, told = report(comparison).verdict
    assert (
        told == f"No more fits into {minutes} minutes: `smoa compare {many.folder / 'study.yaml'} --seeds 3` goes on."
    )


def test_searches_that_the_time_ended_go_on_once_there_is_more(many: Study, written: WrittenRuns) -> None:
    comparison = compared(many, 12)
    written.slower = 2.6
    comparison.run()
    cut = {name for name, one in compared(many).chosen.items() if one.place == "cut"}
    assert cut
    assert "Give more --minutes, or raise tuning.max_runs" in " ".join(report(compared(many)).verdict)
    written.slower = 1.0
    more = compared(many, 120)
    assert not cut & more.chosen.keys()
    more.run()
    assert all(one.place != "cut" for one in more.chosen.values())
    assert len(written.ran) == len(set(written.ran))


def test_no_seeds_are_bought_where_nobody_can_be_taken(many: Study, written: WrittenRuns) -> None:
    far = {name: entry.model_copy(update={"learning_rate": 1e-6}) for name, entry in many.entries.items()}
    study = many.model_copy(update={"entries": {name: far[name] for name in ("ours", "lora")}})
    comparison = compared(study, 100)
    comparison.run()
    assert [one.place for one in comparison.chosen.values()] == ["edge", "edge"]
    assert ran_seeds(study) == [set("012")] * 2
    compared(study, number=5).run()
    assert ran_seeds(study) == [set("01234")] * 2, "who asks for more gets more"


def test_a_seed_that_another_process_bought_is_run_here_too(many: Study, written: WrittenRuns) -> None:
    mine, theirs = compared(many, 30), compared(many)
    theirs.run()
    ran = len(written.ran)
    mine.run()
    assert mine.plan.seeds == theirs.plan.seeds == [0, 1, 2, 3, 4]
    assert len(written.ran) == ran
    assert sum(job.stage == "final" for job in mine.losses) == 15


def test_minutes_and_seeds_together_are_the_most_of_both(many: Study, written: WrittenRuns) -> None:
    compared(many, 60, number=2).run()
    assert compared(many, 60, number=2).plan.seeds == [0, 1]


CHATS = Path(__file__).parents[4] / "studies" / "chats"
"""A study that was planned in format 1."""


@pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="this PEFT has no HiRA")
def test_a_half_done_study_of_format_1_keeps_its_rates_steps_and_seeds_and_searches_on_by_the_rule_of_today(
    tmp_path: Path, written: WrittenRuns
) -> None:
    study = load_study(CHATS / "study.yaml", [f"folder={tmp_path / 'chats'}"])
    stored, chosen = (json.loads((CHATS / f"{name}.json").read_text()) for name in ("plan", "chosen"))
    assert stored["format"] == 1
    written.digests, written.rows = stored["digests"], stored["rows"]
    written.step_seconds |= {"dora": 0.1, "hira": 0.1}
    written.loss = lambda config: 2 + math.log10(config.training["learning_rate"] / 0.0021) ** 2
    study.folder.mkdir()
    shutil.copy(CHATS / "plan.json", study.folder)
    del chosen["lora"]
    (study.folder / "chosen.json").write_text(json.dumps(chosen))
    searched = [Job("search", "lora", learning_rate, 100) for learning_rate in (0.002, 0.00063)]
    for job in (Job("untouched", "smoa", 0.002, 0), Job("final", "smoa", 0.002, 1), *searched):
        config = study.job_config(study.config(job.entry), job, stored["steps"])
        (written.untouched if job.is_untouched else written.run)(config)
    comparison = compared(study)
    comparison.run()
    rates = {name: one.learning_rate for name, one in comparison.chosen.items()}
    assert rates == {"smoa": 0.002, "dora": 0.002, "hira": 0.02, "lora": 0.0021}
    assert folders(study, "lora/lr-*-seed-100") == [
        f"lora/lr-{text}-seed-100" for text in ("1.1e-3", "2e-3", "3.6e-3", "6.3e-4")
    ]
    assert ran_seeds(study) == [set("01")] * 4
    assert (comparison.plan.format, comparison.plan.steps, comparison.plan.limit) == (1, stored["steps"], None)
    assert written.timed == []
    assert len(written.ran) == len(set(written.ran))


@pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="this PEFT has no HiRA")
def test_a_folder_of_format_2_goes_on_as_it_was_planned(tmp_path: Path, written: WrittenRuns) -> None:
    stored = CHATS.with_name("chats-2")
    study = load_study(stored / "study.yaml", [f"folder={tmp_path / 'chats-2'}"])
    before = json.loads((stored / "plan.json").read_text())
    written.digests, written.rows = before["digests"], before["rows"]
    study.folder.mkdir()
    for name in ("plan.json", "chosen.json"):
        shutil.copy(stored / name, study.folder)
    comparison = compared(study)
    written.step_seconds |= {"dora": 0.1, "hira": 0.1}
    written.loss = lambda config: 2.0
    for tried, name in ((tried, name) for name, one in comparison.chosen.items() for tried in one.losses):
        written.write(comparison.config(Job("search", name, tried, 100)))
    comparison.run()
    plan = comparison.plan
    assert (plan.format, plan.rounds, plan.looked_at(), plan.level(4)) == (2, 4, [4], level_of(4, 4))
    assert ran_seeds(study) == [set("0123")] * 4, "it ends when all is done"
    known = json.loads(next(study.folder.glob("smoa/lr-*-seed-3/metrics.json")).read_text())["config"]["data"]
    assert (known["group"], known["answer_tokens"]) == (False, 128)


def test_two_processes_use_a_minute_up_once(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_time(monkeypatch, written)
    first, second = compared(study, 60), compared(study, 60)
    used = first.plan.used
    written.now += 30
    for each in (first, second):
        each._change(lambda plan: {})
    assert second.plan.used == pytest.approx(used + 30)


def test_an_unfinished_run_that_cannot_go_on_ends_the_study_and_is_no_failure_of_its_entry(
    study: Study, written: WrittenRuns
) -> None:
    def loss(config: RunConfig) -> float | None:
        if config.method == "lora":
            raise OfAnother("contains an unfinished run, and the data changed since then")
        return written.usual_loss(config)

    written.loss = loss
    comparison = compared(study)
    with pytest.raises(OfAnother, match="the data changed"):
        comparison.run()
    assert comparison.plan.failed == {}


@pytest.mark.parametrize(
    ("run", "change", "what"),
    [
        ("seed-0", {"config": {"early_stopping": 7}}, "early_stopping"),
        ("seed-0", {"digests": {"data": "x", "base": "b", "encoder": "e"}}, "the rows"),
        ("seed-100", {"digests": {"data": "d", "base": "x", "encoder": "e"}}, "the base model"),  # behind a chosen rate
    ],
)
def test_a_run_of_another_config_or_on_other_rows_or_another_base_is_refused(
    run: str, change: dict[str, Any], what: str, study: Study, written: WrittenRuns
) -> None:
    """As one that was copied from another study."""
    compared(study).run(["lora"])
    file = study.folder / "lora" / f"lr-2e-3-{run}" / "metrics.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, **{key: known[key] | values for key, values in change.items()}}))
    with pytest.raises(ConfigError, match=rf"{run}: was run with other values of .*{what}.*; move it away"):
        compared(study).run(["lora"])
