from __future__ import annotations

import random
from typing import Any

import pytest

from smoa_lab.study.plan import Job, Plan, Untouched, validation_loss
from smoa_lab.study.study_file import Study, Tuning
from smoa_lab.study.trials import Trial

BEST = {"ours": 0.1, "lora": 0.01, "full": 0.0003}


def outcome(job: Job) -> dict[str, Any]:
    """A result that is the better the nearer a trial's rate is to the best of its entry."""
    loss = 1.0 if isinstance(job, Untouched) else abs(job.learning_rate / BEST[job.entry] - 1)
    return {"questions": {"nll": [loss]}, "scores": {"all": {"gold_loss": loss}}}


def carried_out(study: Study, workers: int, seed: int) -> list[Job]:
    """The jobs in the order in which that many workers, of random speed, finish them."""
    plan, chance = Plan(study, list(study.entries)), random.Random(seed)
    running: list[Job] = []
    done: list[Job] = []
    while jobs := plan.ready():
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
@pytest.mark.parametrize("workers", [2, 3, 40])
def test_many_workers_run_the_very_trials_that_one_runs(study: Study, workers: int, refine: bool) -> None:
    study = study.model_copy(update={"tuning": Tuning(refine=refine)})
    wanted = carried_out(study, workers=1, seed=0)
    for seed in range(10):
        done = carried_out(study, workers, seed)
        assert len(done) == len(wanted)
        assert set(done) == set(wanted)


def test_an_entry_whose_search_is_over_waits_for_no_other(study: Study) -> None:
    plan = Plan(study, ["ours", "lora"])
    while trials := plan.search("lora"):
        plan.finish(trials[0], outcome(trials[0]))
    finals = [job for job in plan.ready() if isinstance(job, Trial) and job.stage == "final"]
    assert {job.entry for job in finals} == {"lora"}


def test_what_is_left_is_never_overestimated(study: Study) -> None:
    plan, jobs = Plan(study, list(study.entries)), carried_out(study, workers=1, seed=0)
    for number, job in enumerate(jobs):
        assert plan.at_least_left() <= len(jobs) - number
        plan.finish(job, outcome(job))
    assert plan.at_least_left() == 0


def test_a_plan_of_searches_has_no_final_runs(study: Study) -> None:
    plan = Plan(study, ["ours"], searches_only=True)
    jobs = plan.ready()
    assert {job.stage for job in jobs if isinstance(job, Trial)} == {"tuning"}
    assert plan.at_least_left() == len(jobs) == 3


def test_a_sweep_is_run_at_once(study: Study) -> None:
    study = study.model_copy(update={"tuning": Tuning(sweep=(0.01, 0.1))})
    rates = [trial.learning_rate for trial in Plan(study, ["ours"]).search("ours")]
    assert rates == [0.01, 0.02, 0.03, 0.06, 0.1]


def test_a_run_with_one_question_without_a_loss_has_diverged() -> None:
    scores = {"all": {"gold_loss": 1.5}}
    assert validation_loss({"questions": {"nll": [1.0, 2.0]}, "scores": scores}) == 1.5
    assert validation_loss({"questions": {"nll": [1.0, None]}, "scores": scores}) is None
