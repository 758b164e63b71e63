import random
from collections.abc import Callable
from itertools import product
from operator import itemgetter

import pytest

from smoa_lab.study.search import Chosen, index_of, next_indices, rate, rate_text


def search(
    losses: dict[int, float | None], max_runs: int = 6, pick: Callable[[list[int]], int] = itemgetter(0)
) -> dict[int, float | None]:
    """Every index that the walk visits, with the loss there; ``pick`` says which of those needed is next."""
    visited: dict[int, float | None] = {}
    while indices := next_indices(visited, max_runs):
        index = pick(indices)
        visited[index] = losses.get(index, 9.0)
    return visited


def valley(best: float) -> dict[int, float | None]:
    return {index: abs(index - best) for index in range(-18, 18)}


@pytest.mark.parametrize("start", [2e-3, 1.7e-3, 2.3e-3, 1.25e-3])
def test_the_grid_starts_at_the_named_rate_and_has_two_digits(start: float) -> None:
    rates = [rate(start, index) for index in range(-12, 13)]
    assert rates[12] == start
    assert [index_of(start, value) for value in rates] == list(range(-12, 13))
    assert all(float(f"{value:.1e}") == value for value in rates if value != start)
    assert [rate(2e-3, index) for index in (-2, -1, 1, 2)] == [6.3e-4, 1.1e-3, 3.6e-3, 6.3e-3]


def test_a_rate_is_written_as_short_as_it_is() -> None:
    rates = [2e-3, 6.3e-4, 1.25e-3, 0.01, 1.0, 0.00316227766]
    assert [rate_text(value) for value in rates] == ["2e-3", "6.3e-4", "1.25e-3", "1e-2", "1e0", "3.16227766e-3"]
    assert [float(rate_text(value)) for value in rates] == rates


def test_the_search_walks_downhill_until_the_best_is_inside_and_then_looks_beside_it() -> None:
    assert list(search({0: 1.0})) == [0, -2, 2, -1, 1]
    assert list(search(valley(2.6))) == [0, -2, 2, 4, 1, 3]
    assert list(search(valley(3.6), max_runs=9)) == [0, -2, 2, 4, 6, 3, 5]


def test_the_search_ends_when_its_runs_are_spent_the_quarter_decades_too() -> None:
    downhill: dict[int, float | None] = {index: -float(index) for index in range(-18, 18)}
    assert list(search(downhill)) == [0, -2, 2, 4, 6, 8]
    assert [len(search(valley(0), max_runs=most)) for most in (3, 4, 5, 6)] == [3, 4, 5, 5]


def test_a_diverged_run_is_never_the_best() -> None:
    visited = search({-2: 2.0, 0: None, 2: None})
    assert -4 in visited
    assert Chosen.of({0.01: 2.0, 0.03: None, 0.003: 2.5}) == Chosen(
        0.01, {0.003: 2.5, 0.01: 2.0, 0.03: None}, "interior"
    )
    assert Chosen.of({0.01: 2.0, 0.03: 1.0, 0.003: 2.5}).place == "edge"


def test_a_search_visits_the_same_rates_in_whatever_order_results_come() -> None:
    for best, max_runs in product(range(-9, 9), (3, 6, 8)):
        losses = valley(best + 0.1)
        wanted = search(losses, max_runs)
        for seed in range(5):
            assert search(losses, max_runs, random.Random(seed).choice) == wanted
