import numpy as np
import pytest

from smoa_lab.study.statistics import Difference, Floats, corrected, paired_difference

WEIGHTS = np.full(200, 2.0)
"""Tokens of each row."""


def losses(shift: float, seeds: int = 3, rows: int = 200, noise: float = 0.05) -> Floats:
    """Runs on the same rows: hard and easy ones, all made worse by ``shift``, with a little noise of each run."""
    hard = np.random.default_rng(0).gamma(2.0, 1.0, rows)
    own = [np.random.default_rng([seed, round(1000 * (shift + 1))]).normal(0, noise, rows) for seed in range(seeds)]
    return hard + shift + np.stack(own)


def difference(entry: Floats, reference: Floats) -> Difference:
    """In loss per token, where lower is better."""
    return paired_difference(entry, reference, WEIGHTS[: entry.shape[1]], sign=-1)


def test_pairing_finds_a_difference_far_below_the_spread_of_rows() -> None:
    better = difference(losses(-0.1), losses(0.0))
    assert better.verdict == "better"
    assert better.low < -0.05 < better.high  # 0.1 nats over two tokens
    assert difference(losses(0.1), losses(0.0)).verdict == "worse"
    right = (losses(-0.5) < 1.5).astype(float), (losses(0.0) < 1.5).astype(float)
    assert paired_difference(*right, np.ones(200), sign=1).verdict == "better"


def test_a_difference_that_every_token_has_is_certain_although_rows_differ_in_length() -> None:
    tokens = 1.0 + np.arange(200) % 5
    reference = losses(0.0, noise=0.0)
    found = paired_difference(reference + 0.1 * tokens, reference, tokens, sign=-1)
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_an_entry_is_better_than_a_reference_that_diverged() -> None:
    diverged = losses(0.0)
    diverged[0, 3] = np.inf
    assert difference(losses(0.0), diverged).verdict == "better"
    assert difference(diverged, losses(0.0)).verdict == "worse"
    assert difference(diverged, diverged).verdict == "same"


def test_two_with_equal_values_are_the_same_and_no_test() -> None:
    assert difference(losses(0.0), losses(0.0)) == Difference(0.0, 0.0, 0.0, "same", p=None)


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (10, 2.262)])
def test_few_seeds_widen_the_interval_by_students_t(seeds: int, quantile: float) -> None:
    """Every row of a seed is shifted alike, so nothing but the seeds is uncertain."""
    reference = losses(0.0, seeds=seeds, noise=0.0)
    shifts = np.random.default_rng(1).normal(0.1, 0.3, seeds)
    found = difference(reference + shifts[:, None], reference)
    half = quantile * shifts.std(ddof=1) / seeds**0.5 / 2  # two tokens a row
    assert found.mean == pytest.approx(shifts.mean() / 2)
    assert found.high - found.mean == pytest.approx(half, rel=0.05)
    assert found.mean - found.low == pytest.approx(half, rel=0.05)


@pytest.mark.usefixtures("few_resamples")
def test_seeds_that_differ_by_chance_are_called_so_in_one_study_of_twenty() -> None:
    wrong = 0
    for study in range(60):
        chance = np.random.default_rng(study)
        runs = [losses(0.0, rows=40, noise=0.0) + chance.normal(0, 0.3, (3, 1)) for _ in range(2)]
        wrong += difference(*runs).verdict != "same"
    assert wrong <= 7  # 3 expected; seeds resampled like rows give 15


def test_one_seed_gets_no_verdict() -> None:
    found = difference(losses(-0.5, seeds=1), losses(0.0, seeds=1))
    assert found.verdict == "one seed"
    assert found.high < 0


def test_holm_multiplies_the_smallest_by_the_number_of_comparisons() -> None:
    for given, wanted in (([0.04, 0.01, 0.03, 0.9], [0.09, 0.04, 0.09, 0.9]), ([0.6, 0.7], [1.0, 1.0]), ([], [])):
        found = corrected([Difference(-0.5, -0.9, -0.1, "better", p=p) for p in given])
        assert [each.holm_p for each in found] == pytest.approx(wanted)


def test_holm_takes_back_what_many_comparisons_find_by_chance() -> None:
    """One seed, and what diverged, is no test and costs the others nothing."""
    nan = float("nan")
    clear, sure = (Difference(-0.5, -0.9, -0.1, "better", p=p) for p in (0.03, 0.001))
    no_tests = [Difference(-0.5, -0.9, -0.1, "one seed", p=0.01), Difference(nan, nan, nan, "worse")]
    found = corrected([clear, sure, *no_tests])
    assert [one.holm_p for one in found] == [0.03, 0.002, None, None]
    assert [one.label for one in found] == ["better", "better", "one seed", "worse"]
    assert found[2] == no_tests[0]
    assert [one.label for one in corrected([clear, clear])] == ["better (Holm: same)"] * 2
