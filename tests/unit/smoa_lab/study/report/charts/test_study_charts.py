"""The charts of a study's entries, by the data that they draw."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from smoa_lab.drawing.look import PALETTE, specification
from smoa_lab.study.report.charts.study_charts import COLUMN, _spread, accuracy, cost, differences
from smoa_lab.study.report.results.rows import as_json, entry_row, from_json
from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.study_file import Study
from tests.support.studies import finish_a_study, row

NAN = float("nan")


def data(chart: Any) -> list[dict[str, Any]]:
    """The rows that a chart draws."""
    found = [rows for rows in specification(chart)["datasets"].values() if "entry" in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_its_interval_its_words_and_the_way_to_its_run() -> None:
    (drawn,) = data(differences([row(), row("ours", method="smoa", loss_difference=None)]))
    assert (drawn["low"], drawn["mean"], drawn["high"], drawn["clear"]) == (0.25, 0.5, 0.75, True)
    assert (drawn["difference"], drawn["verdict"]) == ("+0.5000 [+0.2500, +0.7500]", "worse")
    assert drawn["run"] == "#final/lora/lr-0.01-seed-3"
    assert PALETTE["lora"] in str(specification(differences([row()])))


def test_every_budget_has_its_own_forest() -> None:
    drawn = specification(differences([row(), row("other", budget="large", reference="full")]))
    assert [one["title"] for one in drawn["vconcat"]] == ["Budget: all", "Budget: large"]


def test_what_diverged_or_has_no_reference_yet_is_left_out() -> None:
    assert differences([row(loss_difference=Difference(NAN, NAN, NAN, "worse"))]) is None
    assert differences([row(loss_difference=None)]) is None
    assert cost([row(seconds=None)]) is None


def test_entries_of_equal_parameters_stand_side_by_side_on_an_axis_that_names_them() -> None:
    rows = [row("a"), row("b"), row("c", parameters=64_000)]
    a, b, c = (one["place"] for one in data(accuracy(rows)))
    assert b - a == COLUMN
    assert c - b > 2 * COLUMN
    assert "'64,000'" in str(specification(accuracy(rows)))


@pytest.mark.parametrize("numbers", [[5], [5, 5, 5], [100, 101, 100], [10, 10, 20, 10**7, 10**7 + 1]])
def test_no_two_entries_overlap_and_all_are_within_the_width(numbers: list[int]) -> None:
    places, ticks, width = _spread(numbers)
    assert all(b - a >= COLUMN - 1e-6 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    assert 0 < min(places) <= max(places) < width
    assert list(ticks.values()) == sorted(set(numbers))


def test_a_row_is_the_same_after_its_summary_is_read(study: Study) -> None:
    finish_a_study(study)
    found = entry_row(study, "lora", ("a CPU", None))
    assert found is not None
    assert from_json(as_json([found])[0]) == found
    diverged = dataclasses.replace(found, loss=NAN, loss_difference=Difference(NAN, NAN, NAN, "worse"))
    stored = from_json(as_json([diverged])[0])
    assert str(stored) == str(diverged)
