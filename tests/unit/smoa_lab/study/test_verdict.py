"""The verdict in words, from numbers that are given."""

import math
from dataclasses import replace
from typing import Any

from smoa_lab.pages.charts import color_of
from smoa_lab.scoring.differences import Difference
from smoa_lab.study.charts import differences, learned_and_forgotten, searches
from smoa_lab.study.results import LOSS, OF_CHOICES, OF_PREFERENCES, Budget, Measure, Result
from smoa_lab.study.search import Chosen
from smoa_lab.study.verdict import verdict
from tests.support.studies import result

LORA = result("lora", reference="lora", step_seconds=1.0, kept="PATH")
SMOA = result("smoa", reference="lora", step_seconds=1.08)
HIRA = result("hira", reference="lora", step_seconds=2.0)
ERROR = (0.01, 4.0)
"""The standard error that three seeds give a difference: half an interval of 0.028 at 95 %."""
GAIN = Difference(0.85, 0.8, 0.9, "better")


def lost(mean: float, half: float = 0.03, error: tuple[float, float] = ERROR) -> Difference:
    return Difference(mean, mean - half, mean + half, "same", error=error)


def budget(
    *results: Result, half: float = 0.03, gain: Difference | None = GAIN, measure: Measure = LOSS, **losses: float
) -> Budget:
    """Entries whose losses are above the lowest by so much."""
    pairs = {
        (one.entry, other.entry): lost(losses.get(one.entry, 0.0) - losses.get(other.entry, 0.0), half)
        for one in results
        for other in results
        if one is not other
    }
    planned = sum(len(one.seeds) for one in results)
    return Budget(list(results), planned, measure, pairs, gain, level=0.05, tolerance=0.1)


def told(given: Budget) -> str:
    return " ".join(verdict(given, "smoa compare studies/x/study.yaml", of_round=800))


def test_the_cheapest_that_loses_little_against_each_other_is_taken() -> None:
    assert told(budget(HIRA, LORA, SMOA, lora=0.01, smoa=0.005)) == (
        "None is more than 0.040 nats per token better than lora (95 %), 5 % of what training gained: take lora, the "
        "cheapest: PATH."
    )
    assert told(budget(SMOA, LORA, lora=0.01)).startswith("smoa is no more than 0.040 nats per token better than lora")


def test_one_that_costs_more_is_taken_where_those_that_cost_less_lose_more_than_a_tenth_of_what_training_gained() -> (
    None
):
    assert told(budget(HIRA, SMOA, LORA, lora=0.2, smoa=0.04)) == (
        "None is more than 0.070 nats per token better than smoa (95 %), 8 % of what training gained: take smoa."
    )
    assert told(budget(HIRA, SMOA, LORA, lora=0.2, smoa=0.1)) == (
        "hira is better than lora and smoa by 0.070 nats per token or more (95 %), 8 % of what training gained: take "
        "hira."
    )


def test_the_sentence_is_in_the_unit_of_what_decides() -> None:
    points = Difference(0.3, 0.25, 0.35, "better")
    assert "no more than 2.0 points better" in told(budget(SMOA, LORA, half=0.02, gain=points, measure=OF_CHOICES))
    assert "no more than 0.030 nats better" in told(budget(SMOA, LORA, measure=OF_PREFERENCES[0]))


def test_where_seeds_tell_too_little_it_says_how_many_more_would_and_how_to_run_them() -> None:
    assert told(budget(SMOA, LORA, half=0.09)) == (
        "Undecided: more held-out rows are needed. 200 rows alone leave 0.086 nats per token open, however many seeds "
        "run; 0.080 nats per token are little."
    )
    wide = budget(SMOA, LORA)
    pairs = {pair: lost(0.0, 0.14, (0.05, 4.0)) for pair in wide.pairs}
    assert told(replace(wide, pairs=pairs)) == (
        "Undecided: 5 more seeds, about 67 min, would tell 0.111 nats per token apart (0.080 nats per token are "
        "little): `smoa compare studies/x/study.yaml --seeds 8`."
    )


def test_where_training_gained_nothing_for_certain_none_is_taken() -> None:
    nothing = Difference(0.01, -0.02, 0.04, "same")
    assert told(budget(SMOA, LORA, gain=nothing)).startswith("Training gained nothing that could be shown (0.010 nats")
    assert told(budget(SMOA, LORA, gain=nothing)).endswith("take none.")
    assert told(budget(SMOA, LORA, gain=None)).startswith("No verdict: what training gained isn't known")


def test_an_entry_at_the_edge_of_its_search_leaves_it_undecided() -> None:
    edge = replace(SMOA, chosen=Chosen(0.03, {0.003: 2.6, 0.01: 2.5, 0.03: 2.4}, "edge"))
    assert told(budget(edge, LORA)) == (
        "Undecided: search further. Raise tuning.max_runs in the study's file: searches at an edge go on. smoa's best "
        "rate, 3e-2, is the highest that was tried: it may do better beyond."
    )


def test_what_diverged_is_never_taken_and_loses_to_all_others() -> None:
    given = budget(SMOA, replace(LORA, diverged=2))
    ends = {("lora", "smoa"): math.inf, ("smoa", "lora"): -math.inf}
    pairs = {pair: Difference(end, end, end, "same") for pair, end in ends.items()}
    assert told(replace(given, pairs=pairs)) == (
        "smoa is better than lora, which diverged: take smoa. lora diverged in 2 of 3 runs."
    )


def test_one_seed_gets_no_verdict_but_the_command_that_goes_on() -> None:
    ones = [replace(one, seeds=[0]) for one in (SMOA, LORA)]
    assert told(budget(*ones)) == (
        "No verdict: one seed of each says nothing of how seeds differ; `smoa compare studies/x/study.yaml --seeds 3` "
        "goes on, for about 27 min."
    )


def test_before_all_planned_runs_are_in_nothing_is_told() -> None:
    assert told(replace(budget(SMOA, LORA), planned=8)) == (
        "6 of 8 final runs are done, and differences are shown when all are."
    )


def test_what_limits_a_verdict_is_part_of_it() -> None:
    few = replace(SMOA, rows=1, share=0.94)
    sentences = verdict(replace(budget(few, LORA), level=0.025), "smoa compare", 1.0)
    assert "(97.5 %)" in sentences[0]
    assert sentences[1:] == [
        "smoa has 94 % of lora's parameters.",
        "This is not the first look: it errs in 2.5 %, all looks in at most 10 %.",
        "Only 1 row is held out, which shows large differences only; 50 or more are better.",
    ]
    assert told(budget(LORA)) == "Training gained 0.850 nats per token; there is nothing to compare lora with."


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
    assert searches({}, {}) is None


def test_what_was_learned_stands_against_what_was_forgotten_beside_the_untouched_model() -> None:
    drawn = data(learned_and_forgotten([result()], 4.0), "entry")
    assert [(row["entry"], row["forgotten"], row["loss"]) for row in drawn] == [
        *(("lora", 0.01, 2.5), ("untouched", 0.0, 4.0)),
    ]
