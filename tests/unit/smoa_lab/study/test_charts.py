"""The charts of a study, by the data that they draw."""

from __future__ import annotations

from typing import Any

from smoa_lab.pages.charts import MUTED, PALETTE, specification
from smoa_lab.study.charts import (
    cost,
    differences,
    frontier,
    learning_rates,
)
from smoa_lab.study.search import Tuned
from smoa_lab.study.statistics import Difference
from tests.support.studies import row

NAN = float("nan")
TITLES = ("second", "first")
SEARCH = Tuned({0.003: 2.5, 0.01: 2.25, 0.03: None}, 0.01, interior=True)
NAMES = [f"tuning/{entry}/lr-{rate}-seed-100" for entry in ("lora", "ours") for rate in ("0.003", "0.01", "0.03")]


def data(chart: Any) -> list[dict[str, Any]]:
    """The rows that a chart draws."""
    found = [rows for rows in specification(chart)["datasets"].values() if "entry" in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_its_interval_its_words_and_its_run_a_forest_for_each_budget() -> None:
    (drawn,) = data(differences([row(), row("ours", method="smoa", loss_difference=None)]))
    assert (drawn["low"], drawn["mean"], drawn["high"], drawn["clear"]) == (0.25, 0.5, 0.75, True)
    assert (drawn["difference"], drawn["verdict"]) == ("+0.5000 [+0.2500, +0.7500]", "worse")
    assert drawn["run"] == "#final/lora/lr-0.01-seed-3"
    assert PALETTE["lora"] in str(specification(differences([row()])))
    drawn = specification(differences([row(), row("other", budget="large", reference="full")]))
    assert [one["title"] for one in drawn["vconcat"]] == ["Budget: all", "Budget: large"]


def test_what_diverged_or_was_not_measured_yet_is_left_out() -> None:
    for search in (None, Tuned({0.01: None}, 0.01, interior=False)):
        assert learning_rates([row(search=search)], NAMES) is None
    assert differences([row(loss_difference=Difference(NAN, NAN, NAN, "worse"))]) is None
    assert differences([row(loss_difference=None)]) is None
    assert cost([row(seconds=None)]) is None


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


def runs(entry: str, learned: list[float | None], kept: list[float]) -> list[dict[str, Any]]:
    """Two seeds at each rate, with these mean losses."""
    return [
        {
            "entry": entry,
            "method": "smoa",
            "learning_rate": 10.0**-i,
            "seed": seed,
            "run": f"#{entry}-{i}-{seed}",
            "learned": None if one is None else one + seed - 0.5,
            "kept": other,
        }
        for i, (one, other) in enumerate(zip(learned, kept, strict=True))
        for seed in (0, 1)
    ]


def layers(chart: Any) -> list[list[dict[str, Any]]]:
    """The data of each layer: line, rings, runs, leaders, labels, and the loss before."""
    drawn = specification(chart)
    shared = drawn.get("data")
    return [drawn["datasets"][layer.get("data", shared)["name"]] for layer in drawn["layer"]]


def test_every_run_is_a_point_and_every_entry_a_named_line_of_means() -> None:
    found = frontier([*runs("ours", [2.0, 1.0], [3.0, 3.5]), *runs("lora", [2.0, 1.25], [3.0, 4.0])], TITLES, 2.9)
    line, _, points, _, labels, before = layers(found)
    assert len(points) == 8
    assert {(one["entry"], one["learned"], one["kept"]) for one in line} == {
        *(("ours", 2.0, 3.0), ("ours", 1.0, 3.5), ("lora", 2.0, 3.0), ("lora", 1.25, 4.0))
    }
    assert sorted(one["entry"] for one in labels) == ["lora", "ours"]
    assert before == [{"kept": 2.9}]
    assert specification(found)["layer"][0]["encoding"]["x"]["scale"]["reverse"]


def test_a_run_that_diverged_is_left_out_and_without_any_there_is_no_chart() -> None:
    assert len(layers(frontier(runs("ours", [2.0, None], [3.0, 9.0]), TITLES, None))[2]) == 2
    assert frontier(runs("ours", [None], [3.0]), TITLES, None) is None
