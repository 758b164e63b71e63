"""The plan of a study: what it takes, what no resume changes, what a folder may have."""

import socket
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import planning, progress
from smoa_lab.study.bounds import level_of
from smoa_lab.study.executor import Executor
from smoa_lab.study.plan import FEWEST, Plan, Timing, check_folder, fitted, study_file
from smoa_lab.study.planning import outlook, prepare
from smoa_lab.study.study import Study, Tuning, load_study
from smoa_lab.study.study_report import report
from tests.support.studies import WrittenRuns, compared, entry, fake_time, finished


def planned(steps: int = 300, seeds: int = 3) -> Plan:
    """Two entries of 0.1 and 0.2 s a step; a run takes 10 s beside its steps, a final one 20."""
    entries = {"smoa": Timing(parameters=1, step=0.1, beside=10), "lora": Timing(parameters=1, step=0.2, beside=10)}
    facts: dict[str, Any] = {"study": {}, "digests": {}, "rows": {}, "minutes": None, "entries": entries}
    return Plan(steps=steps, seeds=list(range(seeds)), final=10, **facts)


def unused(plan: Plan) -> Plan:
    """A plan without the time that was used."""
    return plan.model_copy(update={"used": 0.0, "counted": 0.0})


def test_a_plan_lasts_as_long_as_its_longest_searches_and_its_runs() -> None:
    assert planned(100).longest(6) == 6 * (20 + 30) + 3 * (30 + 40)
    assert planned(100).longest(6, workers=8) == 4 * 30 + 40, (
        "the longest chain: the slower one's runs after each other"
    )


def test_three_seeds_come_before_more_than_thirty_steps_and_fewer_steps_never() -> None:
    whole = planned(seeds=5)
    assert fitted(whole, 6, 3000) == whole.model_copy(update={"seeds": [0, 1, 2]})
    for seconds in (900, 700, 500):
        found = fitted(whole, 6, seconds)
        assert FEWEST <= found.steps < 300
        assert found.seeds == [0, 1, 2]
        assert 1.1 * found.longest(6) <= seconds
        assert 1.1 * found.model_copy(update={"steps": found.steps + 1}).longest(6) > seconds
    least = [1.1 * planned(FEWEST, seeds).longest(6) for seeds in range(4)]
    found = [fitted(whole, 6, seconds + 1) for seconds in [*least, 10]]
    assert [(plan.steps, len(plan.seeds)) for plan in found] == [(30, 2), (30, 2), (30, 2), (30, 3), (30, 2)]
    assert fitted(planned(20), 6, 5000).steps == 20


def test_the_untouched_model_is_scored_first_and_counts_and_a_few_steps_of_each_are_thrown_away(
    study: Study, written: WrittenRuns
) -> None:
    plan = compared(study).plan
    assert [path.rpartition("/")[2] for path in written.ran] == ["untouched", "untouched-validation"]
    assert [path.rpartition("/")[2] for path in written.timed] == list(study.entries)
    assert not (study.folder / "timing").exists()
    assert (plan.format, plan.steps, plan.seeds, plan.rows["test"]) == (3, 100, [0, 1, 2], 60)
    assert plan.entries["lora"] == Timing(
        parameters=1000, step=plan.entries["lora"].step, beside=2.0, machine=socket.gethostname()
    )
    assert plan.entries["lora"].step == pytest.approx(0.1)
    assert plan.final == pytest.approx(4 - 1 + 2 * 2048 / 360)  # the validation part's seconds a token
    assert unused(plan) == unused(compared(study).plan)
    assert len(written.ran) == 2
    written.length *= 10  # as many trained tokens behind a longer prompt
    longer = study.model_copy(update={"folder": study.folder / "longer"})
    assert compared(longer).plan.final == pytest.approx(4 - 1 + 2 * 2048 / 3600)


@pytest.mark.parametrize(("data", "rows", "scored"), [({}, "d", 2), ({"max_length": 64}, "d", 4), ({}, "edited", 4)])
def test_a_start_that_was_interrupted_goes_on_and_scores_the_base_again_only_if_file_or_rows_were_edited(
    data: dict[str, Any], rows: str, scored: int, study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("smoa_lab.study.planning.write_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(study)
    assert len(written.ran) == 2
    written.digests["data"] = rows
    compared(study.model_copy(update={"shared": {**study.shared, "data": {**study.shared["data"], **data}}}))
    assert len(written.ran) == scored


def test_what_cannot_end_in_time_is_refused_by_the_quickest_step_so_far_and_leaves_nothing(
    study: Study, written: WrittenRuns
) -> None:
    written.step_seconds["smoa"] = 1.0  # of three entries: 5 × 30 × 3 s
    with pytest.raises(ConfigError, match=r"5 runs of 30 steps for each entry, .* take 8 min or more, and .* are left"):
        compared(study, minutes=7)
    assert [path.rpartition("/")[2] for path in written.timed] == ["ours"]
    assert [path.name for path in study.folder.iterdir()] == [".lock"]
    assert compared(study, minutes=9).plan.steps == FEWEST


def test_a_plan_is_for_the_minutes_that_are_given_and_no_resume_changes_it(study: Study, written: WrittenRuns) -> None:
    plan = compared(study, minutes=3).plan
    assert plan.steps < 100
    assert plan.minutes == 3
    assert unused(compared(study).plan) == unused(compared(study, minutes=3).plan) == unused(plan)


@pytest.mark.parametrize("minutes", [60, 2])
def test_other_minutes_are_for_what_is_left(minutes: float, study: Study, written: WrittenRuns) -> None:
    plan, again = compared(study, minutes=3).plan, compared(study, minutes=minutes).plan
    assert (again.steps, again.minutes) == (plan.steps, minutes)
    assert again.limit == pytest.approx(plan.used + 60 * minutes, abs=2)


@pytest.mark.parametrize("minutes", [3, 60])
def test_minutes_beside_something_new_are_for_all_that_is_left(
    minutes: float, study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_time(monkeypatch, written)
    plan = compared(study, minutes=3).plan
    more = study.model_copy(update={"entries": {**study.entries, "dora": entry("lora")}})
    for asked, number in ((more, None), (more, 6), (more.model_copy(update={"tuning": Tuning(max_runs=9)}), 6)):
        used, began = plan.used, written.now
        plan = compared(asked, minutes, number).plan
        assert plan.limit == pytest.approx(used + 60 * minutes)
        assert plan.used == pytest.approx(used + written.now - began), "what planning takes counts once"
        assert unused(compared(asked, minutes, number).plan) == unused(plan), "given again it goes on"
    lifted = compared(asked, number=7).plan
    assert (lifted.minutes, lifted.limit) == (minutes, None)
    assert compared(asked, minutes).plan.limit == pytest.approx(lifted.used + 60 * minutes)


def test_a_clock_that_goes_back_gives_no_time_away(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_time(monkeypatch, written)
    clock, used = SimpleNamespace(back=0.0), [compared(study, minutes=30).plan.used]
    monkeypatch.setattr(progress.time, "time", lambda: written.now - clock.back)
    for clock.back in (3600.0, 3600.0, 7200.0):
        comparison = compared(study, minutes=30)
        written.now += 100
        comparison._change(lambda plan: {})
        used.append(comparison.plan.used)
    assert [round(late - early) for early, late in pairwise(used)] == [100, 100, 100]


def test_seeds_beyond_the_planned_rounds_are_one_more_look(study: Study, written: WrittenRuns) -> None:
    plan = compared(study, minutes=3, number=4).plan
    assert (len(plan.listed), plan.rounds, plan.looked_at()) == (4, 4, [2, 3, 4])
    assert unused(compared(study, minutes=3, number=4).plan) == unused(plan)
    for number, extensions, level in ((5, [5], 0.005), (5, [5], 0.005), (7, [5, 7], 0.0025)):
        more = compared(study, number=number).plan
        assert (len(more.seeds), more.rounds, more.extensions) == (number, 4, extensions)
        assert (more.looked_at(), more.level(2)) == ([number], level)


def test_rounds_that_follow_a_single_one_are_planned_ones_since_one_is_not_looked_at(
    study: Study, written: WrittenRuns
) -> None:
    compared(study, number=1).run()
    more = compared(study, number=3).plan
    assert (more.seeds, more.rounds, more.extensions, more.looked_at()) == ([0, 1, 2], 3, [], [2, 3])


def test_seeds_that_are_taken_out_after_the_plan_run_all_the_same_and_it_is_said(
    study: Study, written: WrittenRuns, caplog: pytest.LogCaptureFixture
) -> None:
    compared(study)
    compared(study, number=3)
    fewer, told = study.model_copy(update={"seeds": [0, 1]}), "Seeds that were planned run all the same"
    assert told not in caplog.text
    for asked, number in ((fewer, None), (study, 2)):
        caplog.clear()
        assert compared(asked, number=number).plan.seeds == [0, 1, 2]
        assert caplog.text.count(told) == 1


def test_entries_and_seeds_may_be_added_and_run_at_the_plans_steps(study: Study, written: WrittenRuns) -> None:
    plan = compared(study, minutes=3).plan
    entries = {**study.entries, "dora": entry("lora")}
    more = study.model_copy(update={"entries": entries, "seeds": [0, 1, 2, 7]})
    added = compared(more).plan
    assert (added.steps, added.seeds) == (plan.steps, [*plan.seeds, 7])
    assert list(added.entries) == ["ours", "lora", "full", "dora"]
    assert (plan.limit, added.limit) == (180, None)
    assert unused(compared(more).plan) == unused(added)
    dropped = compared(study.model_copy(update={"seeds": [0, 1, 2, 7]})).plan
    assert (list(dropped.entries), dropped.dropped) == (["ours", "lora", "full", "dora"], {"dora": "all"})
    assert compared(more).plan.dropped == {}


@pytest.mark.parametrize(
    ("block", "value", "told"),
    [
        (
            "shared",
            {"model": {"name": "other"}, "data": {"train": "chats.jsonl"}},
            'shared.model.name: "base", now "ot',
        ),
        ("tuning", Tuning(seed=7), "tuning.seed: 100, now 7"),
    ],
)
def test_any_other_change_of_the_file_is_refused_with_what_differs(
    block: str, value: Any, told: str, study: Study, written: WrittenRuns
) -> None:
    compared(study)
    with pytest.raises(ConfigError) as caught:
        compared(study.model_copy(update={block: value}))
    assert told in str(caught.value)
    assert "use a new folder" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("data", "the rows changed"),
        ("base", "the base model changed"),
        ("encoder", "template"),
        ("forgetting", r"forgetting\.text changed"),
    ],
)
def test_other_rows_or_another_base_are_refused_also_where_all_has_run(
    key: str, told: str, study: Study, written: WrittenRuns
) -> None:
    compared(study).run()
    written.digests[key] = "another"
    with pytest.raises(ConfigError, match=told):
        compared(study)
    assert prepare(study, None).digests[key] != "another", "a report reads no rows, which may be gone"


def test_what_is_missing_is_said_before_anything_runs(
    study: Study, written: WrittenRuns, caplog: pytest.LogCaptureFixture
) -> None:
    written.rows["test"] = 49
    compared(study)
    assert "Only 49 rows are held out" in caplog.text
    written.groups = 48
    compared(study)
    assert "Only 48 groups are held out" in caplog.text
    for rows in (10, 9):
        assert "choose the rates" not in caplog.text
        written.rows["validation"] = rows
        compared(study.model_copy(update={"folder": study.folder.with_name(f"by-{rows}")}))
    assert "Only 9 validation rows choose the rates, much by chance" in caplog.text
    for part, told in (("validation", "by which rates are compared"), ("test", "by which entries are compared")):
        written.rows = {"train": 1, "validation": 1, "test": 1, part: 0}
        with pytest.raises(ConfigError, match=f"leaves no {part} rows, {told}"):
            compared(study)


def told_beforehand(study: Study) -> str:
    """What a plan alone says that the study will tell."""
    return outlook(study, Executor().result, None, 1, None, time.monotonic())[1]


def test_a_plan_alone_leaves_a_study_that_runs_meanwhile(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = written.time_steps

    def timed(config: RunConfig, most: int, seconds: float) -> dict[str, Any]:
        if not study.folder.exists():  # in another terminal
            monkeypatch.setattr("smoa_lab.study.executor.time_steps", usual)
            compared(study).run()
        return usual(config, most, seconds)

    monkeypatch.setattr("smoa_lab.study.executor.time_steps", timed)
    told_beforehand(study)
    assert len(list(study.folder.glob("*/lr-*/metrics.json"))) == len(written.ran) - 2 > 0
    assert [path.name for path in study.folder.parent.iterdir()] == ["study"]


def test_bad_rows_and_an_entry_that_cannot_be_made_are_told_before_the_first_run(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise ConfigError("adapter: no layer q_pro")

    monkeypatch.setattr(planning, "check_adapter", refused)
    with pytest.raises(ConfigError, match="no layer q_pro"):
        compared(study)

    def bad(config: RunConfig) -> dict[str, Any]:
        raise DataError("chats.jsonl, line 3: no content")

    monkeypatch.setattr(planning, "inputs", bad)
    with pytest.raises(DataError, match="line 3: no content"):
        compared(study)
    assert written.ran == []


def test_an_entry_that_fails_while_its_steps_are_timed_is_one_that_failed(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"lora"}

    def timed(config: RunConfig, most: int, seconds: float) -> dict[str, Any]:
        if config.method in broken:
            raise RuntimeError("CUDA out of memory")
        return written.time_steps(config, most, seconds)

    monkeypatch.setattr("smoa_lab.study.executor.time_steps", timed)
    comparison = compared(study, minutes=60)
    assert comparison.plan.failed == {"lora": "RuntimeError: CUDA out of memory"}
    assert list(comparison.plan.entries) == ["ours", "full"]
    comparison.run()
    assert report(finished(study)).summary["budgets"]["small"]["level"] == level_of(2, 3)
    broken.clear()
    again = finished(study)
    assert (again.plan.failed, again.plan.extensions) == ({}, [3]), "it was decided without it: one more look"
    assert again.plan.takes["small"].entries.keys() == {"ours", "lora"}
    assert set(again.chosen) == set(study.entries)
    broken |= {"lora", "smoa", "full"}
    failing = Study.model_validate({**again.study.model_dump(), "folder": study.folder})
    failing.entries["more"] = entry(adapter={}, budget="small")
    assert "more failed: RuntimeError: CUDA out of memory" in " ".join(report(finished(failing)).verdict)
    taken_out = finished(study).plan
    assert (taken_out.takes, taken_out.failed) == (again.plan.takes, {}), "the verdict stands"
    assert (taken_out.extensions, taken_out.dropped) == ([3], {})
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        compared(study.model_copy(update={"folder": study.folder.with_name("other")}))


@pytest.mark.parametrize(("stage", "loss"), [("test", None), ("validation", float("nan"))])
def test_a_base_model_whose_loss_is_not_finite_is_refused_before_any_run(
    stage: str, loss: float | None, study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(config: RunConfig) -> dict[str, Any]:
        metrics = written.untouched(config)
        if config.scoring.part == stage:
            metrics["evaluation"]["before"]["loss"] = loss
        return metrics

    monkeypatch.setattr("smoa_lab.study.executor.score_untouched", untouched)
    with pytest.raises(ConfigError, match=rf"the base model's loss on {stage} rows is not finite, and nothing can be"):
        compared(study)
    assert not (study.folder / "plan.json").exists()


def test_an_entry_that_trains_more_than_it_declares_is_refused_before_the_plan(
    study: Study, written: WrittenRuns
) -> None:
    entries = {**study.entries, "lora": entry("lora", parameters=900)}
    with pytest.raises(ConfigError, match=r"entries\.lora: trains 1,000 parameters, not 900 to within 2%"):
        compared(study.model_copy(update={"entries": entries}))
    assert not (study.folder / "plan.json").exists()


def test_a_folder_of_something_else_or_of_another_study_is_refused(study: Study, written: WrittenRuns) -> None:
    study.folder.mkdir()
    other = study.folder / "notes.txt"
    other.touch()
    with pytest.raises(ConfigError, match=r"contains notes\.txt and no study"):
        check_folder(study)
    other.unlink()
    with study_file(study):
        pass
    stored = load_study(study.folder / "study.yaml")
    assert stored == study
    with study_file(study.model_copy(update={"entries": {**study.entries, "dora": entry()}})):
        pass
    with pytest.raises(ConfigError, match=r"study\.yaml: says otherwise\n  tuning\.seed: 100, now 7\n"):
        check_folder(study.model_copy(update={"tuning": Tuning(seed=7)}))


def test_a_studys_own_file_stays_as_its_author_wrote_it_also_where_an_extension_is_interrupted(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    with study_file(study):
        pass
    file = study.folder / "study.yaml"
    text = "# Mine.\n" + file.read_text()
    file.write_text(text)
    copied = study.folder.with_name("copied") / "study.yaml"
    copied.parent.mkdir()
    copied.write_text(text)
    assert load_study(copied).folder == study.folder
    assert f"{copied}: goes on with the study in its folder, {study.folder}; for a study of its own" in caplog.text
    assert load_study(copied, [f"folder={copied.parent}"]).folder == copied.parent
    copied.write_text(text.replace(f"folder: {study.folder}\n", ""))
    assert load_study(copied).folder == copied.parent, "one without a folder has its own"
    with study_file(load_study(file, ["seeds=[0,1,2,3]"]), given=file):
        pass
    assert file.read_text() == text
    with pytest.raises(KeyboardInterrupt), study_file(study.model_copy(update={"seeds": [0, 1, 2, 3]})):
        raise KeyboardInterrupt
    assert file.read_text() == text


def test_where_batches_make_other_numbers_of_steps_all_entries_take_the_fewest(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(config: RunConfig, most: int, seconds: float) -> dict[str, Any]:
        return written.time_steps(config, most, seconds) | {"steps": {"smoa": 100, "lora": 40}.get(config.method, 90)}

    monkeypatch.setattr("smoa_lab.study.executor.time_steps", timed)
    assert compared(study).plan.steps == 40
