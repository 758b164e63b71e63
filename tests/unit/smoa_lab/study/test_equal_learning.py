"""What entries of a sequence kept: curves from stored runs, equal learning, one rate too high."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smoa.errors import DataError
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.equal_learning import (
    Curve,
    CurveLosses,
    at_equal_learning,
    at_lower_levels,
    at_next_rate,
    crossing,
    curve_of,
    least_gaps,
)
from smoa_lab.study.report import report
from smoa_lab.study.study import First, Study
from smoa_lab.study.trials import Trial
from tests.support.studies import QUESTIONS, finish_in_turn

RATES = [1e-3, 1e-2, 1e-1, 1.0]
OF_QUESTION = (QUESTIONS - 1) / QUESTIONS / 2
"""What the questions add to a loss, in the mean."""


def made(entry: str, second: list[float], first: list[float], seeds: int = 3, noise: float = 0.01) -> Curve:
    """A curve of these mean losses, on questions that are hard and easy, with a little noise of each run."""
    random, questions = np.random.default_rng(len(entry)), 150

    def losses(means: list[float], task: int) -> CurveLosses:
        hard = np.random.default_rng(task).gamma(2.0, 1.0, questions)
        own = random.normal(0, noise, (len(means), seeds, questions))
        return CurveLosses(np.array(means)[:, None, None] + hard - hard.mean() + own, np.ones(questions))

    return Curve(entry, RATES[: len(second)], list(range(seeds)), losses(first, 0), losses(second, 1))


REFERENCE = made("lora", [2.0, 1.5, 1.8], [3.1, 4.0, 9.0])
OURS = made("ours", [1.6, 1.7, 1.9], [3.0, 3.5, 4.0])


@pytest.mark.parametrize(("level", "index", "share"), [(2.5, 0, 0.0), (1.75, 0, 0.5), (1.5, 0, 1.0), (1.2, 1, 0.6)])
def test_the_lowest_rate_that_comes_down_to_a_level_is_taken(level: float, index: int, share: float) -> None:
    place = crossing([2.0, 1.5, 1.0, 3.0, 1.0], level)
    assert place is not None
    assert (place.index, place.share) == (index, pytest.approx(share))
    assert place.of([2.0, 1.5, 1.0, 3.0, 1.0]) == pytest.approx(min(level, 2.0))
    assert crossing([2.0, 1.5, 1.8], 1.4) is None


def test_both_losses_are_interpolated_along_the_logarithm_of_the_rate() -> None:
    found = at_equal_learning(made("ours", [2.0, 1.6, 1.4], [3.0, 3.5, 4.5], noise=0.0), REFERENCE)
    assert found.level == pytest.approx(1.5, abs=0.01)
    assert found.own.rate == pytest.approx(10**-1.5, rel=0.05)
    assert found.own.kept_loss == pytest.approx(4.0, abs=0.03)
    assert found.other.rate == pytest.approx(1e-2, rel=0.05)


def test_an_entry_that_learns_less_is_compared_where_the_reference_has_learned_as_little() -> None:
    ours = made("ours", [2.0, 1.75, 1.8], [3.0, 3.5, 4.0], noise=0.0)
    found = at_equal_learning(ours, REFERENCE)
    assert found.level == pytest.approx(1.75, abs=0.01)
    assert found.own.rate == pytest.approx(1e-2)
    assert found.other.rate == pytest.approx(10**-2.5, rel=0.05)
    assert found.other.kept_loss == pytest.approx(3.55, abs=0.03)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(-0.05, abs=0.03)


def test_entries_are_compared_at_each_lower_rate_of_the_reference_too() -> None:
    ours = made("ours", [2.2, 1.8, 1.4], [3.0, 3.2, 3.6], noise=0.0)
    reference = made("lora", [2.0, 1.7, 1.5, 1.6], [3.1, 3.6, 4.0, 9.0], noise=0.0)
    found = at_lower_levels(ours, reference)
    assert [round(one.level, 2) for one in found] == [2.0, 1.7]
    assert [one.other.kept_loss for one in found] == pytest.approx([3.1, 3.6], abs=0.02)
    assert [one.own.kept_loss for one in found] == pytest.approx([3.1, 3.3], abs=0.02)
    assert at_lower_levels(reference, reference) == []


def test_the_reference_is_read_at_its_own_best_rate_and_an_entry_that_keeps_more_is_better() -> None:
    own = at_equal_learning(REFERENCE, REFERENCE)
    assert own.own.rate == pytest.approx(1e-2)
    assert own.own.kept_loss == pytest.approx(4.0, abs=0.01)
    assert own.difference is None
    better = at_equal_learning(made("ours", [2.0, 1.6, 1.4], [3.0, 3.1, 3.3]), REFERENCE).difference
    assert better is not None
    assert better.low < -0.8 < better.high
    assert better.verdict == "better"
    assert better.p is not None
    assert better.p < 0.01


def test_only_the_seeds_that_both_have_count() -> None:
    """Of two seeds of the reference the entry has one; the other one learned less and kept less."""
    one, other = made("lora", [2.0, 1.5], [3.1, 4.0], seeds=1, noise=0.0), made("lora", [2.4, 1.9], [5.0, 9.0], seeds=1)
    kept, learned = (
        replace(a, nll=np.concatenate([a.nll, b.nll], axis=1))
        for a, b in ((one.kept, other.kept), (one.learned, other.learned))
    )
    found = at_equal_learning(
        made("ours", [2.0, 1.4], [3.0, 3.1], seeds=1, noise=0.0), replace(one, seeds=[0, 1], kept=kept, learned=learned)
    )
    assert (found.level, found.other.kept_loss) == pytest.approx((1.5, 4.0))
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(found.own.kept_loss - 4.0)


def test_the_error_over_seeds_is_of_each_at_its_own_level() -> None:
    """Seeds that learn more or less, and pay as much for it, differ by nothing at equal learning."""
    base = made("lora", [2.0, 1.5], [3.0, 4.0], seeds=3, noise=0.0)
    shift = np.array([-0.2, 0.0, 0.2])[:, None]
    shifted = replace(base, learned=replace(base.learned, nll=base.learned.nll + shift))
    better = replace(shifted, entry="ours", kept=replace(base.kept, nll=base.kept.nll - 0.5))
    found = at_equal_learning(better, shifted).difference
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5), abs=0.02)


def test_one_seed_gets_no_verdict_and_no_shared_seed_no_difference() -> None:
    one = at_equal_learning(made("ours", [2.0, 1.4], [3.0, 3.1], seeds=1), REFERENCE)
    assert one.difference is not None
    assert one.difference.verdict == "one seed"
    other = made("ours", [2.0, 1.4], [3.0, 3.1], seeds=1)
    alone = at_equal_learning(Curve("ours", other.rates, [7], other.kept, other.learned), REFERENCE)
    assert alone.own.kept_loss == pytest.approx(3.1, abs=0.05)
    assert alone.difference is None


def test_the_least_gap_is_at_a_level_that_half_of_the_entries_reach() -> None:
    curves = [
        made("best", [2.0, 1.5], [3.0, 3.2], noise=0.0),
        made("near", [2.0, 1.5], [3.05, 4.0], noise=0.0),
        made("poor", [2.0, 1.8], [3.4, 4.0], noise=0.0),
        made("deep", [2.1, 1.0], [6.0, 6.0], noise=0.0),
    ]
    found = least_gaps(curves)
    assert found["best"] == pytest.approx(0.0)
    assert found["near"] == pytest.approx(0.05)
    assert found["poor"] == pytest.approx(0.4)
    assert found["deep"] > 1  # alone at its own low level, which counts for nothing


def test_an_entry_is_read_one_rate_above_its_own_best_and_compared_with_the_reference_above_its_own() -> None:
    compared = at_next_rate(OURS, REFERENCE)
    assert compared is not None
    assert (compared.best, compared.rate) == (1e-3, 1e-2)
    assert compared.learned_loss == pytest.approx(1.7, abs=0.01)
    assert compared.kept_loss == pytest.approx(3.5, abs=0.01)
    assert compared.cost == pytest.approx(0.5, abs=0.01)
    assert compared.difference is not None
    assert compared.difference.mean == pytest.approx(3.5 - 9.0, abs=0.01)
    assert compared.difference.verdict == "better"
    of_reference = at_next_rate(REFERENCE, REFERENCE)
    assert of_reference is not None
    assert of_reference.cost == pytest.approx(5.0, abs=0.01)
    assert of_reference.difference is None


def test_a_next_rate_that_diverged_is_told_and_an_entry_best_at_its_highest_rate_has_none() -> None:
    diverged = at_next_rate(replace(OURS, diverged=[3e-3]), REFERENCE)
    assert diverged is not None
    assert (diverged.best, diverged.rate, diverged.kept_loss, diverged.difference) == (1e-3, 3e-3, None, None)
    assert at_next_rate(made("ours", [2.0, 1.7, 1.4], [3.0, 3.1, 3.2]), REFERENCE) is None


@pytest.mark.parametrize(
    "reference",
    [
        replace(REFERENCE, diverged=[3e-2]),
        made("lora", [2.0, 1.5], [3.1, 4.0]),  # no next rate
        replace(REFERENCE, seeds=[7, 8, 9]),
    ],
    ids=["diverged", "no next rate", "other seeds"],
)
def test_without_a_reference_to_compare_with_the_cost_alone_is_told(reference: Curve) -> None:
    compared = at_next_rate(OURS, reference)
    assert compared is not None
    assert compared.kept_loss is not None
    assert compared.difference is None


@pytest.fixture
def study(study: Study) -> Study:
    """The study with a sweep, and two seeds."""
    tuning = study.tuning.model_copy(update={"sweep": (0.003, 0.03), "per_decade": 2})
    first = First(data={"tasks": ["csqa"]}, learning_rate=0.1)
    return study.model_copy(update={"tuning": tuning, "seeds": [0, 1], "kind": "sequence", "first": first})


def curve(study: Study) -> Curve | None:
    comparison = Comparison(study)
    return curve_of("ours", comparison.stored_finals("ours"))


def test_a_curve_has_both_losses_at_each_rate(study: Study) -> None:
    for rate, second, first in ((0.01, 1.0, 4.0), (0.003, 2.0, 3.0)):
        for seed in (0, 1):
            finish_in_turn(study, Trial("final", "ours", rate, seed), second + 0.2 * seed, first)
    made_of = curve(study)
    assert made_of is not None
    assert (made_of.rates, made_of.seeds) == ([0.003, 0.01], [0, 1])
    assert made_of.learned.mean() == pytest.approx([2.1 + OF_QUESTION, 1.1 + OF_QUESTION])
    assert made_of.kept.mean() == pytest.approx([3 + OF_QUESTION, 4 + OF_QUESTION])
    assert made_of.only([1]).learned.mean() == pytest.approx([2.2 + OF_QUESTION, 1.2 + OF_QUESTION])


def test_what_diverged_is_not_finished_or_is_not_in_the_study_is_left_out(study: Study) -> None:
    assert curve(study) is None
    finish_in_turn(study, Trial("final", "ours", 0.03, 0), None, 3.0)
    assert curve(study) is None
    for rate, seed in ((0.003, 0), (0.01, 0), (0.003, 1)):
        finish_in_turn(study, Trial("final", "ours", rate, seed), 2.0, 3.0)
    made_of = curve(study)
    assert made_of is not None
    assert (made_of.rates, made_of.seeds, made_of.diverged) == ([0.003, 0.01], [0], [0.03])
    for rate, seed in ((0.003, 7), (10.0, 0)):
        finish_in_turn(study, Trial("final", "ours", rate, seed), 2.0, 3.0)
    rows = report(study).summary["runs"]
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [(0.003, 0), (0.003, 1), (0.01, 0), (0.03, 0)]
    assert rows[-1]["second_loss"] is None


@pytest.mark.usefixtures("few_resamples")
def test_all_levels_are_corrected_together(study: Study) -> None:
    for rate, second, first in ((0.003, 2.0, 3.0), (0.01, 1.0, 4.0)):
        for seed in (0, 1):
            finish_in_turn(study, Trial("final", "lora", rate, seed), second, first)
            finish_in_turn(study, Trial("final", "ours", rate, seed), second, first - 0.5)
    summary = report(study).summary
    found = [row["difference"] for table in ("equal", "lower_levels") for row in summary[table] if row["difference"]]
    assert len(found) == 2
    assert [each["holm_p"] for each in found] == pytest.approx([2 * min(each["p"] for each in found)] * 2)


@pytest.mark.parametrize("other", ["ours", "lora"])
def test_runs_on_other_questions_are_not_compared(study: Study, other: str) -> None:
    finish_in_turn(study, Trial("final", "ours", 0.01, 0), 1.0, 3.0)
    finish_in_turn(study, Trial("final", other, 0.03, 0), 1.0, 3.0, sha256="another")
    with pytest.raises(DataError, match="different questions"):
        report(study)
