"""Studies of two tasks in turn: where entries start, what is scored, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.report.sequence.sequence_report import sequence_report
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import TrialStore
from smoa_lab.training.loaded_run import LoadedRun
from tests.support import lab

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

RUNS = ["final/full/lr-0.001-seed-0", "final/ours/lr-0.003-seed-0", "final/ours/lr-0.01-seed-0"]


def loss(questions: dict[str, Any]) -> float:
    return float(sum(questions["nll"]) / sum(questions["tokens"]))


def test_every_rate_is_a_run_that_starts_from_the_first_task(sequence: dict[str, Any]) -> None:
    study = Study.model_validate(sequence)
    Comparison(study).run()
    store = TrialStore(study.folder)
    assert store.names("final/") == RUNS
    assert store.names("tuning/") == []
    before = store.find("untouched")
    assert before is not None
    assert before["first"]["questions"]["task"] == ["arc_easy"] * 3
    assert before["questions"]["task"] == ["piqa"] * 3
    assert before["start"]["questions"]["nll"] != before["questions"]["nll"]
    for name in RUNS:
        found = store.find(name)
        assert found is not None
        assert found["forgot"]["first"]["mean"] == pytest.approx(
            loss(found["first"]["questions"]) - loss(before["first"]["questions"])
        )
        assert found["forgot"]["elsewhere"]["mean"] == pytest.approx(found["elsewhere"] - before["elsewhere"])
        assert loss(found["texts"]) == found["elsewhere"]
        assert found["change"]["layers"] == (14 if "full" in name else 4)
        assert found["change"]["relative_norm"]["max"] > 0
    assert len(list((study.folder / "work" / "first").iterdir())) == 1


def test_an_untrained_second_task_forgets_nothing(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    sequence["tuning"]["sweep"] = [1e-30, 1e-30]
    study = Study.model_validate(sequence)
    Comparison(study).run()
    found = TrialStore(study.folder).find("final/ours/lr-1e-30-seed-0")
    assert found is not None
    assert abs(found["forgot"]["first"]["mean"]) < 1e-3
    assert abs(found["forgot"]["elsewhere"]["mean"]) < 1e-3


def test_runs_of_another_first_task_are_not_mixed_in(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    Comparison(Study.model_validate(sequence)).run()
    sequence["first"]["seed"] = 1
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of first"):
        Comparison(Study.model_validate(sequence)).run()


def test_a_stored_first_model_is_scored_anew_on_other_questions(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    Comparison(Study.model_validate(sequence)).run()
    folder = Path(sequence["folder"])
    for file in (folder / "untouched.json", *folder.glob("final/*/*.json")):
        file.unlink()
    sequence["shared"]["data"]["test_examples"] = 1
    sequence["elsewhere"]["test_examples"] = 1
    study = Study.model_validate(sequence)
    Comparison(study).run()
    before = TrialStore(study.folder).find("untouched")
    assert before is not None
    assert (len(before["questions"]["nll"]), len(before["texts"]["nll"])) == (1, 1)
    assert len(list((folder / "work" / "first").iterdir())) == 1


def test_rows_of_the_first_task_are_replayed(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    study = Study.model_validate({**sequence, "replay": 5})
    bench = study.bench()
    assert [record.task for record in bench.records.train] == ["piqa"] * 12 + ["arc_easy"] * 5
    assert {record.task for record in bench.records.test} == {"piqa"}
    Comparison(study).run()
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of replay"):
        Comparison(Study.model_validate(sequence)).run()


def test_more_rows_than_the_first_task_has_are_refused_before_any_work(sequence: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"replay: must be at most the 12 training rows of first\.data, got 13"):
        Comparison(Study.model_validate({**sequence, "replay": 13})).run()
    assert not (Path(sequence["folder"]) / "work" / "first").exists()


def test_a_first_task_without_test_questions_is_refused(sequence: dict[str, Any]) -> None:
    sequence["first"]["data"]["test_examples"] = 0
    with pytest.raises(ConfigError, match=r"first\.data\.test_examples: a study needs a test part"):
        Comparison(Study.model_validate(sequence)).run()


def test_a_package_that_the_first_task_needs_is_named_before_any_work(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    sequence["first"]["data"] = {"tasks": ["chain_sum"]}
    with pytest.raises(DataError, match=r"data\.tasks: chain_sum: needs reasoning-gym"):
        Comparison(Study.model_validate(sequence)).run()


def test_a_killed_study_goes_on_from_the_stored_first_task(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.model_validate(sequence)
    Comparison(study).untouched()
    scores = json.loads((study.folder / "untouched.json").read_text())["scores"]
    monkeypatch.setattr("smoa_lab.study.sequence.load_run", lambda *_: pytest.fail("it was trained already"))
    Comparison(study).run(["ours"])
    assert Comparison(study).untouched()["scores"] == scores
    assert TrialStore(study.folder).names("final/") == RUNS[1:]


def chain(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """With a third task between the two, one rate, and our entry only."""
    parts = (lab.questions(number, f"hellaswag {part}", "hellaswag") for part, number in (("train", 12), ("test", 3)))
    lab.fill_cache(tmp_path / "cache", *parts, "hellaswag")
    between = {"data": {"tasks": ["hellaswag"], "validation_examples": 0}, "training": {"max_steps": 3}}
    entries = {"ours": values["entries"]["ours"]}
    return {**values, "between": [between], "entries": entries, "tuning": {"sweep": [0.01, 0.01], "per_decade": 2}}


def test_tasks_between_are_trained_by_the_entrys_own_method(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    real_fit = LoadedRun.fit

    def fit(lesson: LoadedRun, *arguments: Any) -> Any:
        trained.append((lesson.title, lesson.config.method, lesson.config.training["max_steps"]))
        return real_fit(lesson, *arguments)

    monkeypatch.setattr(LoadedRun, "fit", fit)
    study = Study.model_validate(chain(sequence, tmp_path))
    Comparison(study).run()
    assert trained == [("arc_easy", "full", 2), ("hellaswag", "smoa", 3), ("piqa", "smoa", 2)]
    store = TrialStore(study.folder)
    before, found = store.find("untouched"), store.find("final/ours/lr-0.01-seed-0")
    assert before is not None
    assert found is not None
    for run in (before, found):
        assert run["first"]["questions"]["task"] == ["arc_easy"] * 3 + ["hellaswag"] * 3
    assert found["forgot"]["first"]["mean"] != pytest.approx(
        loss(found["first"]["questions"]) - loss(before["first"]["questions"])
    )  # it is the rise by the last task alone
    assert not list((study.folder / "work").rglob("between"))
    assert sequence_report(study)["runs"][0]["first_loss"] == found["first"]["scores"]["all"]["gold_loss"]
    assert "# study: arc_easy, then hellaswag, then piqa, with" in (study.folder / "README.md").read_text()


def test_runs_of_another_task_between_are_not_mixed_in(sequence: dict[str, Any], tmp_path: Path) -> None:
    values = chain(sequence, tmp_path)
    Comparison(Study.model_validate(values)).untouched()
    values["between"][0]["training"] = {"max_steps": 1}
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of between"):
        Comparison(Study.model_validate(values)).untouched()


def test_a_task_between_without_test_questions_is_refused(sequence: dict[str, Any], tmp_path: Path) -> None:
    values = chain(sequence, tmp_path)
    values["between"][0]["data"]["test_examples"] = 0
    with pytest.raises(ConfigError, match=r"between\[0\]\.data\.test_examples: a study needs a test part"):
        Comparison(Study.model_validate(values)).run()
