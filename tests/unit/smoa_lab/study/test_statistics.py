from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smoa_lab.study.statistics import (
    Difference,
    accuracy_difference,
    corrected,
    loss_difference,
    outcomes,
)


def results(shift: float, seeds: int = 3, questions: int = 200, noise: float = 0.05) -> list[dict[str, Any]]:
    """Runs on the same questions: hard and easy ones, all made worse by ``shift``, with a little noise of each run."""
    hard = np.random.default_rng(0).gamma(2.0, 1.0, questions)
    runs = []
    for seed in range(seeds):
        own = np.random.default_rng([seed, round(1000 * (shift + 1))]).normal(0, noise, questions)
        nll = hard + shift + own
        runs.append(
            {
                "questions": {
                    "task": ["a"] * (questions // 4) + ["b"] * (questions - questions // 4),
                    "nll": nll.tolist(),
                    "tokens": [2] * questions,
                    "right": [int(value < 1.5) for value in nll],
                }
            }
        )
    return runs


def test_the_loss_is_per_token_and_the_accuracy_counts_tasks_alike() -> None:
    run = {"questions": {"task": ["a", "b", "b"], "nll": [1.0, 2.0, 3.0], "tokens": [1, 1, 2], "right": [1, 0, 1]}}
    found = outcomes([run])
    assert found.mean_loss() == pytest.approx([6 / 4])
    assert found.accuracy() == pytest.approx([0.75])


def test_pairing_finds_a_difference_far_below_the_spread_of_questions() -> None:
    better = loss_difference(outcomes(results(-0.1)), outcomes(results(0.0)))
    assert better.verdict == "better"
    assert better.low < -0.05 < better.high  # 0.1 nats over two tokens
    assert loss_difference(outcomes(results(0.1)), outcomes(results(0.0))).verdict == "worse"
    assert accuracy_difference(outcomes(results(-0.5)), outcomes(results(0.0))).verdict == "better"


def test_a_difference_that_every_token_has_is_certain_although_answers_differ_in_length() -> None:
    entry, reference = results(0.0, noise=0.0), results(0.0, noise=0.0)
    for runs, rise in ((entry, 0.1), (reference, 0.0)):
        for run in runs:
            questions = run["questions"]
            questions["tokens"] = [1 + i % 5 for i in range(len(questions["nll"]))]
            pairs = zip(questions["nll"], questions["tokens"], strict=True)
            questions["nll"] = [nll + rise * tokens for nll, tokens in pairs]
    found = loss_difference(outcomes(entry), outcomes(reference))
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_an_entry_is_better_than_a_reference_that_diverged() -> None:
    diverged = results(0.0)
    diverged[0]["questions"]["nll"][3] = None
    assert loss_difference(outcomes(results(0.0)), outcomes(diverged)).verdict == "better"
    assert loss_difference(outcomes(diverged), outcomes(diverged)).verdict == "same"


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (10, 2.262)])
def test_few_seeds_widen_the_interval_by_students_t(seeds: int, quantile: float) -> None:
    """Every question of a seed is shifted alike, so nothing but the seeds is uncertain."""
    reference = results(0.0, seeds=seeds, noise=0.0)
    shifts = np.random.default_rng(1).normal(0.1, 0.3, seeds)
    entry = [
        {"questions": {**run["questions"], "nll": [nll + shift for nll in run["questions"]["nll"]]}}
        for run, shift in zip(reference, shifts, strict=True)
    ]
    found = loss_difference(outcomes(entry), outcomes(reference))
    half = quantile * shifts.std(ddof=1) / seeds**0.5 / 2  # two tokens a question
    assert found.mean == pytest.approx(shifts.mean() / 2)
    assert found.high - found.mean == pytest.approx(half, rel=0.05)
    assert found.mean - found.low == pytest.approx(half, rel=0.05)


@pytest.mark.usefixtures("few_resamples")
def test_seeds_that_differ_by_chance_are_called_so_in_one_study_of_twenty() -> None:
    wrong = 0
    for study in range(60):
        random = np.random.default_rng(study)
        runs = [results(0.0, questions=40, noise=0.0) for _ in range(2)]
        for run in (run for entry in runs for run in entry):
            shift = random.normal(0, 0.3)
            run["questions"]["nll"] = [nll + shift for nll in run["questions"]["nll"]]
        wrong += loss_difference(*map(outcomes, runs)).verdict != "same"
    assert wrong <= 7  # 3 expected; seeds resampled like questions give 15


def test_one_seed_gets_no_verdict() -> None:
    found = loss_difference(outcomes(results(-0.5, seeds=1)), outcomes(results(0.0, seeds=1)))
    assert found.verdict == "one seed"
    assert found.high < 0


def test_holm_multiplies_the_smallest_by_the_number_of_comparisons() -> None:
    for given, wanted in (([0.04, 0.01, 0.03, 0.9], [0.09, 0.04, 0.09, 0.9]), ([0.6, 0.7], [1.0, 1.0]), ([], [])):
        found = corrected([Difference(-0.5, -0.9, -0.1, "better", p=p) for p in given])
        assert [each and each.holm_p for each in found] == pytest.approx(wanted)


def test_holm_takes_back_what_many_comparisons_find_by_chance() -> None:
    """One seed, and what diverged, is no test and costs the others nothing."""
    nan = float("nan")
    clear, sure = (Difference(-0.5, -0.9, -0.1, "better", p=p) for p in (0.03, 0.001))
    no_tests = [Difference(-0.5, -0.9, -0.1, "one seed", p=0.01), Difference(nan, nan, nan, "worse"), None]
    found = corrected([clear, sure, *no_tests])
    assert [one and one.holm_p for one in found] == [0.03, 0.002, None, None, None]
    assert [one and one.label for one in found] == ["better", "better", "one seed", "worse", None]
    assert found[2] == no_tests[0]
    assert [one and one.label for one in corrected([clear, clear])] == ["better (Holm: same)"] * 2
