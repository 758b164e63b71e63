from __future__ import annotations

from dataclasses import replace

import pytest

from smoa_lab.study.report.sequence.compared import with_holm
from smoa_lab.study.report.sequence.curves import Curve
from smoa_lab.study.report.sequence.next_rate import at_next_rate
from tests.support.curves import made

REFERENCE = made("lora", [2.0, 1.5, 1.8], [3.1, 4.0, 9.0])


def test_an_entry_is_read_one_rate_above_its_own_best() -> None:
    found = at_next_rate(made("ours", [1.6, 1.7, 1.9], [3.0, 3.5, 4.0]), REFERENCE)
    assert found is not None
    assert (found.best, found.rate) == (1e-3, 1e-2)
    assert found.learned_loss == pytest.approx(1.7, abs=0.01)
    assert found.kept_loss == pytest.approx(3.5, abs=0.01)
    assert found.cost == pytest.approx(0.5, abs=0.01)


def test_it_is_compared_with_the_reference_above_its_own_best() -> None:
    found = at_next_rate(made("ours", [1.6, 1.7, 1.9], [3.0, 3.5, 4.0]), REFERENCE)
    assert found is not None
    difference = found.difference
    assert difference is not None
    assert difference.mean == pytest.approx(3.5 - 9.0, abs=0.01)
    assert difference.verdict == "better"
    corrected = with_holm([found])[0].difference
    assert corrected is not None
    assert corrected.holm_verdict == "better"


def test_the_reference_has_a_cost_and_no_difference() -> None:
    found = at_next_rate(REFERENCE, REFERENCE)
    assert found is not None
    assert found.cost == pytest.approx(5.0, abs=0.01)
    assert found.difference is None


def test_an_entry_best_at_its_highest_rate_has_no_next_one() -> None:
    assert at_next_rate(made("ours", [2.0, 1.7, 1.4], [3.0, 3.1, 3.2]), REFERENCE) is None


def test_a_next_rate_that_diverged_is_told_and_not_skipped() -> None:
    whole = made("ours", [1.6, 1.7, 1.9], [3.0, 3.5, 4.0])
    found = at_next_rate(replace(whole, diverged=[3e-3]), REFERENCE)
    assert found is not None
    assert (found.best, found.rate, found.kept_loss, found.difference) == (1e-3, 3e-3, None, None)
    beside = at_next_rate(whole, replace(REFERENCE, diverged=[3e-2]))
    assert beside is not None
    assert beside.kept_loss is not None
    assert beside.difference is None


@pytest.mark.parametrize("lacks", ["next rate", "seeds"])
def test_without_a_reference_to_compare_with_the_cost_alone_is_told(lacks: str) -> None:
    reference = made("lora", [2.0, 1.5], [3.1, 4.0])
    if lacks == "seeds":
        reference = Curve("lora", REFERENCE.rates, [7, 8, 9], REFERENCE.kept, REFERENCE.learned)
    found = at_next_rate(made("ours", [1.6, 1.7, 1.9], [3.0, 3.5, 4.0]), reference)
    assert found is not None
    assert found.difference is None
