"""The plan of a study: what it takes, what no resume changes, what a folder may have."""

from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import RunConfig
from smoa_lab.study import plan as planning
from smoa_lab.study.plan import FEWEST, Plan, Timing, check_folder, fitted, prepare, steps_of, study_file
from smoa_lab.study.study import Study, load_study
from tests.support.studies import WrittenRuns, compared, entry


def planned(steps: int = 300, seeds: int = 3) -> Plan:
    """Two entries of 0.1 and 0.2 s a step; a run takes 10 s beside its steps, a final one 20."""
    entries = {"smoa": Timing(parameters=1, step=0.1, beside=10), "lora": Timing(parameters=1, step=0.2, beside=10)}
    facts: dict[str, Any] = {"study": {}, "digests": {}, "rows": {}, "minutes": None, "entries": entries}
    return Plan(steps=steps, seeds=list(range(seeds)), final=10, **facts)


def test_a_plan_lasts_as_long_as_its_longest_searches_and_its_runs() -> None:
    assert planned(100).longest(6) == 20 + 6 * (20 + 30) + 3 * (30 + 40)


def test_a_plan_takes_fewer_steps_then_fewer_seeds_and_never_a_narrower_search() -> None:
    whole = planned()
    assert fitted(whole, 6, 1.1 * whole.longest(6) + 1) == whole
    for seconds in (1000, 700, 400, 370, 350):
        found = fitted(whole, 6, seconds)
        assert FEWEST <= found.steps < 300
        assert 1.1 * found.longest(6) <= seconds
        longer = found.model_copy(update={"steps": found.steps + 1})
        assert 1.1 * longer.longest(6) > seconds
        assert len(found.seeds) == (3 if seconds >= 1.1 * planned(FEWEST).longest(6) else 2)
    with pytest.raises(ConfigError, match=r"smallest comparison \(30 steps a run, 2 seeds and whole searches\) takes"):
        fitted(whole, 6, 300)
    assert fitted(planned(20), 6, 5000).steps == 20


def test_the_timing_runs_decide_and_are_thrown_away(
    study: Study, written: WrittenRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, Any] = {}

    def run(config: RunConfig) -> dict[str, Any]:
        steps[config.folder.name] = (config.training["max_steps"], config.scoring.part, config.data.samples)
        return written.write(config)

    monkeypatch.setattr("smoa_lab.study.comparison.run", run)
    plan = compared(study).plan
    assert steps == {
        **{f"{name}-timing": (20, "validation", 0) for name in study.entries},
        "ours-rehearsal": (20, "test", 10),
    }
    assert (plan.steps, plan.seeds, plan.rows["test"]) == (100, [0, 1, 2], 60)
    assert plan.entries["lora"].step == pytest.approx(0.1)
    assert not (study.folder / "timing").exists()
    assert plan == compared(study).plan


def test_epochs_are_counted_in_steps_by_the_log_of_a_timing_run(study: Study) -> None:
    shared = {**study.shared, "training": {"use_cpu": True, "num_train_epochs": 2}}
    config = study.model_copy(update={"shared": shared}).config("ours")
    history = [{"loss": 1.0, "step": 10, "epoch": 0.2}, {"step": 20, "epoch": 0.4}, {"train_runtime": 1.0}]
    assert steps_of(config, {"history": history}) == 100


def test_a_plan_is_for_the_minutes_that_are_given_and_no_resume_changes_it(study: Study, written: WrittenRuns) -> None:
    plan = compared(study, minutes=3).plan
    assert plan.steps < 100
    assert plan.minutes == 3
    assert compared(study).plan == compared(study, minutes=3).plan == plan
    with pytest.raises(ConfigError, match=r"planned otherwise\n  --minutes: 3\.0, now 60"):
        compared(study, minutes=60)


def test_entries_and_seeds_may_be_added_and_run_at_the_plans_steps(study: Study, written: WrittenRuns) -> None:
    plan = compared(study, minutes=3).plan
    entries = {**study.entries, "dora": entry("lora")}
    more = study.model_copy(update={"entries": entries, "seeds": [0, 1, 2, 7]})
    added = compared(more).plan
    assert (added.steps, added.seeds) == (plan.steps, [*plan.seeds, 7])
    assert list(added.entries) == ["ours", "lora", "full", "dora"]
    assert compared(more).plan == added
    with pytest.raises(ConfigError, match=r"entries\.dora: .*, now null"):
        compared(study)


@pytest.mark.parametrize(
    ("block", "value", "told"),
    [
        (
            "shared",
            {"model": {"name": "other"}, "data": {"train": "chats.jsonl"}},
            'shared.model.name: "base", now "ot',
        ),
        ("seeds", [0, 1], "seeds: [0, 1, 2], now [0, 1]"),
        ("keep", "all", 'keep: "best", now "all"'),
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
    with pytest.raises(ConfigError, match=told):
        prepare(study, run_all=None)


def test_what_is_missing_is_said_before_anything_runs(
    study: Study, written: WrittenRuns, caplog: pytest.LogCaptureFixture
) -> None:
    written.rows["test"] = 49
    compared(study)
    assert "Only 49 rows are held out" in caplog.text
    for part, told in (("validation", "by which rates are compared"), ("test", "by which entries are compared")):
        written.rows = {"train": 1, "validation": 1, "test": 1, part: 0}
        with pytest.raises(ConfigError, match=f"leaves no {part} rows, {told}"):
            compared(study)


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
    with pytest.raises(ConfigError, match=r"study\.yaml: says otherwise\n  entries\.dora: .*now null\n"):
        check_folder(study)


def test_a_file_that_is_the_studys_own_is_left_as_its_author_wrote_it(study: Study, written: WrittenRuns) -> None:
    with study_file(study):
        pass
    file = study.folder / "study.yaml"
    text = "# Mine.\n" + file.read_text()
    file.write_text(text)
    with study_file(load_study(file, ["seeds=[0,1,2,3]"]), given=file):
        pass
    assert file.read_text() == text
