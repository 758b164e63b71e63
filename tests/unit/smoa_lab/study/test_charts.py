"""The charts of a study, by the data that they draw."""

from __future__ import annotations

from typing import Any

from smoa_lab.pages.charts import color_of, specification
from smoa_lab.study.charts import differences, frontier
from smoa_lab.study.statistics import Difference
from tests.support.studies import row

NAN = float("nan")
TITLES = ("second", "first")


def data(chart: Any) -> list[dict[str, Any]]:
    """The rows that a chart draws."""
    found = [rows for rows in specification(chart)["datasets"].values() if "entry" in rows[0]]
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
    assert color_of("lora") in str(specification(differences([row()], {})))
    drawn = specification(differences([row(), row("other", budget="large", reference="full")], {}))
    assert [one["title"] for one in drawn["vconcat"]] == ["Budget: all", "Budget: large"]


def test_what_diverged_or_was_not_measured_yet_is_left_out() -> None:
    assert differences([row(loss_difference=Difference(NAN, NAN, NAN, "worse"))], {}) is None
    assert differences([row(loss_difference=None)], {}) is None


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


def layers(panel: dict[str, Any], drawn: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The data of each layer of a panel."""
    return [drawn["datasets"][layer["data"]["name"]] for layer in panel["layer"]]


def test_every_entry_has_a_panel_beside_its_reference_and_every_run_is_a_point() -> None:
    known = [*runs("ours", [2.0, 1.0, 0.5], [3.0, 3.5, 4.0]), *runs("lora", [2.0, 1.25], [3.0, 4.0])]
    drawn = specification(frontier(known, TITLES, 2.9, {"ours": "lora", "lora": "lora"}))
    (panel,) = drawn["concat"]
    assert (panel["title"]["text"], panel["title"]["subtitle"]) == ("ours", "hollow: lora")
    theirs, their_runs, line, points, own_runs, before = layers(panel, drawn)
    assert [len(one) for one in (their_runs, own_runs)] == [4, 6]
    assert {(one["entry"], one["learned"], one["kept"]) for one in theirs} == {("lora", 2.0, 3.0), ("lora", 1.25, 4.0)}
    assert line == points  # a line joins more than two points only, as the reference's are
    assert before == [{"kept": 2.9}]
    scale = panel["layer"][0]["encoding"]["x"]["scale"]
    assert "reverse" not in scale
    assert scale["domain"] == [0.0, 2.5]


def test_runs_that_all_lost_much_are_within_the_frame() -> None:
    drawn = specification(frontier(runs("ours", [1.0, 1.5], [9.0, 8.0]), TITLES, 2.0, {"ours": "ours"}))
    assert drawn["concat"][0]["layer"][0]["encoding"]["y"]["scale"]["domain"] == [2.0, 8.1]


def test_a_run_that_diverged_is_left_out_and_without_any_there_is_no_chart() -> None:
    drawn = specification(frontier(runs("ours", [2.0, None], [3.0, 9.0]), TITLES, None, {}))
    _, points = layers(drawn["concat"][0], drawn)
    assert len(points) == 2
    assert frontier(runs("ours", [None], [3.0]), TITLES, None, {}) is None
