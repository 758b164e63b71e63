from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from operator import itemgetter

import pytest

from smoa_lab.study.comparison import Comparison
from smoa_lab.study.search import Tuned, first_index, nearest_index, next_indices, rate, sweep_of
from smoa_lab.study.study import Study, Tuning
from smoa_lab.study.trials import Job, Result, Trial, Untouched

BEST = {"ours": 0.1, "lora": 0.01, "full": 0.0003}


def search(
    losses: dict[int, float | None],
    start: int = -8,
    max_runs: int = 6,
    refine: bool = False,
    pick: Callable[[list[int]], int] = itemgetter(0),
) -> dict[int, float | None]:
    """Every index that the walk visits, with the loss there; ``pick`` says which of those needed is next."""
    visited: dict[int, float | None] = {}
    while indices := next_indices(start, visited, max_runs, refine):
        index = pick(indices)
        visited[index] = losses.get(index, 9.0)
    return visited


def valley(best: float) -> dict[int, float | None]:
    return {index: abs(index - best) for index in range(-18, 6)}


def test_the_grid_is_quarter_decades_and_a_search_starts_on_half_ones() -> None:
    assert [rate(index) for index in range(-12, -6)] == [1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2]
    assert [nearest_index(rate(index)) for index in range(-12, 12)] == list(range(-12, 12))
    assert [first_index(rate) for rate in (1e-3, 3e-3, 0.012, 0.03)] == [-12, -10, -8, -6]


def test_the_search_walks_downhill_until_the_best_is_inside() -> None:
    assert list(search({-8: 1.0})) == [-8, -10, -6]
    for best in (-14, -2):
        tuned = Tuned.of(search(valley(best)))
        assert (tuned.learning_rate, tuned.interior) == (rate(best), True)


def test_the_search_ends_when_its_runs_are_spent_and_a_finer_one_spends_two_more() -> None:
    downhill: dict[int, float | None] = {index: -float(index) for index in range(-18, 18)}
    visited = search(downhill, max_runs=4)
    assert len(visited) == 4
    assert not Tuned.of(visited).interior
    assert len(search(downhill, max_runs=4, refine=True)) == 6


def test_a_diverged_run_is_never_the_best() -> None:
    visited = search({-10: 2.0, -8: None, -6: None})
    assert Tuned.of(visited).learning_rate == rate(-10)
    assert -12 in visited


@pytest.mark.parametrize("best", [-9, -8, -7])
def test_a_finer_search_tries_both_sides_of_the_best_half_decade(best: int) -> None:
    visited = search(valley(best + 0.1), refine=True)
    halves = {index: loss for index, loss in visited.items() if index % 2 == 0}
    middle = nearest_index(Tuned.of(halves).learning_rate)
    assert sorted(set(visited) - set(halves)) == [middle - 1, middle + 1]
    assert Tuned.of(visited).learning_rate == rate(best)


def test_a_search_visits_the_same_rates_in_whatever_order_results_come() -> None:
    for best, max_runs in product(range(-16, 2), (3, 8)):
        losses = valley(best + 0.1)
        wanted = search(losses, -8, max_runs, refine=True)
        for seed in range(5):
            assert search(losses, -8, max_runs, True, random.Random(seed).choice) == wanted


def outcome(job: Job) -> Result:
    """A result that is the better the nearer a trial's rate is to the best of its entry."""
    loss = 1.0 if isinstance(job, Untouched) else abs(job.learning_rate / BEST[job.entry] - 1)
    return {"questions": {"nll": [loss]}, "scores": {"all": {"gold_loss": loss}}}


def carried_out(study: Study, workers: int, seed: int) -> list[Job]:
    """The jobs in the order in which that many workers, of random speed, finish them."""
    plan, names, chance = Comparison(study), list(study.entries), random.Random(seed)
    running: list[Job] = []
    done: list[Job] = []
    while jobs := plan.ready(names):
        running += [job for job in jobs if job not in running][: workers - len(running)]
        done.append(running.pop(chance.randrange(len(running))))
        plan.finish(done[-1], outcome(done[-1]))
    return done


def test_one_worker_searches_first_and_then_runs_one_seed_of_all_entries_after_another(study: Study) -> None:
    done = carried_out(study, workers=1, seed=0)
    assert done[0] == Untouched()
    finals = [job for job in done if isinstance(job, Trial) and job.stage == "final"]
    assert done[-len(finals) :] == finals
    assert [(job.entry, job.seed) for job in finals] == [(name, seed) for seed in (0, 1, 2) for name in BEST]


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("workers", [2, 40])
def test_many_workers_run_the_very_trials_that_one_runs(study: Study, workers: int, refine: bool) -> None:
    study = study.model_copy(update={"tuning": Tuning(refine=refine)})
    wanted = carried_out(study, workers=1, seed=0)
    for seed in range(3):
        done = carried_out(study, workers, seed)
        assert len(done) == len(wanted)
        assert set(done) == set(wanted)


def test_an_entry_whose_search_is_over_waits_for_no_other(study: Study) -> None:
    plan = Comparison(study)
    while trials := plan.search("lora"):
        plan.finish(trials[0], outcome(trials[0]))
    finals = [job for job in plan.ready(["ours", "lora"]) if isinstance(job, Trial) and job.stage == "final"]
    assert {job.entry for job in finals} == {"lora"}


def test_what_is_left_is_never_overestimated(study: Study) -> None:
    plan, names, jobs = Comparison(study), list(study.entries), carried_out(study, workers=1, seed=0)
    for number, job in enumerate(jobs):
        assert plan.at_least_left(names) <= len(jobs) - number
        plan.finish(job, outcome(job))
    assert plan.at_least_left(names) == 0


def test_a_sweep_is_run_at_once(study: Study) -> None:
    plan = Comparison(study.model_copy(update={"tuning": Tuning(sweep=(0.01, 0.1))}))
    assert [trial.learning_rate for trial in plan.search("ours")] == [0.01, 0.02, 0.03, 0.06, 0.1]
    assert plan.ready(["ours"]) == [Untouched(), *plan.search("ours")]
    halves = plan.study.model_copy(update={"tuning": Tuning(sweep=(0.001, 0.03), per_decade=2)})
    assert [rate(index) for index in sweep_of(halves, "ours")] == [1e-3, 3e-3, 1e-2, 3e-2]


def test_a_run_with_one_question_without_a_loss_has_diverged(study: Study) -> None:
    study = study.model_copy(update={"tuning": Tuning(sweep=(0.01, 0.03))})
    plan = Comparison(study)
    for trial, nll in zip(plan.search("ours"), ([1.0, None], [1.0, 2.0], [3.0, 2.0]), strict=True):
        plan.finish(trial, {"questions": {"nll": nll}, "scores": {"all": {"gold_loss": 1.5}}})
    assert plan.tuned("ours") == Tuned({0.01: None, 0.02: 1.5, 0.03: 1.5}, 0.02, interior=True)
