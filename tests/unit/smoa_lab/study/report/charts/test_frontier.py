from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smoa_lab.drawing.look import specification
from smoa_lab.study.report.charts.frontier import LABEL_HEIGHT, MARGIN, TALLEST, _apart, frontier

TITLES = ("second", "first")


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


def test_runs_that_forgot_nearly_all_do_not_squeeze_the_others() -> None:
    found = frontier([*runs("ours", [2.0, 1.0], [3.0, 3.5]), *runs("lora", [1.5, 1.2], [30.0, 40.0])], TITLES, 2.9)
    frame = specification(found)["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert frame == [2.9 - MARGIN, 2.9 + TALLEST]
    assert all(frame[0] <= one["kept"] <= frame[1] for one in layers(found)[4])


def test_a_run_that_diverged_is_left_out_and_without_any_there_is_no_chart() -> None:
    assert len(layers(frontier(runs("ours", [2.0, None], [3.0, 9.0]), TITLES, None))[2]) == 2
    assert frontier(runs("ours", [None], [3.0]), TITLES, None) is None


@pytest.mark.parametrize("heights", [[], [0.2], [0.2, 0.21, 0.22], [0.97, 0.98, 1.0]])
def test_labels_do_not_overlap_and_stay_below_the_top(heights: list[float]) -> None:
    moved = _apart(heights)
    assert all(gap >= LABEL_HEIGHT - 1e-9 for gap in np.diff(moved))
    assert max(moved, default=0) <= 1
