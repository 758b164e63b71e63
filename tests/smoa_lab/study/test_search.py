import random
from collections.abc import Callable
from itertools import product
from operator import itemgetter

import pytest

from smoa_lab.study.search import Chosen, next_indices, rate, rate_text


def search(
    losses: dict[int, float | None],
    max_runs: int = 6,
    pick: Callable[[list[int]], int] = itemgetter(0),
    untouched: float | None = None,
) -> dict[int, float | None]:
    """Every index that the walk visits, with the loss there; ``pick`` says which of those needed is next."""
    visited: dict[int, float | None] = {}
    while indices := next_indices(visited, max_runs, untouched):
        index = pick(indices)
        visited[index] = losses.get(index, 9.0)
    return visited


def valley(best: float) -> dict[int, float | None]:
    return {index: abs(index - best) for index in range(-18, 18)}


@pytest.mark.parametrize("start", [2e-3, 1.7e-3, 2.3e-3, 1.25e-3])
def test_the_grid_starts_at_the_named_rate_and_has_two_digits(start: float) -> None:
    rates = [rate(start, index) for index in range(-12, 13)]
    assert rates[12] == start
    assert all(float(f"{value:.1e}") == value for value in rates if value != start)
    assert [rate(2e-3, index) for index in (-2, -1, 1, 2)] == [6.3e-4, 1.1e-3, 3.6e-3, 6.3e-3]


def test_a_rate_is_written_as_short_as_it_is() -> None:
    rates = [2e-3, 6.3e-4, 1.25e-3, 0.01, 1.0, 0.00316227766]
    assert [rate_text(value) for value in rates] == ["2e-3", "6.3e-4", "1.25e-3", "1e-2", "1e0", "3.16227766e-3"]
    assert [float(rate_text(value)) for value in rates] == rates


def test_the_search_walks_downhill_in_quarter_decades_until_the_best_is_inside() -> None:
    assert list(search({0: 1.0})) == [0, -1, 1]
    assert list(search(valley(0.6))) == [0, -1, 1, 2]
    assert list(search(valley(-2.2))) == [0, -1, 1, -2, -3]
    assert [len(search(valley(best))) for best in (0.1, 1.1, 2.1, 3.1)] == [3, 4, 5, 6]


def test_the_search_ends_when_its_runs_are_spent() -> None:
    downhill: dict[int, float | None] = {index: -float(index) for index in range(-18, 18)}
    assert list(search(downhill)) == [0, -1, 1, 2, 3, 4]
    assert [len(search(downhill, max_runs=most)) for most in (3, 4, 5, 6)] == [3, 4, 5, 6]


def test_where_no_rate_beats_the_untouched_model_the_search_goes_down_in_half_decades() -> None:
    high: dict[int, float | None] = {0: 5.0, -1: 4.8, 1: None, -3: 4.5, -5: 3.0}
    assert list(search(high, untouched=4.0)) == [0, -1, 1, -3, -5, -6]
    assert list(search(high, untouched=4.6, max_runs=9)) == [0, -1, 1, -3, -4, -2]
    diverged = dict.fromkeys(range(-9, 9))
    assert list(search(diverged)) == [0, -1, 1, -3, -5, -7]


def test_a_diverged_run_is_never_the_best() -> None:
    assert list(search({-1: 2.0, 0: None, 1: None})) == [0, -1, 1, -2]
    assert Chosen.of(0.01, {0: 2.0, 1: None, -1: 2.5}) == Chosen(
        0.01, {0.0056: 2.5, 0.01: 2.0, 0.018: None}, "interior"
    )
    assert Chosen.of(0.01, {0: 2.0, 1: 1.0, -1: 2.5}).place == "edge"


@pytest.mark.parametrize("vertex", [-0.5, -0.31, 0.2, 0.44])
def test_the_rate_that_is_chosen_is_the_vertex_of_the_parabola_through_the_best_and_its_neighbors(
    vertex: float,
) -> None:
    losses: dict[int, float | None] = {index: 3.0 + 0.1 * (index - 1 - vertex) ** 2 for index in range(-1, 4)}
    chosen = Chosen.of(2e-3, losses)
    assert chosen.learning_rate == float(f"{2e-3 * 10 ** ((1 + vertex) / 4):.1e}")
    assert (chosen.place, chosen.tried) == ("vertex", rate(2e-3, 1) if vertex > -0.5 else 2e-3)


def test_a_flat_parabola_and_a_best_without_two_neighbors_take_the_rate_of_the_grid() -> None:
    assert Chosen.of(2e-3, {-1: 3.0, 0: 3.0, 1: 3.0, 2: 3.1}).learning_rate == rate(2e-3, -1)
    assert Chosen.of(2e-3, {-3: 3.5, -1: 3.0, 0: 3.2, 1: 4.0}) == Chosen(
        1.1e-3, {3.6e-4: 3.5, 1.1e-3: 3.0, 2e-3: 3.2, 3.6e-3: 4.0}, "edge"
    )
    assert Chosen.of(2e-3, {-1: 3.1, 0: 3.0, 1: 3.1}) == Chosen(2e-3, {1.1e-3: 3.1, 2e-3: 3.0, 3.6e-3: 3.1}, "interior")


def test_a_search_visits_the_same_rates_in_whatever_order_results_come() -> None:
    for best, max_runs, untouched in product(range(-9, 9), (3, 6, 8), (None, 1.5)):
        losses = valley(best + 0.1)
        wanted = search(losses, max_runs, untouched=untouched)
        for seed in range(5):
            assert search(losses, max_runs, random.Random(seed).choice, untouched) == wanted
