from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.report.sequence.compared import with_holm
from smoa_lab.study.report.sequence.curves import Curve
from smoa_lab.study.report.sequence.equal_learning import (
    EqualLearning,
    Reading,
    at_equal_learning,
    at_lower_levels,
    crossing,
    least_gaps,
)
from tests.support.curves import made

REFERENCE = made("lora", [2.0, 1.5, 1.8], [3.1, 4.0, 9.0])


@pytest.mark.parametrize(
    ("level", "index", "share"), [(2.5, 0, 0.0), (2.0, 0, 0.0), (1.75, 0, 0.5), (1.5, 0, 1.0), (1.2, 1, 0.6)]
)
def test_the_lowest_rate_that_comes_down_to_a_level_is_taken(level: float, index: int, share: float) -> None:
    place = crossing([2.0, 1.5, 1.0, 3.0, 1.0], level)
    assert place is not None
    assert (place.index, place.share) == (index, pytest.approx(share))
    assert place.of([2.0, 1.5, 1.0, 3.0, 1.0]) == pytest.approx(min(level, 2.0))


def test_a_level_below_all_losses_is_never_reached() -> None:
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


def test_a_level_that_the_entry_does_not_reach_is_not_compared_twice() -> None:
    own, reference = made("ours", [2.0, 1.9], [3.0, 3.1]), made("lora", [2.1, 1.6, 1.5], [3.0, 3.2, 3.9])
    assert [one.level for one in at_lower_levels(own, reference)] == pytest.approx([2.1], abs=0.01)


def test_the_reference_is_read_at_its_own_best_rate() -> None:
    found = at_equal_learning(REFERENCE, REFERENCE)
    assert found.own.rate == pytest.approx(1e-2)
    assert found.own.kept_loss == pytest.approx(4.0, abs=0.01)
    assert found.difference is None


def test_an_entry_that_keeps_more_is_better_with_its_interval() -> None:
    found = at_equal_learning(made("ours", [2.0, 1.6, 1.4], [3.0, 3.1, 3.3]), REFERENCE)
    assert found.difference is not None
    assert found.difference.low < -0.8 < found.difference.high
    assert found.difference.verdict == "better"
    assert found.difference.p is not None
    assert found.difference.p < 0.01


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


def test_an_entry_like_the_reference_is_the_same() -> None:
    found = at_equal_learning(made("alike", [2.0, 1.5, 1.8], [3.1, 4.0, 9.0]), REFERENCE)
    assert found.difference is None or found.difference.verdict == "same"


def test_an_entry_whose_lowest_rate_learns_more_is_marked() -> None:
    found = at_equal_learning(made("ours", [1.3, 1.2], [3.0, 3.5]), REFERENCE)
    assert found.own.is_lowest
    assert found.own.kept_loss == pytest.approx(3.0, abs=0.01)


def test_one_seed_gets_no_verdict_and_no_shared_seed_no_difference() -> None:
    one = at_equal_learning(made("ours", [2.0, 1.4], [3.0, 3.1], seeds=1), REFERENCE)
    assert one.difference is not None
    assert one.difference.verdict == "one seed"
    other = made("ours", [2.0, 1.4], [3.0, 3.1], seeds=1)
    alone = at_equal_learning(Curve("ours", other.rates, [7], other.kept, other.learned), REFERENCE)
    assert alone.own.kept_loss == pytest.approx(3.1, abs=0.05)
    assert alone.difference is None


def test_all_entries_of_a_study_are_corrected_together() -> None:
    read = Reading(1e-3, 3.0, is_lowest=False)
    clear = Difference(-0.5, -0.9, -0.1, "better", p=0.03)
    found = with_holm([EqualLearning(name, "lora", 1.5, read, read, difference=clear) for name in ("ours", "other")])
    assert [one.difference.holm_verdict for one in found if one.difference] == ["same", "same"]


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
