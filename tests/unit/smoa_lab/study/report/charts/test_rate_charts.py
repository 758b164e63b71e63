from __future__ import annotations

import pytest

from smoa_lab.drawing.look import MUTED, PALETTE, specification
from smoa_lab.study.comparison import Tuned
from smoa_lab.study.report.charts.rate_charts import learning_rates
from tests.support.studies import row

SEARCH = Tuned({0.003: 2.5, 0.01: 2.25, 0.03: None}, 0.01, interior=True)
NAMES = [f"tuning/{entry}/lr-{rate}-seed-100" for entry in ("lora", "ours") for rate in ("0.003", "0.01", "0.03")]


def test_every_entry_has_a_panel_with_all_others_in_gray() -> None:
    drawn = specification(learning_rates([row(search=SEARCH), row("ours", method="smoa", search=SEARCH)], NAMES))
    assert [panel["title"]["text"] for panel in drawn["concat"]] == ["lora", "ours"]
    assert [panel["title"]["subtitle"] for panel in drawn["concat"]] == ["2.250 at 0.01"] * 2
    for panel, method in zip(drawn["concat"], ("lora", "smoa"), strict=True):
        others, own, points = panel["layer"]
        assert (others["mark"]["color"], own["mark"]["color"]) == (MUTED, PALETTE[method])
        assert len(drawn["datasets"][others["data"]["name"]]) == 4
        shown = drawn["datasets"][points["data"]["name"]]
        assert [one["learning_rate"] for one in shown] == [0.003, 0.01]
        assert shown[0]["run"] == f"#tuning/{panel['title']['text']}/lr-0.003-seed-100"


def test_a_rate_that_failed_does_not_squeeze_the_others() -> None:
    wild = Tuned({0.003: 2.5, 0.01: 2.25, 0.03: 90.0}, 0.01, interior=True)
    drawn = specification(learning_rates([row(search=wild), row("ours", search=SEARCH)], NAMES))
    low, high = drawn["concat"][0]["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert low < 2.25
    assert 2.5 < high < 4


@pytest.mark.parametrize("search", [None, Tuned({0.01: None}, 0.01, interior=False)])
def test_without_a_search_that_gave_a_loss_there_is_no_chart(search: Tuned | None) -> None:
    assert learning_rates([row(search=search)], NAMES) is None
