import numpy as np
import pytest

from smoa_lab.scoring.differences import (
    Difference,
    Floats,
    SeedError,
    corrected,
    paired_difference,
    seed_error,
    students_t,
    variances_of,
)

WEIGHTS = np.full(200, 2.0)
"""Tokens of each row."""


def losses(shift: float, seeds: int = 3, rows: int = 200, noise: float = 0.05) -> Floats:
    """Runs on the same rows: hard and easy ones, all made worse by ``shift``, with a little noise of each run."""
    hard = np.random.default_rng(0).gamma(2.0, 1.0, rows)
    own = [np.random.default_rng([seed, round(1000 * (shift + 1))]).normal(0, noise, rows) for seed in range(seeds)]
    return hard + shift + np.stack(own)


def error(*entries: Floats, weights: Floats = WEIGHTS) -> SeedError:
    """Of the first two of a table's entries."""
    means = {str(number): runs.sum(axis=1) / weights.sum() for number, runs in enumerate(entries)}
    return seed_error(variances_of(means), "01", len(entries[0]))


def difference(entry: Floats, reference: Floats, *others: Floats) -> Difference:
    """In loss per token, where lower is better; ``others`` are in the table too."""
    weights = WEIGHTS[: entry.shape[1]]
    return paired_difference(entry, reference, weights, -1, error(entry, reference, *others, weights=weights))


def test_pairing_finds_a_difference_far_below_the_spread_of_rows() -> None:
    better = difference(losses(-0.1), losses(0.0))
    assert better.verdict == "better"
    assert better.low < -0.05 < better.high  # 0.1 nats over two tokens
    assert difference(losses(0.1), losses(0.0)).verdict == "worse"
    right = (losses(-0.5) < 1.5).astype(float), (losses(0.0) < 1.5).astype(float)
    assert paired_difference(*right, np.ones(200), 1, error(*right, weights=np.ones(200))).verdict == "better"


def test_a_difference_that_every_token_has_is_certain_although_rows_differ_in_length() -> None:
    tokens = 1.0 + np.arange(200) % 5
    reference = losses(0.0, noise=0.0)
    found = paired_difference(reference + 0.1 * tokens, reference, tokens, -1, (0.0, 4))
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_an_entry_is_better_than_a_reference_that_diverged() -> None:
    diverged = losses(0.0)
    diverged[0, 3] = np.inf
    assert difference(losses(0.0), diverged).verdict == "better"
    assert difference(diverged, losses(0.0)).verdict == "worse"
    assert difference(diverged, diverged).verdict == "same"


def test_two_with_equal_values_are_the_same_and_no_test() -> None:
    assert difference(losses(0.0), losses(0.0)) == Difference(0.0, 0.0, 0.0, "same", p=None)


def test_what_one_loses_the_other_gains() -> None:
    shifted = losses(0.0, noise=0.0) + np.array([[0.3], [0.4], [0.6]])
    one, other = difference(shifted, losses(0.0)), difference(losses(0.0), shifted)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=0.01)
    assert (one.verdict, other.verdict) == ("worse", "better")


@pytest.mark.parametrize(
    ("entries", "seeds", "quantile"), [(2, 2, 4.303), (2, 10, 2.101), (4, 2, 2.776), (4, 3, 2.306)]
)
def test_seeds_widen_the_interval_by_students_t_of_all_entries_together(
    entries: int, seeds: int, quantile: float
) -> None:
    """Every row of a seed is shifted alike, so nothing but the seeds is uncertain; all entries have one variance."""
    hard = losses(0.0, seeds=1, noise=0.0)
    shifts = np.linspace(-0.3, 0.3, seeds)[:, None]
    runs = [hard + shifts + 0.1 * number for number in range(entries)]
    found = difference(runs[1], runs[0][::-1], *runs[2:])
    half = quantile * 2**0.5 * shifts.std(ddof=1) / seeds**0.5 / 2  # two tokens a row
    assert found.mean == pytest.approx(0.05)
    assert found.high - found.mean == pytest.approx(half, rel=0.03)
    assert found.mean - found.low == pytest.approx(half, rel=0.03)


def test_a_pair_that_differs_more_than_the_pool_has_its_own_variance() -> None:
    known = {"0": (3.0, 2), "1": (1.0, 2), "2": (1.5, 2), "3": (0.5, 2)}
    assert seed_error(known, "01", 3) == ((2 * 2.0 / 3) ** 0.5, 8)
    assert seed_error(known, "23", 3) == ((2 * 1.5 / 3) ** 0.5, 8)
    assert seed_error({name: known[name] for name in "01"}, "01", 3) == ((2 * 2.0 / 3) ** 0.5, 4)


def test_a_wild_entry_has_as_few_degrees_of_freedom_as_it_has_alone() -> None:
    known = {"wild": (25.0, 2), "0": (1.0, 2), "1": (1.2, 2), "2": (0.8, 2)}
    assert seed_error(known, ("wild", "0"), 3) == (pytest.approx((2 * 13 / 3) ** 0.5), 2.2)
    assert seed_error({**known, "wild": (4.0, 2)}, ("wild", "0"), 3)[1] == 8  # F(4, 4) has its 90 % point at 4.1


def test_entries_with_one_seed_or_a_diverged_run_are_no_part_of_the_pool() -> None:
    means = {"sure": np.array([1.0, 2.0, 3.0]), "one": np.array([9.0]), "diverged": np.array([1.0, np.inf, 1.0])}
    known = variances_of(means)
    assert known == {"sure": (1.0, 2)}
    assert seed_error(known, ("one", "diverged"), 1) == (2**0.5, 2)
    assert seed_error({}, ("one", "diverged"), 1) == (0.0, 0)


def test_what_rows_do_in_one_seed_alone_is_counted_once() -> None:
    """Nothing but chance of each row in each seed: the mean over seeds shows it already."""
    chance = np.random.default_rng(0)
    runs = [chance.normal(0, 1, (8, 200)) for _ in range(2)]
    found, (stderr, freedom) = difference(*runs), error(*runs)
    assert found.high - found.low < 2.2 * stderr * np.quantile(students_t(freedom, 4000), 0.975)


@pytest.mark.usefixtures("few_resamples")
def test_seeds_that_differ_by_chance_are_called_so_in_one_study_of_twenty() -> None:
    wrong = 0
    for study in range(60):
        chance = np.random.default_rng(study)
        runs = [losses(0.0, rows=40, noise=0.0) + chance.normal(0, 0.3, (3, 1)) for _ in range(4)]
        wrong += difference(*runs).verdict != "same"
    assert wrong <= 7  # 3 expected; seeds resampled like rows give 15


def test_one_seed_gets_no_verdict_and_an_interval_only_where_others_show_how_seeds_differ() -> None:
    one, other = losses(-0.5, seeds=1), losses(0.0, seeds=1)
    found = difference(one, other)
    assert (found.verdict, found.p, found.signed(1, 2)) == ("one seed", None, "-0.25")
    found = difference(one, other, losses(0.2))
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
