from __future__ import annotations

import numpy as np
import pytest

from smoa_lab.study.report.curves import Curve, Losses
from smoa_lab.study.report.frontier import LABEL_HEIGHT, TALLEST, _apart, frontier


def line(entry: str, second: list[float], first: list[float]) -> Curve:
    tasks = (Losses(np.array(means)[:, None, None] * np.ones((1, 2, 4)), np.ones(4)) for means in (first, second))
    return Curve(entry, [10.0**-i for i in range(len(second))], [0, 1], *tasks)


def test_every_run_is_a_point_and_every_entry_a_named_line() -> None:
    figure = frontier([line("ours", [2.0, 1.0], [3.0, 3.5]), line("lora", [2.0, 1.2], [3.0, 4.0])], before=2.9)
    axes = figure.axes[0]
    assert [len(points.get_offsets()) for points in axes.collections] == [4, 4]
    assert [list(one.get_xdata()) for one in axes.lines[:2]] == [[2.0, 1.0], [2.0, 1.2]]
    assert sorted(text.get_text() for text in axes.texts) == ["lora", "ours"]
    assert axes.xaxis_inverted()


def test_runs_that_forgot_nearly_all_do_not_squeeze_the_others() -> None:
    figure = frontier([line("ours", [2.0, 1.0], [3.0, 3.5]), line("lora", [1.5, 1.2], [30.0, 40.0])], before=2.9)
    assert figure.axes[0].get_ylim()[1] == 2.9 + TALLEST
    assert len(figure.axes[0].texts) == 2


@pytest.mark.parametrize("heights", [[], [0.2], [0.2, 0.21, 0.22], [0.97, 0.98, 1.0]])
def test_labels_do_not_overlap_and_stay_below_the_top(heights: list[float]) -> None:
    moved = _apart(heights)
    assert all(gap >= LABEL_HEIGHT - 1e-9 for gap in np.diff(moved))
    assert max(moved, default=0) <= 1
