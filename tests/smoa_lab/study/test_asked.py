"""What commands write into a study's file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from smoa.errors import ConfigError, DataError
from smoa_lab.study.study import load_study
from smoa_lab.study.written import check, write_study
from tests.support.studies import StudyLife, tiny_study

pytestmark = pytest.mark.usefixtures("quick_pictures")


def test_more_seeds_before_a_look_are_planned_and_after_one_are_not(life: StudyLife) -> None:
    assert (life.ask(seeds=2).seeds, life.study.planned) == ([0, 1], 2)
    assert life.ask(seeds=3).planned == 3
    life.start()
    after = life.ask("tolerance=0.2", seeds=5)
    assert (after.seeds, after.planned, after.tolerance) == ([0, 1, 2, 3, 4], 3, 0.2)
    assert life.ask(seeds=2).seeds == [0, 1, 2, 3, 4], "what was asked for stays"


def test_an_entry_that_came_after_a_look_takes_an_unplanned_one_and_the_next_a_further(life: StudyLife) -> None:
    life.start()
    life.add("late")
    life.add("free", budget="another")
    life.ask()  # given twice it is the same
    assert {name: one.added for name, one in life.study.entries.items() if one.added} == {"late": 1}, "one looked"
    small = life.start().summary["budgets"]["small"]
    assert (small["round"], small["level"]) == (3, 0.005)
    life.add("later")
    assert life.study.entries["later"].added == 2
    assert life.start().summary["budgets"]["small"]["level"] == 0.0025
    assert life.said() == life.alone().said()


def test_another_metric_is_another_look(life: StudyLife) -> None:
    life.edit("shared.data.metric=contains")
    life.start()
    assert {one.added for one in life.ask("shared.data.metric=exact").entries.values()} == {1}


def test_a_study_is_checked_before_it_is_run(life: StudyLife) -> None:
    check(life.study)
    life.start()
    life.runs.digests["data"] = "other"
    with pytest.raises(DataError, match="another data than is there now"):
        check(life.study)
    life.runs.rows["test"] = 0
    with pytest.raises(ConfigError, match="no test rows"):
        check(life.study)


def values_of(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def test_a_file_that_is_there_goes_on_as_it_was_edited_with_the_entries_that_it_lacks(tmp_path: Path) -> None:
    file = tiny_study(tmp_path / "study", seeds=[0, 1])
    values = values_of(file)
    file.write_text("# Mine.\n" + file.read_text() + "keep: all\ntolerance: 0.2\n")
    more = values["entries"] | {"dora": {"method": "dora", "learning_rate": 0.01}}
    for entries in (values["entries"], more):
        assert write_study(values | {"entries": entries}, file.parent) == file
    study = load_study(file)
    assert (study.keep, study.tolerance, [*study.entries]) == ("all", 0.2, ["ours", "lora", "full", "dora"])
    assert file.read_text().startswith("# Mine.\n")


@pytest.mark.parametrize(
    ("seeds", "change", "told"),
    [
        ([0], {"shared": {"model": {"name": "other"}}}, "another shared.model.name"),
        ([0], {"shared": {"data": {"train": "other.jsonl"}}}, "another shared.data.train"),
        ([0], {"entries": {"lora": {"adapter": {"r": 4}}}}, "another entries.lora.adapter"),
        ([0], {"entries": {"lora": {"learning_rate": 0.5}}}, None),
        ([0], {"shared": {"training": {"max_steps": 9}}}, None),
        ([], {"entries": {"lora": {"learning_rate": 0.5}}}, "another entries.lora.learning_rate"),
        ([], {"shared": {"training": {"max_steps": 9}}}, "another shared.training.max_steps"),
        ([], {"tuning": {"seed": 9}}, "another tuning.seed"),
    ],
)
def test_a_file_of_another_study_is_refused_and_stays(
    seeds: list[int], change: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    """One that only searches is another one sooner."""

    def merged(one: Any, other: Any) -> Any:
        if not isinstance(one, dict):
            return other
        return one | {key: merged(one.get(key), value) for key, value in other.items()}

    file = tiny_study(tmp_path / "study", seeds=seeds, tuning={"seed": 100})
    values, before = values_of(file), file.read_bytes()
    if told is None:
        write_study(merged(values, change), file.parent)
    else:
        with pytest.raises(ConfigError, match=told):
            write_study(merged(values, change), file.parent)
    assert file.read_bytes() == before


def test_a_study_that_is_refused_leaves_no_file_and_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    values = values_of(tiny_study(tmp_path / "study"))
    with pytest.raises(ConfigError, match="max_runs"):
        write_study(values | {"tuning": {"max_runs": 1}}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="has files and no study"):
        write_study(values, tmp_path / "new")
