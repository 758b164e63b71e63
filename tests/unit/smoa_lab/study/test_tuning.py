from __future__ import annotations

import random
from collections.abc import Callable
from operator import itemgetter

import pytest

from smoa_lab.study.tuning import best_index, first_index, is_interior, nearest_index, next_indices, rate, sweep_indices


def search(
    losses: dict[int, float | None],
    start: int,
    max_runs: int = 6,
    refine: bool = False,
    pick: Callable[[list[int]], int] = itemgetter(0),
) -> dict[int, float | None]:
    """Every index that the walk visits, with the loss it finds there; ``pick`` says which of those needed is next."""
    found: dict[int, float | None] = {}
    while indices := next_indices(start, found, max_runs, refine):
        index = pick(indices)
        found[index] = losses.get(index, 9.0)
    return found


def test_the_grid_is_quarter_decades_and_a_search_starts_on_half_ones() -> None:
    assert [rate(index) for index in range(-12, -6)] == [1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2]
    assert [nearest_index(rate(index)) for index in range(-12, 12)] == list(range(-12, 12))
    assert [first_index(rate) for rate in (1e-3, 3e-3, 0.012, 0.03)] == [-12, -10, -8, -6]


def test_a_sweep_has_every_quarter_decade_with_both_ends() -> None:
    assert [rate(index) for index in sweep_indices(1e-3, 1e-2)] == [1e-3, 2e-3, 3e-3, 6e-3, 1e-2]


def test_a_best_at_the_start_ends_the_search_with_its_neighbours() -> None:
    assert list(search({-8: 1.0}, start=-8)) == [-8, -10, -6]


@pytest.mark.parametrize("best", [-14, -2])
def test_the_search_walks_downhill_until_the_best_is_inside(best: int) -> None:
    found = search({index: float(abs(index - best)) for index in range(-18, 6)}, start=-8)
    assert best_index(found) == best
    assert is_interior(found)


def test_the_search_ends_when_its_runs_are_spent() -> None:
    found = search({index: -float(index) for index in range(-18, 18)}, start=-8, max_runs=4)
    assert len(found) == 4
    assert not is_interior(found)


def test_a_diverged_run_is_never_the_best() -> None:
    found = search({-10: 2.0, -8: None, -6: None}, start=-8)
    assert best_index(found) == -10
    assert -12 in found


@pytest.mark.parametrize("best", [-9, -8, -7])
def test_a_finer_search_tries_both_sides_of_the_best_half_decade(best: int) -> None:
    found = search({index: abs(index - best - 0.1) for index in range(-18, 6)}, start=-8, refine=True)
    halves = {index: loss for index, loss in found.items() if index % 2 == 0}
    assert sorted(set(found) - set(halves)) == [best_index(halves) - 1, best_index(halves) + 1]
    assert is_interior(found)
    assert best_index(found) == best


def test_a_finer_search_spends_two_runs_beyond_the_limit() -> None:
    assert len(search({index: -float(index) for index in range(-18, 18)}, start=-8, max_runs=4, refine=True)) == 6


def test_a_sweep_takes_quarter_or_half_decades() -> None:
    assert [rate(index) for index in sweep_indices(1e-3, 1e-2)] == [1e-3, 2e-3, 3e-3, 6e-3, 1e-2]
    assert [rate(index) for index in sweep_indices(1e-3, 3e-2, 2)] == [1e-3, 3e-3, 1e-2, 3e-2]


@pytest.mark.parametrize("best", range(-16, 2))
@pytest.mark.parametrize("max_runs", [3, 5, 8])
def test_a_search_visits_the_same_rates_in_whatever_order_results_come(best: int, max_runs: int) -> None:
    losses: dict[int, float | None] = {index: abs(index - best - 0.1) for index in range(-18, 6)}
    wanted = search(losses, -8, max_runs, refine=True)
    for seed in range(5):
        assert search(losses, -8, max_runs, True, random.Random(seed).choice) == wanted
