"""The charts of a study, by the data that they draw."""

from types import SimpleNamespace
from typing import Any

from smoa_lab.pages.charts import color_of
from smoa_lab.study.charts import differences, learned_and_forgotten, losses, searches
from smoa_lab.study.search import Chosen
from smoa_lab.study.statistics import Difference
from tests.support.studies import result

NAN = float("nan")


def data(chart: Any, key: str) -> list[dict[str, Any]]:
    """The rows that a chart draws, those with this key."""
    found = [rows for rows in chart.to_dict()["datasets"].values() if key in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_its_interval_its_words_and_its_run_a_forest_for_each_budget() -> None:
    (drawn,) = data(differences([result(), result("ours", method="smoa", differences={})]), "entry")
    assert (drawn["low"], drawn["mean"], drawn["high"], drawn["clear"]) == (0.25, 0.5, 0.75, True)
    assert (drawn["difference"], drawn["verdict"]) == ("+0.5000 [+0.2500, +0.7500]", "worse")
    assert (drawn["entry"], drawn["run"]) == ("LoRA", "#lora/lr-1e-2-seed-3")
    assert color_of("lora") in str(differences([result()]).to_dict())
    two = differences([result(), result("other", budget="large", reference="full")]).to_dict()
    assert [one["title"] for one in two["vconcat"]] == ["Budget: all", "Budget: large"]


def test_what_diverged_or_was_not_measured_yet_is_left_out() -> None:
    diverged = result(differences={"loss": Difference(NAN, NAN, NAN, "worse")}, forgotten=None)
    assert differences([diverged]) is None
    assert differences([result(differences={})]) is None
    assert learned_and_forgotten([diverged], 4.0) is None
    assert searches([result(chosen=Chosen(0.01, {}, "named"))]) is None


def test_a_search_is_a_line_without_the_runs_that_diverged() -> None:
    drawn = searches([result(chosen=Chosen(0.01, {0.003: 2.6, 0.01: 2.5, 0.03: None}, "interior"))])
    assert [(row["learning rate"], row["validation loss"]) for row in data(drawn, "name")] == [
        (0.003, 2.6),
        (0.01, 2.5),
    ]


def test_the_training_loss_is_drawn_by_seconds() -> None:
    history = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.5}, {"step": 20, "train_runtime": 9.0}]
    metrics = {"training": {"seconds": 40.0, "steps": 20}, "history": history}
    runs: Any = {"lora": {3: SimpleNamespace(metrics=metrics)}}
    assert [(row["seconds"], row["training loss"]) for row in data(losses([result()], runs), "name")] == [
        *((20.0, 3.0), (40.0, 2.5)),
    ]


def test_what_was_learned_stands_against_what_was_forgotten_beside_the_untouched_model() -> None:
    drawn = data(learned_and_forgotten([result()], 4.0), "entry")
    assert [(row["entry"], row["forgotten"], row["loss"]) for row in drawn] == [
        *(("lora", 0.01, 2.5), ("untouched", 0.0, 4.0)),
    ]
