from __future__ import annotations

import numpy as np
import pytest

from smoa.errors import DataError
from smoa_lab.study.report.sequence.curves import Losses, curves_of, final_runs, run_rows
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial
from tests.support.studies import QUESTIONS, finish_in_turn

OF_QUESTION = (QUESTIONS - 1) / QUESTIONS / 2
"""What the questions add to a loss, in the mean."""


@pytest.fixture
def study(study: Study) -> Study:
    """The study with a sweep."""
    tuning = study.tuning.model_copy(update={"sweep": (0.003, 0.03), "per_decade": 2})
    return study.model_copy(update={"tuning": tuning, "seeds": [0, 1]})


def test_a_curve_has_both_losses_at_each_rate(study: Study) -> None:
    for rate, second, first in ((0.01, 1.0, 4.0), (0.003, 2.0, 3.0)):
        for seed in (0, 1):
            finish_in_turn(study, Trial("final", "ours", rate, seed), second + 0.2 * seed, first)
    (found,) = curves_of(final_runs(study))
    assert (found.rates, found.seeds) == ([0.003, 0.01], [0, 1])
    assert found.learned.mean() == pytest.approx([2.1 + OF_QUESTION, 1.1 + OF_QUESTION])
    assert found.kept.mean() == pytest.approx([3 + OF_QUESTION, 4 + OF_QUESTION])
    assert found.only([1]).learned.mean() == pytest.approx([2.2 + OF_QUESTION, 1.2 + OF_QUESTION])


def test_a_rate_that_diverged_and_a_seed_that_is_not_finished_are_left_out(study: Study) -> None:
    for rate, second in ((0.003, 2.0), (0.01, 1.0), (0.03, None)):
        finish_in_turn(study, Trial("final", "ours", rate, 0), second, 3.0)
    finish_in_turn(study, Trial("final", "ours", 0.003, 1), 2.0, 3.0)
    (found,) = curves_of(final_runs(study))
    assert (found.rates, found.seeds, found.diverged) == ([0.003, 0.01], [0], [0.03])
    rows = run_rows(study, final_runs(study))
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [(0.003, 0), (0.003, 1), (0.01, 0), (0.03, 0)]
    assert rows[-1]["second_loss"] is None


def test_rates_and_seeds_that_the_study_does_not_name_are_left_out(study: Study) -> None:
    for rate, seed in ((0.003, 0), (0.003, 1), (0.01, 0), (0.01, 1), (0.003, 7), (10.0, 0)):
        finish_in_turn(study, Trial("final", "ours", rate, seed), 2.0, 3.0)
    (found,) = curves_of(final_runs(study))
    assert (found.rates, found.seeds) == ([0.003, 0.01], [0, 1])


def test_an_entry_without_a_run_has_no_curve(study: Study) -> None:
    assert curves_of(final_runs(study)) == []
    finish_in_turn(study, Trial("final", "ours", 0.01, 0), None, 3.0)
    assert curves_of(final_runs(study)) == []


def test_runs_on_other_questions_are_not_compared(study: Study) -> None:
    finish_in_turn(study, Trial("final", "ours", 0.01, 0), 1.0, 3.0)
    finish_in_turn(study, Trial("final", "ours", 0.03, 0), 1.0, 3.0, sha256="another")
    with pytest.raises(DataError, match="different questions"):
        curves_of(final_runs(study))


def test_resampling_counts_questions_with_their_tokens() -> None:
    losses = Losses(np.array([[[1.0, 6.0]], [[2.0, 9.0]]]), np.array([1.0, 3.0]))
    assert losses.mean() == pytest.approx([7 / 4, 11 / 4])
    assert losses.resampled(np.array([[1, 1], [2, 0], [0, 2]])) == pytest.approx(
        np.array([[7 / 4, 11 / 4], [1, 2], [2, 3]])
    )
