"""How sure a difference between two entries is: the formula's parts, and how often bounds miss."""

import math

import numpy as np
import pytest
from scipy.special import stdtrit

from smoa_lab.study.bounds import Family, Floats, contrast, looks

ROWS = 40


def draws(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape)


def family(values: Floats, untouched: float = 5.0, level: float = 0.05, is_share: bool = False) -> Family:
    """Entries a, b, …, each row of weight 1; the base model has the same value everywhere."""
    weights = np.ones(values.shape[-1])
    return Family("abcdef"[: len(values)], values, untouched * weights[None], weights, is_share, level)


def test_two_entries_with_seeds_alone_have_students_t_with_the_pooled_variance() -> None:
    of_seed = draws(2, 3, 1)
    found = family(of_seed + np.zeros(ROWS))
    variance = of_seed.var(axis=1, ddof=1).mean()
    stderr = math.sqrt(2 * variance / 3)
    mean = float(of_seed[0].mean() - of_seed[1].mean())
    assert found.upper("a", "b") == pytest.approx(mean + stdtrit(4, 0.95) * stderr)
    assert -found.upper("b", "a") == pytest.approx(mean - stdtrit(4, 0.95) * stderr)
    assert found.upper("a", None) == pytest.approx(of_seed[0].mean() - 5 + stdtrit(4, 0.95) * stderr / 2**0.5)


def test_rows_alone_have_the_error_of_a_mean_of_their_groups() -> None:
    gaps = draws(ROWS)
    values = np.stack([np.tile(gaps, (2, 1)), np.zeros((2, ROWS))])
    expected = gaps.mean() + stdtrit(ROWS - 1, 0.95) * gaps.std(ddof=1) / ROWS**0.5
    assert family(values).upper("a", "b") == pytest.approx(expected)
    few = family(values, is_share=True).upper("a", "b")
    assert few == pytest.approx(
        gaps.mean() + stdtrit(ROWS - 1, 0.95) * math.sqrt(gaps.var(ddof=1) / ROWS + 1 / ROWS**2)
    )


def test_rows_that_belong_together_count_as_one() -> None:
    gaps = np.repeat(draws(8), 5)
    values = np.stack([np.tile(gaps, (2, 1)), np.zeros((2, 40))])
    grouped = Family("ab", values.reshape(2, 2, 8, 5).sum(axis=-1), np.zeros((1, 8)), np.full(8, 5.0), False, 0.05)
    assert grouped.upper("a", "b") - gaps.mean() > 2 * (family(values).upper("a", "b") - gaps.mean())


def test_what_a_row_does_in_one_seed_alone_is_part_of_how_seeds_differ() -> None:
    """No row has an error of its own, and all of them a new one in each seed."""
    values = draws(400, 2, 3, ROWS)
    found = contrast(values, np.zeros((1, ROWS)), np.ones(ROWS), 0, 1, 1.0)
    assert found.of_rows.mean() < 0.4 * found.of_seeds.mean()
    assert ((found.upper(0.025) < 0) | (found.lower(0.025) > 0)).mean() < 0.06


@pytest.mark.parametrize(("groups", "most"), [(5, 0.075), (10, 0.075), (50, 0.075)])
def test_bounds_miss_as_often_as_they_say_with_few_rows(groups: int, most: float) -> None:
    """Up to a9f43f17 rows were resampled: 11 % with 10, 16 % with 5."""
    random = np.random.default_rng(0)
    rows, seeds = random.normal(size=(4000, 1, 1, groups)), random.normal(size=(4000, 2, 3, 1))
    values = 0.02 * seeds + np.concatenate([rows, -rows], axis=1) / 2 + 0.05 * random.normal(size=(4000, 2, 3, groups))
    found = contrast(values, np.zeros((1, groups)), np.ones(groups), 0, 1, 1.0)
    assert ((found.upper(0.025) < 0) | (found.lower(0.025) > 0)).mean() < most


@pytest.mark.parametrize("sizes", [[4] * 49 + [200], [1] * 8 + [50, 50], [round(200 / k) for k in range(1, 51)]])
def test_groups_of_very_different_sizes_miss_hardly_more_often(sizes: list[int]) -> None:
    """Up to 5267c7c7 they had the degrees of as many equal ones: 8 to 21 %."""
    random, weights = np.random.default_rng(0), np.array(sizes, float)
    values = 0.05 * weights * random.normal(size=(4000, 2, 3, 1)) + np.zeros(len(sizes))
    values[:, :1] += weights * random.normal(size=(4000, 1, 1, len(sizes)))
    found = contrast(values, np.zeros((1, len(sizes))), weights, 0, 1, 1.0)
    assert ((found.upper(0.025) < 0) | (found.lower(0.025) > 0)).mean() < 0.12
    assert (found.upper(0.05) < 0).mean() < 0.08
    equal = contrast(values, np.zeros((1, len(sizes))), np.full(len(sizes), 3.0), 0, 1, 1.0)
    assert equal.rows_freedom == pytest.approx(len(sizes) - 1)


def test_a_pair_whose_rivals_all_diverged_is_compared_with_itself() -> None:
    values = draws(300, 2, 3, 1) * np.array([5.0, 1])[:, None, None] + np.zeros(2)
    alone = contrast(values, np.zeros((1, 2)), np.ones(2), 0, 1, 1.0)
    beside = contrast(np.insert(values, 2, np.inf, axis=1), np.zeros((1, 2)), np.ones(2), 0, 1, 1.0)
    assert (beside.seeds_freedom == alone.seeds_freedom).all()


@pytest.mark.parametrize("groups", [20, 200])
def test_two_seeds_of_two_entries_miss_as_often_as_they_say(groups: int) -> None:
    """Satterthwaite's degrees missed 7.5 % and more."""
    random = np.random.default_rng(1)
    values = random.normal(size=(20_000, 2, 2, 1)) + np.zeros(groups)
    values[:, :1] += (0.1 * groups) ** 0.5 * random.normal(size=(20_000, 1, 1, groups))
    found = contrast(values, np.zeros((1, groups)), np.ones(groups), 0, 1, 1.0)
    assert ((found.upper(0.025) < 0) | (found.lower(0.025) > 0)).mean() < 0.06
    assert (found.after(3, 2).upper(0.025) < found.upper(0.025)).all()


def test_an_entry_that_varies_more_than_the_others_has_the_degrees_of_its_own_seeds() -> None:
    of_seed = draws(4, 3, 1) * np.array([50.0, 1, 1, 1])[:, None, None]
    values = of_seed + np.zeros(2)
    wild = contrast(values, np.zeros((1, 2)), np.ones(2), 0, 1, 1.0)
    assert wild.seeds_freedom == pytest.approx(2, abs=0.1)
    assert wild.of_seeds == pytest.approx(of_seed[:2].var(axis=1, ddof=1).sum() / 3), "and their variance"
    assert contrast(values, np.zeros((1, 2)), np.ones(2), 2, 3, 1.0).seeds_freedom == 8


def test_a_contrast_asks_for_a_share_of_what_the_other_gained() -> None:
    values = np.stack([np.full((2, ROWS), 2.05), np.full((2, ROWS), 2.0)])
    found = family(values)
    assert found.upper("a", "b") == pytest.approx(0.05)
    assert found.upper("a", "b", 0.1) == pytest.approx(2.05 - 0.9 * 2.0 - 0.1 * 5.0)
    assert found.suffices("a", 0.1)
    assert not found.suffices("a", 0.01)
    assert found.kept("a", 0.1) == pytest.approx(2.95 / 3.0)
    assert not family(values, untouched=2.0).suffices("b", 0.1), "it gained nothing"


def test_equal_entries_are_never_called_better_but_each_keeps_all() -> None:
    found = family(np.full((2, 2, ROWS), 2.0))
    assert found.upper("a", "b") == 0.0
    assert found.suffices("a", 0.1)
    assert found.kept("a", 0.1) == pytest.approx(1.0)


def test_what_diverged_loses_to_all_and_what_nothing_bounds_is_open() -> None:
    values = draws(3, 2, ROWS)
    values[0, 1, 3] = np.inf
    found = family(values)
    assert (found.upper("a", "b"), found.upper("b", "a"), found.upper("a", None)) == (math.inf, -math.inf, math.inf)
    assert math.isfinite(found.upper("b", "c"))
    assert family(draws(2, 1, ROWS)).upper("a", "b") == math.inf, "one seed"
    assert family(draws(2, 3, 1)).upper("a", "b") == math.inf, "one group"


def test_how_much_worse_at_least_is_how_much_better_the_other_is_at_most() -> None:
    found = family(draws(2, 3, ROWS))
    assert found.lower("a", "b") == -found.upper("b", "a") < found.upper("a", "b")
    assert found.lower("a", None) < found.of_seeds("a").mean() - 5 < found.upper("a", None)


def test_planned_looks_have_one_level_and_later_ones_a_half_of_what_is_left() -> None:
    planned = looks(3, 3, 3)
    assert [number for number, _ in planned] == [2, 3]
    assert len({level for _, level in planned}) == 1
    assert looks(3, 3, 6)[2:] == [(4, 0.005), (5, 0.0025), (6, 0.00125)]
    levels = [looks(4, rounds, rounds)[0][1] for rounds in range(2, 13)]
    assert levels == sorted(levels, reverse=True)
    assert looks(20, 3, 3) == looks(6, 3, 3)
    assert 0 < looks(1, 3, 3)[0][1] < looks(2, 3, 3)[0][1] < looks(3, 3, 3)[0][1] < 0.05


def test_an_added_entry_takes_unplanned_looks_alone_from_the_last_planned_round_on() -> None:
    assert looks(3, 3, 3, added=1) == [(3, 0.005)]
    assert looks(3, 3, 5, added=2) == [(3, 0.0025), (4, 0.00125), (5, 0.000625)]
    assert looks(3, 0, 2) == [(2, 0.0025)]
