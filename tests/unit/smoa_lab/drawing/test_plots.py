from __future__ import annotations

from pathlib import Path

from smoa_lab.drawing.plots import draw_loss_curve


def test_a_run_that_logged_nothing_has_an_empty_picture_and_no_warning(tmp_path: Path) -> None:
    draw_loss_curve([{"step": 3, "train_loss": 1.0}], tmp_path / "curve.png", "short")
    assert (tmp_path / "curve.png").stat().st_size > 1000
