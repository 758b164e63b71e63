"""Which entry is taken and what is said of it, from values that are made up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smoa_lab.study.bounds import Family
from smoa_lab.study.finished import LOSS, OF_CHOICES, Metric
from smoa_lab.study.report import differences, sizes
from smoa_lab.study.search import Chosen
from smoa_lab.study.study import Study, load_study
from smoa_lab.study.verdict import Verdict, sentences, step_seconds
from tests.support.studies import tiny_study

GROUPS = 200


def run(parameters: int = 1000, loss: float | None = 2.0, rows: int = GROUPS, **training: Any) -> Any:
    """A finished run, as far as a verdict asks."""
    metrics = {"parameters": {"trainable": parameters}, "training": {"seconds": 10.0, "steps": 10} | training}
    metrics |= {"provenance": {"device": "a CPU"}}
    return SimpleNamespace(metrics=metrics, loss=loss, rows=range(rows))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Four planned rounds of lora, smoa and hira."""
    entries = {name: {"method": name, "learning_rate": 0.01} for name in ("lora", "smoa", "hira")}
    return load_study(tiny_study(tmp_path, entries=entries, seeds=[0, 1, 2, 3]))


def given(
    study: Study,
    gained: dict[str, float],
    seeds: float = 0.01,
    rows: float = 0.05,
    rounds: int = 2,
    groups: int = GROUPS,
    metric: Metric = LOSS,
    places: dict[str, str] | None = None,
    steps: dict[str, float] | None = None,
    parameters: dict[str, int] | None = None,
) -> Verdict:
    """Entries that gained so much; seeds and rows with these standard deviations, exactly."""
    names, weights = list(gained), np.ones(groups)
    study = study.model_copy(update={"entries": {name: study.entries[name] for name in names}})
    pattern = np.where(np.arange(groups) % 2, 1.0, -1.0) * rows
    of_seeds = np.linspace(-1, 1, rounds)
    of_seeds = seeds * of_seeds / of_seeds.std(ddof=1) if rounds > 1 else np.zeros(1)
    values = np.array([5 - by + of_seeds[:, None] + (1 + place) * pattern for place, by in enumerate(gained.values())])
    found = Verdict(
        study=study,
        budget=names,
        entries=names,
        chosen={name: Chosen(0.01, {0.003: 2.6, 0.01: 2.5}, (places or {}).get(name, "interior")) for name in names},  # type: ignore[arg-type]
        runs={
            name: {
                seed: run((parameters or {}).get(name, 1000), 2.0 if np.isfinite(by) else None, groups)
                for seed in range(rounds)
            }
            for name, by in gained.items()
        },
        done=rounds * len(names),
        steps=dict.fromkeys(names, 1.0) | (steps or {}),
        families={},
    )
    if rounds < 2:
        return found
    level = dict(found.looks(max(rounds, len(study.seeds))))[rounds]
    family = Family(names, values, 5 * weights[None], weights, metric.scale == 100, level / max(1, len(names) - 1))
    return Verdict(**vars(found) | {"families": {metric: family}, "round": rounds, "level": level})


def told(of: Verdict) -> str:
    return " ".join(sentences(of, "smoa compare studies/x"))


def test_the_first_in_order_of_cost_that_keeps_enough_of_what_each_other_gained_is_taken(study: Study) -> None:
    found = given(study, {"lora": 1.0, "smoa": 1.01})
    assert (found.take, found.is_answered) == ("lora", True)
    assert told(found) == (
        "lora keeps at least 93 % of what smoa gained, after round 2 of 4: take lora, the first in order of cost."
    )
    three = given(study, {"lora": 0.7, "smoa": 1.0, "hira": 1.01}, steps={"hira": 2.0})
    assert three.take == "smoa"
    assert "of what each other gained" in told(three)
    assert "nothing to compare it with" in told(given(study, {"lora": 1.0}, seeds=1e-4))


def test_the_adapter_that_is_kept_is_named(study: Study) -> None:
    adapter = study.folder / "lora" / "lr-1e-2-seed-3" / "adapter"
    adapter.mkdir(parents=True)
    assert f"take lora, the first in order of cost: {adapter}." in told(given(study, {"lora": 1.0, "smoa": 1.01}))


def test_one_that_gained_more_than_all_others_is_said_to(study: Study) -> None:
    assert "% more than lora, after round 2 of 4: take smoa." in told(given(study, {"lora": 0.7, "smoa": 1.0}))
    barely = given(study, {"smoa": 1.005, "lora": 1.0}, rows=1e-4, seeds=1e-4, steps={"lora": 2.0})
    assert "smoa gained at least as much as lora" in told(barely)
    for gained in (-0.5, 0.0):
        assert "and lora nothing that" in told(given(study, {"lora": gained, "smoa": 1.0}))


def test_where_seeds_or_rows_tell_too_little_it_says_what_would(study: Study) -> None:
    seeds = given(study, {"lora": 1.0, "smoa": 1.0}, seeds=0.04)
    assert (seeds.take, seeds.is_answered) == (None, False)
    assert "would tell: `smoa compare studies/x --seeds " in told(seeds)
    rows = told(given(study, {"lora": 1.0, "smoa": 1.0}, rows=2.0))
    assert "more held-out rows are needed. 200 rows" in rows
    never = given(study, {"lora": 1.0, "smoa": 1.0}, seeds=2.0)
    assert "would not tell" in told(never)


def test_where_training_gained_nothing_for_certain_none_is_taken_after_the_last_round(study: Study) -> None:
    nothing = {"lora": 0.001, "smoa": 0.0}
    last = given(study, nothing, rounds=4, seeds=0.1)
    assert (last.take, last.hurt, last.is_answered) == (None, False, True)
    assert "gained nothing" in told(last)
    early = given(study, nothing, rounds=2, seeds=0.1)
    assert not early.is_answered
    assert told(early).startswith("Undecided")


def test_where_training_hurt_every_entry_none_is_taken_at_once(study: Study) -> None:
    hurt = given(study, {"lora": -1.0, "smoa": -0.9})
    assert (hurt.take, hurt.hurt, hurt.is_answered) == (None, True, True)
    assert "take none" in told(hurt)
    assert not given(study, {"lora": -1.0, "smoa": 0.9}).hurt


def test_nobody_is_taken_over_an_entry_at_the_edge_of_its_search(study: Study) -> None:
    found = given(study, {"lora": 1.0, "smoa": 0.7}, places={"smoa": "edge"})
    assert found.take is None
    assert "tuning.max_runs" in told(found)
    assert "smoa's best rate, 1e-2, is the highest tried" in told(found)
    assert given(study, {"lora": 1.0, "smoa": 0.7}, places={"lora": "edge"}).take == "lora", "the best may be taken"


def test_what_diverged_is_never_taken_and_loses_to_all_others(study: Study) -> None:
    found = given(study, {"lora": -np.inf, "smoa": 1.0})
    assert found.take == "smoa"
    assert "better than lora, which diverged" in told(found)
    assert "lora diverged in 2 of 2 runs." in told(found)
    assert "take none" in told(given(study, {"lora": -np.inf, "smoa": -np.inf}))


def test_before_the_second_round_there_is_no_verdict_but_the_command_that_goes_on(study: Study) -> None:
    assert told(given(study, {"lora": 1.0, "smoa": 1.0}, rounds=1)).startswith("2 of 8 final runs are done")
    alone = study.model_copy(update={"seeds": [0]})
    assert "`smoa compare studies/x --seeds 3` goes on" in told(given(alone, {"lora": 1.0, "smoa": 1.0}, rounds=1))


def test_what_limits_a_verdict_is_part_of_it(study: Study) -> None:
    parameters = {"smoa": 940, "lora": 1000}
    few = given(study, {"lora": 1.0, "smoa": 1.0}, groups=6, parameters=parameters, metric=OF_CHOICES)
    text = told(few)
    assert "has 106 % of smoa's parameters." in text
    assert "Only 6 rows held out" in text
    assert "not planned" not in text
    later = told(given(study.model_copy(update={"rounds": 2}), {"lora": 1.0, "smoa": 1.0}, rounds=3))
    assert "not planned at first: it errs in 0.5 %" in later


def test_the_order_of_cost_goes_by_time_then_parameters_then_lora_and_never_by_the_file(study: Study) -> None:
    gained = dict.fromkeys(("smoa", "hira", "lora"), 1.0)

    def order(steps: dict[str, float], parameters: dict[str, int] | None = None) -> list[str]:
        return given(study, gained, steps=steps, parameters=parameters).order

    assert order({"smoa": 1.0, "hira": 2.0, "lora": 1.09}) == ["lora", "smoa", "hira"], "a tie, which LoRA wins"
    assert order({"smoa": 1.0, "hira": 2.0, "lora": 1.11}) == ["smoa", "lora", "hira"]
    assert order({"smoa": 1.0, "hira": 2.0, "lora": 1.05}, {"smoa": 900}) == ["smoa", "lora", "hira"]
    assert order({"smoa": 1.0, "hira": 2.0, "lora": 1.05}, {"smoa": 990}) == ["lora", "smoa", "hira"], "about as many"
    assert order({"smoa": 1.2, "hira": 1.19, "lora": 2.0}) == ["hira", "smoa", "lora"], "else the quicker"
    swapped = given(study, dict(reversed(gained.items())), steps={"smoa": 1.0, "hira": 1.0, "lora": 1.0})
    assert swapped.order == given(study, gained).order == ["lora", "hira", "smoa"]


def test_a_step_is_the_quickest_runs_of_one_machine_and_of_none_that_was_resumed() -> None:
    runs = {"lora": [run(seconds=20.0), run(seconds=30.0), run(seconds=1.0, resumed=True)], "smoa": [run()]}
    assert step_seconds(runs) == {"lora": 2.0, "smoa": 1.0}
    elsewhere = run()
    elsewhere.metrics["provenance"] = {"device": "another"}
    assert step_seconds({**runs, "smoa": [elsewhere]}) == {"lora": 0.0, "smoa": 0.0}
    assert step_seconds({**runs, "smoa": [run(resumed=True)]}) == {"lora": 0.0, "smoa": 0.0}


# charts


def data(chart: Any, key: str) -> list[dict[str, Any]]:
    """The rows that a chart draws, those with this key."""
    found = [rows for rows in chart.to_dict()["datasets"].values() if key in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_both_bounds_and_its_words_for_each_budget(study: Study) -> None:
    found = given(study, {"lora": 1.0, "smoa": 0.7, "hira": 1.0})
    chart = differences({"all": found})
    smoa, hira = data(chart, "clear")
    assert found.family is not None
    assert smoa["high"] == pytest.approx(found.family.upper("smoa", "lora"))
    assert smoa["low"] == pytest.approx(-found.family.upper("lora", "smoa"))
    assert (smoa["verdict"], smoa["clear"]) == ("worse", True)
    assert (hira["verdict"], hira["clear"]) == ("not told apart", False)
    share = differences({"all": given(study, {"lora": 0.5, "smoa": 0.2}, metric=OF_CHOICES)})
    (row,) = data(share, "clear")
    assert row["mean"] == pytest.approx(-30.0), "in points, higher is better"
    assert row["low"] < row["mean"] < row["high"] < 0
    assert len(differences({"a": found, "b": found}).to_dict()["vconcat"]) == 2
    assert differences({"all": given(study, {"lora": 1.0, "smoa": -np.inf})}) is None, "what diverged has no point"
    assert differences({"all": given(study, {"lora": 1.0, "smoa": 1.0}, rounds=1)}) is None


def test_quality_is_drawn_against_size_with_a_line_for_each_method(study: Study) -> None:
    small, large = (
        given(study, {"lora": by, "smoa": by}, parameters={"lora": n, "smoa": n}) for by, n in ((1, 9), (2, 99))
    )
    points = data(sizes({"r = 1": small, "r = 4": large}), "parameters")
    assert [(one["method"], one["parameters"], one["mean"]) for one in points] == [
        ("lora", 9, 4.0),
        ("smoa", 9, 4.0),
        ("lora", 99, 3.0),
        ("smoa", 99, 3.0),
    ]
    assert points[0]["high"] - points[0]["low"] == pytest.approx(0.02), "twice the seeds' standard deviation"
    assert sizes({"all": small}) is None
