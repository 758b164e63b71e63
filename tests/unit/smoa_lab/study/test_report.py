"""Reports of studies in all states: half finished, diverged, without a search, without what was known before."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.report import report
from smoa_lab.study.results import Row, rows_of
from smoa_lab.study.study import Study, Tuning
from smoa_lab.study.trials import Trial, TrialStore
from tests.support.studies import QUESTIONS, finish, finish_a_study, finish_untouched, page

pytestmark = pytest.mark.usefixtures("few_resamples")


def rows(study: Study) -> dict[str, Row]:
    """The rows of the report that is written, by entry."""
    report(study)
    return {row.entry: row for row in rows_of(Comparison(study))}


def test_a_first_final_run_is_reported_without_search_or_differences(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    (row,) = rows(study).values()
    assert (row.entry, row.reference, row.search) == ("ours", "ours", None)
    assert (row.loss_spread, row.seconds) == (0.0, 7.0)
    text = page(study)
    assert "Not run yet: lora, full." in text
    assert "untouched" not in text
    assert [file.name for file in study.folder.glob("*.png")] == []
    assert "Learning rates" not in (study.folder / "index.html").read_text()


def test_an_entry_is_compared_once_the_reference_is_run_and_judged_from_two_seeds(study: Study) -> None:
    finish(study, Trial("final", "lora", 0.01, 0), 2.5)
    (row,) = rows(study).values()
    assert (row.reference, row.loss_difference) == ("ours", None)
    for file in ("README.md", "index.html"):
        assert not re.search(r"(\| |<td>)reference( \||</td>)", (study.folder / file).read_text())
    finish(study, Trial("final", "ours", 0.01, 1), 2.0)
    row = rows(study)["lora"]
    assert row.loss_difference is row.accuracy_difference is None  # no seed of both
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    difference = rows(study)["lora"].loss_difference
    assert difference is not None
    assert difference.verdict == "one seed"
    finish(study, Trial("final", "lora", 0.01, 1), 2.5)
    difference = rows(study)["lora"].loss_difference
    assert difference is not None
    assert difference.verdict == "worse"
    assert "+0.5000 [+0.5000, +0.5000] | worse" in page(study)


def test_a_search_that_ends_at_its_edge_is_marked_and_a_diverged_run_never_chosen(study: Study) -> None:
    for rate, loss in ((0.003, 2.2), (0.01, 2.1), (0.03, None)):
        finish(study, Trial("tuning", "ours", rate, 100), loss)
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    for rate, loss in ((0.003, 2.2), (0.01, 2.1), (0.03, 1.9)):
        finish(study, Trial("tuning", "lora", rate, 100), loss)
    finish(study, Trial("final", "lora", 0.01, 0), 2.0)  # at a learning rate that the search gave up
    finish(study, Trial("final", "lora", 0.03, 0), 1.8)
    found = rows(study)
    assert found["ours"].search is not None
    assert found["ours"].search.losses == {0.003: 2.2, 0.01: 2.1, 0.03: None}
    assert found["ours"].search.interior
    assert found["lora"].loss == pytest.approx(1.8 + (QUESTIONS - 1) / QUESTIONS / 2)
    text = page(study)
    assert "| 0.03 ! |" in text
    assert "| 0.01 |" in text
    assert "| ours | 2.200 | 2.100 * | diverged |" in text
    assert "| lora | 2.200 | 2.100 | 1.900 * |" in text


def test_a_final_run_that_diverged_is_worse_than_any(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0)
        finish(study, Trial("final", "lora", 0.01, seed), None)
    found = rows(study)
    assert found["lora"].loss_difference is not None
    assert found["lora"].loss_difference.verdict == "worse"
    summary = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [one["loss"] for one in summary if one["entry"] == "lora"] == [None]


def test_every_link_of_a_report_leads_to_its_run(study: Study) -> None:
    finish_a_study(study)
    report(study)
    html = (study.folder / "index.html").read_text()
    lines = dict(re.findall(r'<tr><td><span id="([^"]+)">[^<]+</span></td>(.*?)</tr>', html))
    assert sorted(lines) == TrialStore(study.folder).names()
    links = set(re.findall(r'"(?:run":")?#((?:final|tuning)/[^"]+)"', html))
    assert links == {name for name in lines if name != "untouched"}
    values = re.findall(r"<td>([^<]*)</td>", lines["final/ours/lr-0.01-seed-0"])
    assert values == ["2.0000", "50.0", "60", "7", "a CPU", "ccccccc"]
    assert lines["tuning/ours/lr-0.03-seed-100"].startswith("<td>diverged</td>")
    files = {file.name for file in study.folder.iterdir() if file.is_file()}
    assert files == {"README.md", "index.html", "summary.json", "untouched.json", "differences.png"}


def test_what_was_known_before_is_told(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    scores = {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": 0.6}}
    finish_untouched(study, scores=scores)
    report(study)
    told = "The untouched model: loss 4.0000, accuracy 25.0 %; the commonest label of each task is right in 60.0 %."
    assert told in page(study)
    every, small = scores["all"], {"accuracy": 1.0, "majority": 0.5}
    finish_untouched(study, scores={"large": {**every, "accuracy": 0.2}, "small": small, "all": every})
    report(study)
    assert "accuracy 60.0 %; the commonest label of each task is right in 55.0 %." in page(study)
    every["majority"] = None
    finish_untouched(study, scores=scores)
    report(study)
    assert "The untouched model: loss 4.0000, accuracy 25.0 %.\n" in page(study)


@pytest.mark.parametrize("other", ["questions", "tokens"])
def test_runs_on_different_questions_or_tokens_are_not_compared(study: Study, other: str) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0, sha256="one")
    values: dict[str, Any] = {"sha256": "another"}
    if other == "tokens":
        questions = {name: [0] * QUESTIONS for name in ("task", "nll", "right")}
        values = {"sha256": "one", "questions": {**questions, "tokens": [2] * QUESTIONS}}
    finish(study, Trial("final", "lora", 0.01, 0), 2.5, **values)
    with pytest.raises(DataError, match="were scored on different questions"):
        report(study)


def test_a_run_on_data_that_changed_between_two_seeds_is_not_averaged_with_the_others(study: Study) -> None:
    for seed, content in ((0, "one"), (1, "another")):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0, sha256=content)
    with pytest.raises(DataError, match="were scored on different questions"):
        report(study)


def test_without_a_search_entries_run_at_their_own_rates_and_one_seed_has_no_spread(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    report(study.model_copy(update={"tuning": Tuning(max_runs=0)}))
    assert "| ours | 1,000 | 0.01 | 0 | 1 | 2.4875 | 50.0 |" in page(study)
    assert "The search of a learning rate: none; each entry runs at the rate that the study names." in page(study)
    assert "is chosen on validation data" not in page(study)


def changed(study: Study, **adapter: Any) -> Study:
    """The study with another adapter of one entry."""
    entry = study.entries["ours"].model_copy(update={"adapter": adapter})
    return study.model_copy(update={"entries": {**study.entries, "ours": entry}})


@pytest.mark.parametrize("stage", ["tuning", "final"])
def test_runs_of_other_settings_are_refused_if_the_study_asks_for_them(
    stage: Literal["tuning", "final"], study: Study
) -> None:
    other = changed(study, r=32)
    for rate, seed in ((0.01, 7), (0.003, 0)):  # which nobody asks for
        finish(study, Trial("final", "ours", rate, seed), 2.0)
    finish(study, Trial("final", "lora", 0.01, 0), 2.0)
    assert list(rows(other)) == ["lora"]
    finish(study, Trial(stage, "ours", 0.01, study.tuning.seed if stage == "tuning" else 0), 2.0)
    report(study)
    with pytest.raises(ConfigError, match=rf"{stage}/ours/.*: was run with other values of adapter"):
        report(other)


def test_an_untouched_model_that_was_scored_on_other_data_is_not_reported(study: Study) -> None:
    finish_untouched(study)
    other = study.model_copy(update={"shared": {**study.shared, "data": {"tasks": ["piqa"]}}})
    finish(other, Trial("final", "ours", 0.01, 0), 2.0)
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of data"):
        report(other)


def test_before_the_first_run_there_is_nothing_to_report(study: Study) -> None:
    with pytest.raises(DataError, match="no final run is finished yet"):
        report(study)
