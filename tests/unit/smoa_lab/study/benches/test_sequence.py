"""Studies of two tasks in turn: where entries start, what is scored, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import TrialStore

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
    monkeypatch.setattr("smoa_lab.study.benches.first_stage.prepare", lambda *_: pytest.fail("it was trained already"))
    Comparison(study).run(["ours"])
    assert Comparison(study).untouched()["scores"] == scores
    assert TrialStore(study.folder).names("final/") == RUNS[1:]
