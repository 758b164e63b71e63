"""The verdict in words, from results that are given."""

from dataclasses import replace
from typing import Any

import pytest

from smoa_lab.pages.charts import color_of
from smoa_lab.study.charts import differences, learned_and_forgotten, searches
from smoa_lab.study.results import Result
from smoa_lab.study.search import Chosen
from smoa_lab.study.statistics import Difference
from smoa_lab.study.verdict import verdict
from tests.support.studies import result

BETTER = Difference(-0.012, -0.02, -0.004, "better", p=0.005, holm_p=0.01, holm_verdict="better")
SAME = Difference(0.001, -0.019, 0.021, "same", p=0.9, holm_p=0.9, holm_verdict="same")
LORA = result(
    "lora", reference="lora", differences={}, values={"loss": (2.5, 0.1)}, kept="studies/x/lora/lr-2e-3-seed-1"
)


def smoa(difference: Difference | None = BETTER, **values: Any) -> Result:
    differences = {} if difference is None else {"loss": difference}
    known = {"method": "smoa", "reference": "lora", "step_seconds": 1.08, "differences": differences}
    return result("smoa", **{**known, "values": {"loss": (2.488, 0.1)}, "kept": "PATH", **values})


def test_a_difference_is_told_with_its_interval_its_cost_and_what_to_take() -> None:
    assert " ".join(verdict([smoa(), LORA], untouched_loss=3.0)) == (
        "On 200 held-out rows smoa's loss is 0.012 lower than lora's [−0.020, −0.004] (3 seeds, Holm 0.01); its step "
        "takes 1.08 of lora's time. Take smoa: PATH."
    )


def test_where_nothing_differs_it_says_what_would_have_been_seen_and_to_take_the_cheaper() -> None:
    assert " ".join(verdict([LORA, smoa(SAME)], untouched_loss=3.0)) == (
        "No difference that 3 seeds and 200 rows could show (0.020 would have been seen). "
        "Take the cheaper: lora, studies/x/lora/lr-2e-3-seed-1."
    )
    taken_back = Difference(-0.012, -0.02, -0.004, "better", p=0.03, holm_p=0.06, holm_verdict="same")
    assert verdict([smoa(taken_back, step_seconds=0.9), LORA], 3.0)[-1] == "Take the cheaper: smoa, PATH."


def test_an_entry_that_only_holms_correction_calls_the_same_is_told_of_by_itself_and_is_not_the_cheaper() -> None:
    doubted = Difference(1.09, 0.2, 1.98, "worse", p=0.03, holm_p=0.06, holm_verdict="same")
    ia3 = result("ia3", reference="lora", differences={"loss": doubted}, step_seconds=0.5)
    sentences = verdict([LORA, smoa(SAME), ia3], 3.0)
    assert sentences == [
        "On 200 held-out rows ia3's loss is 1.090 higher than lora's [0.200, 1.980] (3 seeds, Holm 0.06: it may be "
        "chance); its step takes 0.50 of lora's time.",
        "No difference between smoa and lora that 3 seeds and 200 rows could show (0.020 would have been seen).",
        "Take the cheaper: lora, studies/x/lora/lr-2e-3-seed-1.",
    ]
    assert verdict([LORA, ia3], 3.0)[-1] == "Take lora: studies/x/lora/lr-2e-3-seed-1."


def test_an_entry_whose_step_was_not_timed_is_not_the_cheaper() -> None:
    assert verdict([smoa(SAME, step_seconds=None), LORA], 3.0)[-1] == (
        "Take lora: studies/x/lora/lr-2e-3-seed-1. What a step of smoa takes on the same machine isn't known."
    )
    resumed = replace(LORA, step_seconds=None)
    assert verdict([smoa(SAME, step_seconds=None), resumed], 3.0)[-1].startswith("Which of lora and smoa is cheaper")
    assert verdict([smoa(BETTER, step_seconds=None), resumed], 3.0)[-1] == "Take smoa: PATH."


def test_seeds_and_rows_are_those_that_were_compared() -> None:
    added = {"seeds": [0, 1, 2, 3, 4, 5], "rows": 1}
    assert (
        "On 1 held-out row smoa's loss is 0.012 lower than lora's [−0.020, −0.004] (2 seeds,"
        in (verdict([smoa(paired=[0, 1], **added), LORA])[0])
    )
    dora = result("dora", reference="lora", differences={"loss": SAME}, rows=1)
    told = verdict([smoa(SAME, paired=[0, 1], **added), dora, replace(LORA, rows=1)])
    assert "that 2 to 3 seeds and 1 row could show" in told[0]
    assert told[-1].startswith("Only 1 row is held out, which shows")


def test_an_entry_of_another_size_is_named_with_its_share() -> None:
    sentences = verdict([smoa(share=0.94), LORA])
    assert "smoa with 94 % of lora's parameters's" not in sentences[0]
    assert "the loss of smoa with 94 % of lora's parameters is 0.012 lower than lora's" in sentences[0]
    assert verdict([smoa(SAME, share=0.94), LORA])[0].startswith(
        "No difference between smoa with 94 % of lora's parameters and lora that 3 seeds"
    )


def test_of_several_the_best_of_the_better_ones_is_taken() -> None:
    others = [smoa(), result("dora", reference="lora", differences={"loss": SAME}), LORA]
    sentences = verdict(others)
    assert sentences[0].startswith("On 200 held-out rows smoa's loss is 0.012 lower")
    assert sentences[1].startswith("No difference between dora and lora that 3 seeds")
    assert sentences[2] == "Take smoa: PATH."


def test_an_entry_at_the_edge_of_its_search_is_told_of_and_not_called_worse() -> None:
    edge = Chosen(0.03, {0.003: 2.6, 0.01: 2.5, 0.03: 2.4}, "edge")
    sentences = verdict([LORA, smoa(Difference(0.1, 0.05, 0.15, "open"), chosen=edge)])
    assert sentences[0].startswith("On 200 held-out rows smoa's loss is 0.100 higher than lora's [0.050, 0.150]")
    assert sentences[1:] == [
        "smoa's best rate, 3e-2, is the highest that was tried: it may do better beyond, and isn't called worse.",
        "Search further before you take one: name a rate beyond, or raise tuning.max_runs.",
    ]


NAN = float("nan")


@pytest.mark.parametrize(
    ("results", "untouched", "told"),
    [
        ([smoa(), LORA], 2.4, "Take none: the untouched model's loss, 2.400, is not higher."),
        ([smoa(), replace(LORA, rows=23)], 3.0, "Only 23 rows are held out"),
        (
            [smoa(Difference(NAN, NAN, NAN, "same"), diverged=3), replace(LORA, diverged=3)],
            3.0,
            "smoa diverged in 3 of 3",
        ),
        ([smoa(None), LORA], 3.0, "Not compared with lora yet: smoa."),
        ([smoa()], 3.0, "lora, with which the others are compared, has not run yet."),
        ([smoa(kept=None), LORA], 3.0, "Take smoa."),
        (
            [LORA, smoa(Difference(NAN, NAN, NAN, "worse"), diverged=2)],
            3.0,
            "smoa diverged in 2 of 3 runs; lora diverged in 0 of 3 runs.",
        ),
    ],
)
def test_what_limits_a_verdict_is_part_of_it(results: list[Result], untouched: float, told: str) -> None:
    assert any(sentence.startswith(told) for sentence in verdict(results, untouched))


def test_one_seed_gets_no_advice() -> None:
    one = Difference(-0.012, -0.02, -0.004, "one seed", p=0.01)
    (sentence,) = verdict([smoa(one, seeds=[0]), LORA])
    assert "(one seed, which gives no verdict)" in sentence


# charts

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


def test_what_was_learned_stands_against_what_was_forgotten_beside_the_untouched_model() -> None:
    drawn = data(learned_and_forgotten([result()], 4.0), "entry")
    assert [(row["entry"], row["forgotten"], row["loss"]) for row in drawn] == [
        *(("lora", 0.01, 2.5), ("untouched", 0.0, 4.0)),
    ]
