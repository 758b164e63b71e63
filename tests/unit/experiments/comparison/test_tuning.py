from __future__ import annotations

import pytest

from smoa.experiments.comparison.tuning import best_index, half_decade, is_interior, nearest_index, next_index


def search(losses: dict[int, float | None], start: int, max_runs: int = 6) -> dict[int, float | None]:
    """Every index that the walk visits, with the loss it finds there."""
    found: dict[int, float | None] = {}
    while (index := next_index(start, found, max_runs)) is not None:
        found[index] = losses.get(index, 9.0)
    return found


def test_the_grid_is_half_decades() -> None:
    assert [half_decade(index) for index in (-6, -5, -4, -3)] == [1e-3, 3e-3, 1e-2, 3e-2]
    assert [nearest_index(rate) for rate in (1e-3, 3e-3, 0.012, 0.03)] == [-6, -5, -4, -3]


def test_a_best_at_the_start_ends_the_search_with_its_neighbours() -> None:
    assert list(search({-4: 1.0}, start=-4)) == [-4, -5, -3]


@pytest.mark.parametrize("best", [-7, -1])
def test_the_search_walks_downhill_until_the_best_is_inside(best: int) -> None:
    found = search({index: float(abs(index - best)) for index in range(-9, 3)}, start=-4)
    assert best_index(found) == best
    assert is_interior(found)


def test_the_search_ends_when_its_runs_are_spent() -> None:
    found = search({index: -float(index) for index in range(-9, 9)}, start=-4, max_runs=4)
    assert len(found) == 4
    assert not is_interior(found)


def test_a_diverged_run_is_never_the_best() -> None:
    found = search({-5: 2.0, -4: None, -3: None}, start=-4)
    assert best_index(found) == -5
    assert -6 in found
