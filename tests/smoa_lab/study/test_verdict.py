"""Which entry is taken, why, and how it is drawn, from values that are made up. test_report.py has whole pages."""

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
    places: dict[str, Any] | None = None,
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
    losses = {name: 2.0 if np.isfinite(by) else None for name, by in gained.items()}
    sizes = {name: (parameters or {}).get(name, 1000) for name in names}
    found = Verdict(
        study=study,
        budget=names,
        entries=names,
        chosen={name: Chosen(0.01, {0.003: 2.6, 0.01: 2.5}, (places or {}).get(name, "interior")) for name in names},
        runs={name: {seed: run(sizes[name], losses[name], groups) for seed in range(rounds)} for name in names},
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


CASES: dict[str, tuple[dict[str, float], dict[str, Any], str | None, bool, str]] = {
    "the first in order of cost": ({"lora": 1.0, "smoa": 1.01}, {}, "lora", True, "keeps at least 93 % of what smoa"),
    "one alone": ({"lora": 1.0}, {"seeds": 1e-4}, "lora", True, "nothing to compare it with"),
    "a better one": ({"lora": 0.7, "smoa": 1.0}, {}, "smoa", True, "% more than lora, after round 2 of 4: take smoa"),
    "the other hurt": ({"lora": -0.5, "smoa": 1.0}, {}, "smoa", True, "and lora nothing that"),
    "the other gained nothing": ({"lora": 0.0, "smoa": 1.0}, {}, "smoa", True, "and lora nothing that"),
    "seeds differ": ({"lora": 1.0, "smoa": 1.0}, {"seeds": 0.04}, None, False, "would tell: `smoa compare studies/x "),
    "rows differ": ({"lora": 1.0, "smoa": 1.0}, {"rows": 2.0}, None, False, "more held-out rows are needed. 200 rows"),
    "seeds differ much": ({"lora": 1.0, "smoa": 1.0}, {"seeds": 2.0}, None, False, "would not tell"),
    "nothing yet": ({"lora": 0.001, "smoa": 0.0}, {"seeds": 0.1}, None, False, "Undecided"),
    "nothing": ({"lora": 0.001, "smoa": 0.0}, {"seeds": 0.1, "rounds": 4}, None, True, "gained nothing"),
    "harm": ({"lora": -1.0, "smoa": -0.9}, {}, None, True, "take none"),
    "an edge": ({"lora": 1.0, "smoa": 0.7}, {"places": {"smoa": "edge"}}, None, False, "tuning.max_runs"),
    "an edge of the best": ({"lora": 1.0, "smoa": 0.7}, {"places": {"lora": "edge"}}, "lora", True, "highest tried"),
    "one diverged": ({"lora": -np.inf, "smoa": 1.0}, {}, "smoa", True, "lora diverged in 2 of 2 runs."),
    "all diverged": ({"lora": -np.inf, "smoa": -np.inf}, {}, None, False, "take none"),
    "one round": ({"lora": 1.0, "smoa": 1.0}, {"rounds": 1}, None, False, "2 of 8 final runs are done"),
    "few rows": ({"lora": 1.0, "smoa": 1.0}, {"groups": 6, "metric": OF_CHOICES}, None, False, "Only 6 rows held out"),
}


@pytest.mark.parametrize(("gained", "changes", "take", "is_answered", "words"), CASES.values(), ids=CASES)
def test_who_is_taken_and_why(
    gained: dict[str, float], changes: dict[str, Any], take: str | None, is_answered: bool, words: str, study: Study
) -> None:
    found = given(study, gained, **changes)
    assert (found.take, found.is_answered) == (take, is_answered)
    assert words in told(found)
    assert found.hurt == (gained == {"lora": -1.0, "smoa": -0.9})
    assert "not planned" not in told(found)


def test_of_three_the_quickest_that_keeps_enough_of_both_is_taken_and_its_adapter_named(study: Study) -> None:
    adapter = study.folder / "smoa" / "lr-1e-2-seed-3" / "adapter"
    adapter.mkdir(parents=True)
    three = given(study, {"lora": 0.7, "smoa": 1.0, "hira": 1.01}, steps={"hira": 2.0})
    assert three.take == "smoa"
    assert f"of what each other gained, after round 2 of 4: take smoa: {adapter}." in told(three)


def test_a_second_round_or_seed_is_asked_for_and_an_unplanned_look_says_so(study: Study) -> None:
    equal = {"lora": 1.0, "smoa": 1.0}
    alone = study.model_copy(update={"seeds": [0]})
    assert "`smoa compare studies/x --seeds 3` goes on" in told(given(alone, equal, rounds=1))
    later = told(given(study.model_copy(update={"rounds": 2}), equal, rounds=3))
    assert "not planned at first: it errs in 0.5 %" in later
    assert "has 106 % of smoa's parameters." in told(given(study, equal, parameters={"smoa": 940}))


@pytest.mark.parametrize(
    ("steps", "parameters", "order"),
    [
        ((1.0, 2.0, 1.09), {}, "lora smoa hira"),  # a tie, which LoRA wins
        ((1.0, 2.0, 1.11), {}, "smoa lora hira"),
        ((1.0, 2.0, 1.05), {"smoa": 900}, "smoa lora hira"),
        ((1.0, 2.0, 1.05), {"smoa": 990}, "lora smoa hira"),  # about as many
        ((1.2, 1.19, 2.0), {}, "hira smoa lora"),  # else the quicker
        ((1.0, 1.0, 1.0), {}, "lora hira smoa"),
    ],
)
def test_the_order_of_cost_goes_by_time_then_parameters_then_lora_and_never_by_the_file(
    steps: tuple[float, ...], parameters: dict[str, int], order: str, study: Study
) -> None:
    names = ["smoa", "hira", "lora"]
    for entries in (names, names[::-1]):
        of_entry = dict(zip(names, steps, strict=True))
        found = given(study, dict.fromkeys(entries, 1.0), steps=of_entry, parameters=parameters)
        assert found.order == order.split()


def test_a_step_is_the_quickest_runs_of_one_machine_and_of_none_that_was_resumed() -> None:
    runs = {"lora": [run(seconds=20.0), run(seconds=30.0), run(seconds=1.0, resumed=True)], "smoa": [run()]}
    assert step_seconds(runs) == {"lora": 2.0, "smoa": 1.0}
    elsewhere = run()
    elsewhere.metrics["provenance"] = {"device": "another"}
    for smoa in (elsewhere, run(resumed=True)):
        assert step_seconds({**runs, "smoa": [smoa]}) == {"lora": 0.0, "smoa": 0.0}


# charts


def data(chart: Any, key: str) -> list[dict[str, Any]]:
    """The rows that a chart draws, those with this key."""
    found = [rows for rows in chart.to_dict()["datasets"].values() if key in rows[0]]
    assert len(found) == 1
    return list(found[0])


def test_a_difference_is_drawn_with_both_bounds_and_its_words_for_each_budget(study: Study) -> None:
    found = given(study, {"lora": 1.0, "smoa": 0.7, "hira": 1.0})
    smoa, hira = data(differences({"all": found}), "clear")
    assert found.family is not None
    bounds = -found.family.upper("lora", "smoa"), found.family.upper("smoa", "lora")
    assert (smoa["low"], smoa["high"]) == pytest.approx(bounds)
    assert [(one["verdict"], one["clear"]) for one in (smoa, hira)] == [("worse", True), ("not told apart", False)]
    share = differences({"all": given(study, {"lora": 0.5, "smoa": 0.2}, metric=OF_CHOICES)})
    (row,) = data(share, "clear")
    assert row["mean"] == pytest.approx(-30.0), "in points, higher is better"
    assert row["low"] < row["mean"] < row["high"] < 0
    assert len(differences({"a": found, "b": found}).to_dict()["vconcat"]) == 2
    for changes in ({"gained": {"lora": 1.0, "smoa": -np.inf}}, {"gained": {"lora": 1.0, "smoa": 1.0}, "rounds": 1}):
        assert differences({"all": given(study, **changes)}) is None  # type: ignore[arg-type]


def test_quality_is_drawn_against_size_with_a_line_for_each_method(study: Study) -> None:
    small, large = (
        given(study, {"lora": by, "smoa": by}, parameters={"lora": n, "smoa": n}) for by, n in ((1, 9), (2, 99))
    )
    points = data(sizes({"r = 1": small, "r = 4": large}), "parameters")
    found = [(one["method"], one["parameters"], one["mean"]) for one in points]
    assert found == [(name, *point) for point in ((9, 4.0), (99, 3.0)) for name in ("lora", "smoa")]
    assert points[0]["high"] - points[0]["low"] == pytest.approx(0.02), "twice the seeds' standard deviation"
    assert sizes({"all": small}) is None
