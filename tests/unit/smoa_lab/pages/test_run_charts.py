from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from smoa_lab.pages.charts import specification
from smoa_lab.pages.run_charts import accuracies, balance, draw_run, learning_rate, losses
from tests.support.runs import stored_metrics

HISTORY = stored_metrics()["history"]
EVALUATION = stored_metrics()["evaluation"]
ROWS = {stage: {"all": {"loss": loss, "perplexity": 9.0}} for stage, loss in (("before", 3.0), ("after", 2.0))}


def rows(chart: Any) -> list[dict[str, Any]]:
    return [row for one in specification(chart)["datasets"].values() for row in one]


def test_training_and_validation_loss_are_drawn_by_step() -> None:
    found = {(row["data"], row["step"], row["loss"]) for row in rows(losses(HISTORY, {}, "smoa"))}
    assert found == {("training", 5, 0.8), ("training", 10, 0.4), ("training", 15, 4 / 15), ("validation", 20, 2.5)}


def test_held_out_rows_are_points_at_the_first_and_the_last_step() -> None:
    found = [row for row in rows(losses(HISTORY, ROWS, "smoa")) if row["data"] == "held-out rows"]
    assert {(row["step"], row["loss"]) for row in found} == {(0, 3.0), (20, 2.0)}


def test_losses_that_are_no_numbers_are_left_out() -> None:
    history = [*HISTORY[:2], {"step": 15, "loss": None}]
    diverged = {**ROWS, "after": {"all": {"loss": None, "perplexity": None}}}
    found = {(row["data"], row["step"]) for row in rows(losses(history, diverged, "smoa"))}
    assert found == {("training", 5), ("training", 10), ("held-out rows", 0)}
    assert balance(diverged, {"before": 3.0, "after": None}, "smoa") is None


def test_accuracies_are_drawn_for_each_stage_and_for_all_tasks_where_there_are_several() -> None:
    found = rows(accuracies(EVALUATION, "smoa"))
    assert {(row["task"], row["stage"], row["label"]) for row in found} == {
        ("all tasks", "before", "50.0 %"),
        ("all tasks", "after", "62.5 %"),
    }
    many = {stage: {**scores, "csqa": scores["piqa"]} for stage, scores in EVALUATION.items()}
    assert len(rows(accuracies(many, "smoa"))) == 6


def test_what_was_not_measured_is_not_drawn() -> None:
    assert accuracies({"after": EVALUATION["after"]}, "smoa") is accuracies(ROWS, "smoa") is None
    assert losses([{"step": 3, "train_loss": 1.0}], {}, "smoa") is learning_rate([], "smoa") is None
    assert balance({}, None, "smoa") is None


def test_learned_and_forgotten_stand_in_one_chart() -> None:
    found = rows(balance(EVALUATION, stored_metrics()["forgetting"], "smoa"))
    assert {(row["of"], row["label"]) for row in found} == {
        ("held-out data (learned)", "-1.125"),
        ("general text (forgot)", "+0.250"),
    }


def test_a_run_has_a_picture_unless_it_logged_nothing(tmp_path: Path) -> None:
    for number, evaluation in enumerate(({}, EVALUATION, ROWS)):
        draw_run(HISTORY, evaluation, tmp_path / f"{number}.png", "smoa", "smoa on csqa")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.width > 1000
    draw_run([{"step": 3, "train_loss": 1.0}], {}, tmp_path / "none.png", "smoa", "short")
    assert not (tmp_path / "none.png").exists()
