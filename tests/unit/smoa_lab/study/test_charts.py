"""The chart of a study, by the data that it draws."""

from __future__ import annotations

from typing import Any

from smoa_lab.pages.charts import color_of
from smoa_lab.study.charts import differences
from smoa_lab.study.statistics import Difference
from tests.support.studies import row

NAN = float("nan")


def data(chart: Any) -> list[dict[str, Any]]:
    """The rows that a chart draws."""
    found = [rows for rows in chart.to_dict()["datasets"].values() if "entry" in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_its_interval_its_words_and_its_run_a_forest_for_each_budget() -> None:
    (drawn,) = data(
        differences([row(), row("ours", method="smoa", loss_difference=None)], {"lora": "LoRA", "ours": "SMoA"})
    )
    assert (drawn["low"], drawn["mean"], drawn["high"], drawn["clear"]) == (0.25, 0.5, 0.75, True)
    assert (drawn["difference"], drawn["verdict"]) == ("+0.5000 [+0.2500, +0.7500]", "worse")
    assert (drawn["entry"], drawn["reference"]) == ("LoRA", "SMoA")
    assert drawn["run"] == "#final/lora/lr-0.01-seed-3"
    assert color_of("lora") in str(differences([row()], {}).to_dict())
    drawn = differences([row(), row("other", budget="large", reference="full")], {}).to_dict()
    assert [one["title"] for one in drawn["vconcat"]] == ["Budget: all", "Budget: large"]


def test_what_diverged_or_was_not_measured_yet_is_left_out() -> None:
    assert differences([row(loss_difference=Difference(NAN, NAN, NAN, "worse"))], {}) is None
    assert differences([row(loss_difference=None)], {}) is None
