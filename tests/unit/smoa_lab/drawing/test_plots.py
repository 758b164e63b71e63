from __future__ import annotations

from pathlib import Path

from PIL import Image

from smoa_lab.drawing.plots import draw_run


def test_a_run_that_logged_nothing_has_an_empty_picture_and_no_warning(tmp_path: Path) -> None:
    draw_run([{"step": 3, "train_loss": 1.0}], {}, tmp_path / "curve.png", "short")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_run_that_was_scored_before_and_after_shows_both(tmp_path: Path) -> None:
    before = {"questions": 300, "accuracy": 0.33, "accuracy_stderr": 0.027, "majority": 0.21}
    evaluation = {"before": {"all": before}, "after": {"all": {**before, "accuracy": 0.51}}}
    history = [{"step": step, "loss": 5 / step} for step in range(1, 9)]
    draw_run(history, evaluation, tmp_path / "both.png", "smoa on csqa")
    draw_run(history, {"after": evaluation["after"]}, tmp_path / "after.png", "smoa on csqa")
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "after.png") as after:
        assert both.height > after.height
