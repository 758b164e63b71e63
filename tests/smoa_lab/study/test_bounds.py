"""How sure a difference between two entries is: the formulas of the module, one number after the other.
studies/calibration.py measures how often the bounds miss."""

import math
from statistics import fmean, variance
from typing import Any

import numpy as np
import pytest
from scipy import stats

from smoa_lab.study.bounds import Family, Floats, contrast, looks

ROWS = 40


def draws(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape)


def family(values: Floats, untouched: float = 5.0, **other: Any) -> Family:
    """Entries a, b, …, each row of weight 1; the base model has the same value everywhere."""
    weights = np.ones(values.shape[-1])
    own = {"is_share": False, "level": 0.05} | other
    return Family("abcdef"[: len(values)], values, untouched * weights[None], weights, **own)


def degrees_of_groups(weights: Floats) -> float:
    """Of v_R as a quadratic form of values whose variance is their weight (Bell and McCaffrey, 2002)."""
    part = weights / weights.sum()
    around = (np.eye(len(part)) - part[:, None]) @ np.diag(weights**0.5)
    form = around.T @ np.diag(1 / (1 - part)) @ around
    return float(np.trace(form) ** 2 / np.trace(form @ form))


def naive_upper(of: Family, name: str, other: str | None, tolerance: float) -> float:
    """The bound of two entries, or of one and the base model."""
    _, seeds, groups = of.values.shape
    kept, total, weights = 1 - tolerance, of.weights.sum(), of.weights
    pair = [of.names.index(each) for each in (name, other) if each is not None]
    gaps = np.array(of.values[pair[0]])
    for seed in range(seeds):
        gaps[seed] -= (
            of.untouched[0] if other is None else kept * of.values[pair[1], seed] + tolerance * of.untouched[0]
        )
    of_seed = [gaps[seed].sum() / total for seed in range(seeds)]
    mean = fmean(of_seed)
    around = sum((gaps[:, g].mean() - weights[g] * mean) ** 2 / (1 - weights[g] / total) for g in range(groups))
    alone = sum(variance(gaps[s, g] - weights[g] * of_seed[s] for s in range(seeds)) for g in range(groups)) / seeds
    of_rows = (max(0.0, around - alone) + of.is_share) / total**2

    variances = [variance(values.sum(axis=-1) / total) for values in of.values]
    shares = [1.0, kept**2][: len(pair)]
    own = [share * variances[entry] for share, entry in zip(shares, pair, strict=True)]
    rivals = [each for entry, each in enumerate(variances) if entry not in pair]
    if rivals:
        limit = stats.f.ppf(0.9, len(pair) * (seeds - 1), len(rivals) * (seeds - 1))
        is_wild = sum(own) / sum(shares) > limit * fmean(rivals)
    else:
        both = sorted(variances[entry] for entry in pair)
        is_wild = len(pair) == 2 and both[1] > stats.f.ppf(0.95, seeds - 1, seeds - 1) * both[0]
    known = (seeds - 1) * len(variances)
    freedom = (seeds - 1) * sum(own) ** 2 / sum(each**2 for each in own) if is_wild else known
    of_seeds = sum(shares) * max(fmean(variances), sum(own) / sum(shares)) / seeds

    of_groups = degrees_of_groups(weights)
    if known <= 2:  # Cochran and Cox
        each = stats.t.ppf(1 - of.level, [of_groups, freedom])
        times = (of_rows * each[0] + of_seeds * each[1]) / (of_rows + of_seeds)
    else:
        together = (of_rows + of_seeds) ** 2 / (of_rows**2 / of_groups + of_seeds**2 / freedom)
        times = stats.t.ppf(1 - of.level, together)
    return float(mean + times * (of_rows + of_seeds) ** 0.5)


@pytest.mark.parametrize("wild", [1.0, 20.0])
@pytest.mark.parametrize(("entries", "seeds", "groups"), [(2, 2, 30), (2, 3, 5), (4, 3, 12), (3, 5, 40), (1, 4, 9)])
def test_bounds_are_those_of_the_formulas(entries: int, seeds: int, groups: int, wild: float) -> None:
    for is_share, with_rows in ((False, 0.0), (False, 3.0), (True, 0.3)):
        random = np.random.default_rng(entries * groups)
        weights = random.integers(1, 30, groups).astype(float)
        values = 0.05 * random.normal(size=(entries, seeds, groups)) + 0.2 * random.normal(size=(entries, seeds, 1))
        values += with_rows * random.normal(size=(entries, 1, groups))
        values[0] *= wild
        names = "abcd"[:entries]
        of = Family(names, weights * values, weights[None] * 2, weights, is_share, 0.03)
        for name in names:
            for other in (None, *(names.replace(name, ""))):
                for tolerance in (0.0, 0.1) if other else (0.0,):
                    assert of.upper(name, other, tolerance) == pytest.approx(naive_upper(of, name, other, tolerance))


def test_what_a_row_does_in_one_seed_alone_is_part_of_how_seeds_differ() -> None:
    """No row has an error of its own, and all of them a new one in each seed."""
    found = contrast(draws(400, 2, 3, ROWS), np.zeros((1, ROWS)), np.ones(ROWS), 0, 1, 1.0)
    assert found.of_rows.mean() < 0.4 * found.of_seeds.mean()
    assert ((found.upper(0.025) < 0) | (found.lower(0.025) > 0)).mean() < 0.06


def test_more_rounds_are_expected_to_tell_more() -> None:
    found = contrast(draws(1000, 2, 2, ROWS), np.zeros((1, ROWS)), np.ones(ROWS), 0, 1, 1.0)
    assert (found.after(3, 2).upper(0.025) < found.upper(0.025)).all()


def test_a_pair_whose_rivals_all_diverged_is_compared_with_itself() -> None:
    values = draws(300, 2, 3, 1) * np.array([5.0, 1])[:, None, None] + np.zeros(2)
    alone = contrast(values, np.zeros((1, 2)), np.ones(2), 0, 1, 1.0)
    beside = contrast(np.insert(values, 2, np.inf, axis=1), np.zeros((1, 2)), np.ones(2), 0, 1, 1.0)
    assert (beside.seeds_freedom == alone.seeds_freedom).all()


def test_an_entry_suffices_that_keeps_enough_of_what_the_other_gained_and_gained() -> None:
    values = np.stack([np.full((2, ROWS), 2.05), np.full((2, ROWS), 2.0)])
    found = family(values)
    assert found.upper("a", "b") == pytest.approx(0.05)
    assert found.upper("a", "b", 0.1) == pytest.approx(2.05 - 0.9 * 2.0 - 0.1 * 5.0)
    assert found.suffices("a", 0.1)
    assert not found.suffices("a", 0.01)
    assert found.kept("a", 0.1) == pytest.approx(2.95 / 3.0)
    assert not family(values, untouched=2.0).suffices("b", 0.1), "it gained nothing"
    equal = family(np.full((2, 2, ROWS), 2.0))
    assert (equal.upper("a", "b"), equal.suffices("a", 0.1)) == (0.0, True)
    assert equal.kept("a", 0.1) == pytest.approx(1.0)


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
