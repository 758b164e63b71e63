"""The verdict in words, from values that are made up."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smoa_lab.pages.charts import color_of
from smoa_lab.study.bounds import Family
from smoa_lab.study.decision import Budget, by_cost
from smoa_lab.study.metrics import LOSS, OF_CHOICES, Metric
from smoa_lab.study.plan import Plan, Timing
from smoa_lab.study.search import Chosen
from smoa_lab.study.study_charts import differences, learned_and_forgotten, searches
from smoa_lab.study.verdict import verdict
from tests.support.studies import result

GROUPS = 200


def plan(planned: int = 4, seeds: int = 4, extensions: tuple[int, ...] = ()) -> Plan:
    facts: dict[str, Any] = {"study": {"seeds": []}, "digests": {}, "rows": {}, "minutes": None, "steps": 30}
    facts |= {key: list(range(seeds)) for key in ("seeds", "listed")}
    return Plan(format=3, final=0, planned=planned, extensions=list(extensions), **facts)


def budget(
    gained: dict[str, float],
    seeds: float = 0.01,
    rows: float = 0.05,
    rounds: int = 2,
    groups: int = GROUPS,
    metric: Metric = LOSS,
    places: dict[str, str] | None = None,
    untouched: bool = True,
    shares: dict[str, float] | None = None,
) -> Budget:
    """Entries in order of cost that gained so much; seeds and rows with these standard deviations, exactly."""
    names, weights = list(gained), np.ones(groups)
    pattern = np.where(np.arange(groups) % 2, 1.0, -1.0) * rows
    of_seeds = np.linspace(-1, 1, rounds) if rounds > 1 else np.zeros(1)
    of_seeds = seeds * of_seeds / (of_seeds.std(ddof=1) if rounds > 1 else 1)
    values = np.array([5 - by + of_seeds[:, None] + (1 + place) * pattern for place, by in enumerate(gained.values())])
    level = plan().level(len(names))
    base = 5 * weights[None] if untouched else None
    family = Family(names, values, base, weights, metric.is_share, level, len(names))
    chosen = {name: Chosen(0.01, {0.003: 2.6, 0.01: 2.5}, (places or {}).get(name, "interior")) for name in names}
    results = [
        result(
            name,
            chosen=chosen[name],
            seeds=list(range(rounds)),
            rows=groups,
            groups=groups,
            share=(shares or {}).get(name, 1.0),
            kept="PATH" if name == "lora" else None,
            diverged=0 if np.isfinite(by) else 2,
        )
        for name, by in gained.items()
    ]
    return Budget(
        results=results,
        families={metric.title: family},
        metric=metric,
        order=names,
        at_edge=[name for name in names if chosen[name].place in ("edge", "cut")],
        round=rounds if rounds > 1 else 0,
        planned=4,
        done=rounds * len(names),
        wanted=4 * len(names),
        level=level,
        tolerance=0.1,
        is_last=rounds == 4,
    )


def told(given: Budget, of: Plan | None = None) -> str:
    return " ".join(verdict(given, of or plan(), "smoa compare studies/x/study.yaml", of_round=800))


def test_the_first_in_order_of_cost_that_keeps_enough_of_what_each_other_gained_is_taken() -> None:
    assert told(budget({"lora": 1.0, "smoa": 1.01})) == (
        "lora keeps at least 93 % of what smoa gained, after round 2 of 4: take lora, the first in order of cost: PATH."
    )
    three = told(budget({"lora": 0.7, "smoa": 1.0, "hira": 1.01}))
    assert three == "smoa keeps at least 94 % of what each other gained, after round 2 of 4: take smoa."
    assert told(budget({"lora": 1.0})).startswith("lora gained 0.")
    assert "there is nothing to compare it with, after round 2 of 4: take lora" in told(
        budget({"lora": 1.0}, seeds=1e-4)
    )


def test_one_that_gained_more_than_all_others_is_said_to() -> None:
    assert told(budget({"lora": 0.7, "smoa": 1.0})).startswith("smoa gained at least ")
    assert " % more than lora, after round 2 of 4: take smoa." in told(budget({"lora": 0.7, "smoa": 1.0}))


def test_one_that_gained_a_little_more_gained_as_much_and_a_share_of_nothing_is_not_told() -> None:
    assert told(budget({"smoa": 1.005, "lora": 1.0}, rows=0.0001, seeds=0.0001)).startswith(
        "smoa gained at least as much as lora, after round 2 of 4: take "
    )
    for gained in (-0.5, 0.0):
        found = told(budget({"lora": gained, "smoa": 1.0}))
        assert found.startswith("smoa gained 0.9"), found
        assert "or more, and lora nothing that the rows and seeds show, after round 2 of 4: take smoa." in found


def test_where_seeds_tell_too_little_it_says_how_many_more_rounds_would_and_how_to_run_them() -> None:
    found = told(budget({"lora": 1.0, "smoa": 1.0}, seeds=0.04))
    assert found.startswith("Undecided after round 2 of 4: about ")
    assert "would tell: `smoa compare studies/x/study.yaml --seeds " in found
    rows = told(budget({"lora": 1.0, "smoa": 1.0}, rows=2.0))
    assert rows == (
        "Undecided after round 2 of 4: more held-out rows are needed. 200 rows alone leave too much open, whatever "
        "runs."
    )


def test_where_training_gained_nothing_for_certain_none_is_taken_after_the_last_round() -> None:
    nothing = {"lora": 0.001, "smoa": 0.0}
    assert told(budget(nothing, rounds=4, seeds=0.1)) == (
        "Training gained nothing that could be shown, after round 4 of 4: take none."
    )
    assert told(budget(nothing, rounds=2, seeds=0.1)).startswith("Undecided")
    assert told(budget({"lora": -1.0, "smoa": -0.9})).startswith(
        "Training hurt: every entry is worse than the base model, by 0."
    )
    assert told(budget(nothing, untouched=False)).startswith("No verdict: what training gained isn't known")


@pytest.mark.parametrize(
    ("place", "remedy", "where"),
    [
        (
            "edge",
            "search further. Raise tuning.max_runs in the study's file: searches at the boundary of their range go on",
            "that was tried",
        ),
        (
            "cut",
            "the time ended searches. Give more --minutes, or raise tuning.max_runs: they go on",
            "of those that there was time for",
        ),
    ],
)
def test_nobody_is_taken_over_an_entry_at_the_edge_of_its_search(place: str, remedy: str, where: str) -> None:
    found = told(budget({"lora": 1.0, "smoa": 0.7}, places={"smoa": place}))
    assert found == (f"Undecided: {remedy}. smoa's best rate, 1e-2, is the highest {where}: it may do better beyond.")
    assert "take lora" in told(budget({"lora": 1.0, "smoa": 0.7}, places={"lora": place})), "the best may be taken"


def test_what_diverged_is_never_taken_and_loses_to_all_others() -> None:
    found = told(budget({"lora": -np.inf, "smoa": 1.0}))
    assert found == (
        "smoa is better than lora, which diverged, after round 2 of 4: take smoa. lora diverged in 2 of 2 runs."
    )
    assert told(budget({"lora": -np.inf, "smoa": -np.inf})).startswith("Every entry diverged: take none.")


def test_one_seed_gets_no_verdict_but_the_command_that_goes_on() -> None:
    ones = budget({"lora": 1.0, "smoa": 1.0}, rounds=1)
    assert told(ones, plan(1, 1)) == (
        "No verdict: one seed of each says nothing of how seeds differ; `smoa compare studies/x/study.yaml --seeds 3` "
        "goes on, for about 27 min."
    )
    assert told(ones) == "2 of 8 final runs are done, and bounds are shown from round 2 on."
    assert told(dataclasses.replace(ones, wanted=0)) == "No verdict: all entries failed."


def test_what_limits_a_verdict_is_part_of_it() -> None:
    few = budget({"lora": 1.0, "smoa": 1.0}, groups=6, shares={"smoa": 0.94}, metric=OF_CHOICES)
    sentences = verdict(few, plan(4, 4, (5,)), "smoa compare", 1.0)
    assert sentences[1] == "smoa has 94 % of lora's parameters."
    assert sentences[2].startswith("This look was not planned at first: it errs in ")
    assert sentences[3] == "Only 6 rows are held out, which show large differences only; 50 or more are better."


def test_the_order_of_cost_goes_by_time_and_among_the_quick_by_parameters() -> None:
    def timing(step: float, parameters: int, machine: str = "a") -> Timing:
        return Timing(parameters=parameters, step=step, beside=1, machine=machine)

    entries = {"slow": timing(2.0, 10), "large": timing(1.0, 100), "small": timing(1.09, 50), "even": timing(1.1, 51)}
    assert by_cost(entries) == ["small", "even", "large", "slow"]
    entries["slow"] = timing(2.0, 10, "b")
    assert by_cost(entries) == ["slow", "small", "even", "large"], "steps of two machines can't be compared"


# charts


def data(chart: Any, key: str) -> list[dict[str, Any]]:
    """The rows that a chart draws, those with this key."""
    found = [rows for rows in chart.to_dict()["datasets"].values() if key in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_both_bounds_its_words_and_its_run_a_forest_for_each_budget() -> None:
    found = budget({"lora": 1.0, "smoa": 0.7})
    drawn_chart = differences({"all": found})
    (drawn,) = data(drawn_chart, "entry")
    assert drawn["low"] < drawn["mean"] < drawn["high"]
    assert (drawn["mean"], drawn["clear"], drawn["verdict"]) == (pytest.approx(0.3), True, "worse")
    assert (drawn["entry"], drawn["run"]) == ("LoRA: smoa", "#smoa/lr-1e-2-seed-0")
    assert color_of("lora") in str(drawn_chart.to_dict())
    (upward,) = data(differences({"all": budget({"lora": 1.0, "smoa": 0.7}, metric=OF_CHOICES)}), "entry")
    assert (upward["mean"], upward["verdict"]) == (pytest.approx(-30), "worse")
    two = differences({"all": found, "large": found}).to_dict()
    assert [one["title"] for one in two["vconcat"]] == ["Budget: all", "Budget: large"]


def test_what_diverged_or_was_not_measured_yet_is_left_out() -> None:
    assert differences({"all": budget({"lora": 1.0, "smoa": -np.inf})}) is None
    assert differences({"all": budget({"lora": 1.0, "smoa": 1.0}, rounds=1)}) is None
    assert learned_and_forgotten([result(forgotten=None)], 4.0) is None
    assert searches({}, {}) is None


def test_a_best_rate_beside_one_that_was_not_tried_is_no_highest() -> None:
    found = budget({"lora": 1.0, "smoa": 1.0})
    chosen = Chosen(0.011, {0.0036: 3.5, 0.011: 3.0, 0.02: 3.2}, "edge")
    results = [dataclasses.replace(one, chosen=chosen) if one.entry == "smoa" else one for one in found.results]
    said = verdict(dataclasses.replace(found, results=results, at_edge=["smoa"]), plan(), "smoa compare", 1.0)
    assert "smoa's best rate, 1.1e-2, lies beside a rate that was not tried: it may do better there." in said


def test_searches_of_a_method_at_four_sizes_differ_in_gray() -> None:
    names = {f"{method}-r{rank}": method for rank in (1, 4, 16) for method in ("lora", "smoa")}
    chosen = Chosen(0.01, {0.003: 2.6, 0.01: 2.5, 0.03: 2.7}, "interior")
    chart = searches(dict.fromkeys(names, chosen), names).to_dict()
    encoding = chart.get("encoding") or chart["layer"][0]["encoding"]
    drawn = dict(zip(encoding["strokeDash"]["scale"]["domain"], encoding["strokeDash"]["scale"]["range"], strict=True))
    assert len({str(drawn[name]) for name, method in names.items() if method == "lora"}) == 3
    assert len({str(drawn[name]) for name, method in names.items() if method == "smoa"}) == 3


def test_what_was_learned_stands_against_what_was_forgotten_beside_the_untouched_model() -> None:
    drawn = data(learned_and_forgotten([result()], 4.0), "entry")
    assert [(row["entry"], row["forgotten"], row["loss"]) for row in drawn] == [
        *(("lora", 0.01, 2.5), ("untouched", 0.0, 4.0)),
    ]
