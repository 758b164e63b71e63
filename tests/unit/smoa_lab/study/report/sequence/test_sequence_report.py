"""The page, picture and summary of a sequence, from stored runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.study.report.sequence.sequence_report import sequence_report
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial
from tests.support.studies import finish_in_turn, finish_untouched, page


@pytest.fixture
def finished(sequence: dict[str, Any]) -> Study:
    """Two entries at two rates and two seeds, a rate that diverged, and an entry that is not run yet."""
    entries = {"ours": sequence["entries"]["ours"], "lora": {"method": "lora", "learning_rate": 0.01}}
    sequence |= {"entries": entries | {"late": entries["lora"]}, "references": ["lora"], "seeds": [0, 1]}
    sequence["tuning"]["sweep"] = [0.003, 0.03]
    study = Study.model_validate(sequence)
    for seed in (0, 1):
        for rate, second, first in ((0.003, 2.0, 3.0), (0.01, 1.0, 3.4)):
            finish_in_turn(study, Trial("final", "ours", rate, seed), second, first)
            finish_in_turn(study, Trial("final", "lora", rate, seed), second + 0.1, first + 1)
        finish_in_turn(study, Trial("final", "lora", 0.03, seed), None, 9.0, change=None)
    scores = {"scores": {"all": {"gold_loss": 2.5, "accuracy": 0.25}}}
    before = {**scores, "first": {"scores": {"all": {"gold_loss": 2.8, "accuracy": 0.5}}}, "elsewhere": 1.5}
    finish_untouched(study, **before, start=before)
    return study


def test_the_summary_has_runs_comparisons_and_explanations(finished: Study) -> None:
    summary = sequence_report(finished)
    assert json.loads((finished.folder / "summary.json").read_text()) == summary
    assert len(summary["runs"]) == 10
    ours, lora = summary["equal"]
    assert (ours["entry"], lora["entry"], lora["difference"]) == ("ours", "lora", None)
    assert ours["difference"]["verdict"] == ours["difference"]["holm_verdict"] == "better"
    (lower,) = summary["lower_levels"]
    assert ours["difference"]["holm_p"] == 2 * ours["difference"]["p"] == lower["difference"]["holm_p"]
    assert summary["correlations"]["relative_norm"] == {"forgot": 1.0, "forgot_elsewhere": 1.0}
    assert summary["before"]["start"]["elsewhere"] == 1.5


def test_the_pages_tell_it_all(finished: Study) -> None:
    sequence_report(finished)
    text, html = page(finished), (finished.folder / "index.html").read_text()
    assert (finished.folder / "frontier.png").is_file()
    assert "# study: arc_easy, then piqa, with" in text
    assert "before the first task: first 2.800 (50.0 %), second 2.500 (25.0 %), elsewhere 1.500; after it" in text
    assert "Not run yet: late." in text
    for shown in (text, html):
        assert "stable rank" in shown
        assert "final/ours/lr-0.01-seed-0" in shown or "ours/lr-0.01-seed-0" in shown
    assert 'id="final/lora/lr-0.03-seed-0"' in html


def test_before_the_first_run_there_is_nothing_to_report(sequence: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no final run is finished yet"):
        sequence_report(Study.model_validate(sequence))


def test_a_study_without_the_reference_is_reported_without_comparisons(sequence: dict[str, Any]) -> None:
    study = Study.model_validate({**sequence, "references": ["full"]})
    finish_in_turn(study, Trial("final", "ours", 0.01, 0), 2.0, 3.0)
    summary = sequence_report(study)
    assert (summary["equal"], summary["before"]) == ([], None)
    assert summary["correlations"]["stable_rank"] == {"forgot": None, "forgot_elsewhere": None}
