from __future__ import annotations

from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run_config import RunConfig
from smoa_lab.study.comparison import Comparison, stored_search
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial
from tests.support import lab
from tests.support.studies import finish


def test_the_untouched_model_is_scored_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.fill_cache(study.folder.with_name("cache"), lab.questions(4, "train"), lab.questions(4, "test"))
    comparison = Comparison(study)
    calls: list[str] = []

    def score(config: RunConfig, part: str) -> dict[str, Any]:
        calls.append(part)
        return {"config": config.model_dump(mode="json"), "scores": {}}

    monkeypatch.setattr(comparison.bench, "untouched", score)
    assert comparison.untouched() == comparison.untouched()
    assert calls == ["test"]
    comparison.bench.shared["training"] = {"use_cpu": True, "max_steps": 3}
    comparison.untouched()  # no training took place
    comparison.bench.shared["data"] = {"tasks": ["arc_easy"], "test_examples": 2}
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of data"):
        comparison.untouched()


def test_a_search_of_another_seed_is_no_part_of_this_one(study: Study) -> None:
    finish(study, Trial("tuning", "ours", 0.01, 100), 2.0)
    finish(study, Trial("tuning", "ours", 0.03, 7), 1.0)
    search = stored_search(study, "ours")
    assert search is not None
    assert search.learning_rate == 0.01


def test_before_the_first_run_there_is_no_search(study: Study) -> None:
    assert stored_search(study, "ours") is None
    finish(study, Trial("tuning", "ours", 0.01, 100), None)
    found = stored_search(study, "ours")
    assert found is not None
    assert found.losses == {0.01: None}
    assert not found.interior
