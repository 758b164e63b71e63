"""Reports of studies in all states: half finished, diverged, without a search, without what was known before."""

from __future__ import annotations

import json
import re

import pytest

from smoa_lab.study.packing import PACK, pack
from smoa_lab.study.report.study_report import report
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial
from tests.support.studies import QUESTIONS, finish, finish_a_study, page


def test_a_first_final_run_is_reported_without_search_or_differences(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    (row,) = report(study)
    assert (row.entry, row.reference, row.search, row.elsewhere) == ("ours", "ours", None, None)
    assert (row.loss_spread, row.seconds) == (0.0, 7.0)
    text = page(study)
    assert "Not run yet: lora, full." in text
    assert "untouched" not in text
    assert [file.name for file in study.folder.glob("*.png")] == ["accuracy.png"]
    assert "Learning rates" not in (study.folder / "index.html").read_text()


def test_one_seed_gets_no_verdict_and_two_do(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0)
        finish(study, Trial("final", "lora", 0.01, seed), 2.5)
        rows = {row.entry: row for row in report(study)}
        assert rows["lora"].loss_difference is not None
        assert rows["lora"].loss_difference.verdict == ("one seed", "worse")[seed]
    assert "+0.5000 [+0.5000, +0.5000] | worse" in page(study)


def test_an_entry_is_not_called_the_reference_while_that_is_not_run(study: Study) -> None:
    finish(study, Trial("final", "lora", 0.01, 0), 1.0)
    (row,) = report(study)
    assert (row.reference, row.loss_difference) == ("ours", None)
    for file in ("README.md", "index.html"):
        assert not re.search(r"(\| |<td>)reference( \||</td>)", (study.folder / file).read_text())


def test_every_budget_has_its_own_table_and_reference(study: Study) -> None:
    for name, rate in (("ours", 0.01), ("lora", 0.01), ("full", 0.001)):
        finish(study, Trial("final", name, rate, 0), 2.0)
    assert {row.entry: row.reference for row in report(study)} == {"ours": "ours", "lora": "ours", "full": "full"}
    text = page(study)
    assert text.index("## Budget: large") < text.index("## Budget: small")


def test_a_sweep_is_told_by_its_steps_and_range(study: Study) -> None:
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    sweep = study.tuning.model_copy(update={"sweep": (0.001, 0.03), "per_decade": 2})
    report(study.model_copy(update={"tuning": sweep}))
    assert "the same search: every half decade from 0.001 to 0.03. The" in page(study)
    own = study.entries | {"lora": study.entries["lora"].model_copy(update={"sweep": (0.01, 0.1)})}
    report(study.model_copy(update={"tuning": sweep, "entries": own}))
    assert "from 0.001 to 0.03, or of its own range. The" in page(study)


def test_a_search_that_ends_at_its_edge_is_marked_and_a_diverged_run_never_chosen(study: Study) -> None:
    for rate, loss in ((0.003, 2.2), (0.01, 2.1), (0.03, None)):
        finish(study, Trial("tuning", "ours", rate, 100), loss)
    finish(study, Trial("final", "ours", 0.01, 0), 2.0)
    for rate, loss in ((0.003, 2.2), (0.01, 2.1), (0.03, 1.9)):
        finish(study, Trial("tuning", "lora", rate, 100), loss)
    finish(study, Trial("final", "lora", 0.01, 0), 2.0)  # at a learning rate that the search gave up
    finish(study, Trial("final", "lora", 0.03, 0), 1.8)
    rows = {row.entry: row for row in report(study)}
    assert rows["ours"].search is not None
    assert rows["ours"].search.losses == {0.003: 2.2, 0.01: 2.1, 0.03: None}
    assert rows["ours"].search.interior
    assert rows["lora"].loss == pytest.approx(1.8 + (QUESTIONS - 1) / QUESTIONS / 2)
    text = page(study)
    assert "| 0.03 ! |" in text
    assert "| 0.01 |" in text
    assert (study.folder / "learning_rates.png").stat().st_size > 100


def test_a_final_run_that_diverged_is_worse_than_any(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), 2.0)
        finish(study, Trial("final", "lora", 0.01, seed), None)
    rows = {row.entry: row for row in report(study)}
    assert rows["lora"].loss_difference is not None
    assert rows["lora"].loss_difference.verdict == "worse"
    summary = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [one["loss"] for one in summary if one["entry"] == "lora"] == [None]


def test_a_reference_that_diverged_makes_nobody_worse(study: Study) -> None:
    for seed in (0, 1):
        finish(study, Trial("final", "ours", 0.01, seed), None)
        finish(study, Trial("final", "lora", 0.01, seed), 2.0)
    rows = {row.entry: row for row in report(study)}
    assert rows["lora"].loss_difference is not None
    assert rows["lora"].loss_difference.verdict == "better"


def test_a_packed_study_has_the_same_report_to_the_byte(study: Study) -> None:
    finish_a_study(study)
    report(study)
    files = [file for file in study.folder.iterdir() if file.is_file() and file.name != "untouched.json"]
    before = {file.name: file.read_bytes() for file in files}
    titles = ("accuracy", "differences", "learning_rates")
    pictures = [f"{title}.{ending}" for title in titles for ending in ("png", "svg")]
    assert sorted(before) == sorted(["README.md", "charts.js", "index.html", "summary.json", *pictures])
    pack(study.folder)
    for name in before:
        (study.folder / name).unlink()
    report(study)
    after = {file.name: file.read_bytes() for file in study.folder.iterdir() if file.is_file()}
    assert after.pop(PACK)
    assert after == before
