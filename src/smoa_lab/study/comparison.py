"""Runs a study: searches each entry's learning rate in the same way, then runs it with fresh seeds on the test part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from smoa_lab.study.benches.bench import Bench, Part
from smoa_lab.study.crews.crew import Crew, Result, ThisProcess
from smoa_lab.study.plan import Job, Plan, Tuned, Untouched
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Stage, Trial, TrialStore

logger = logging.getLogger(__name__)


class Comparison:
    """Runs what is missing of a study; every finished run counts, and a killed one is run again or resumed."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.store = TrialStore(study.folder)
        self.bench: Bench = study.bench()

    def run(self, only: Sequence[str] = (), crew: Crew | None = None) -> None:
        """Tune all entries, or those that ``only`` names or whose budget it names, then the final runs.

        ``crew`` runs them, by default this process. Other processes may run the same study meanwhile.

        Raises:
            ConfigError: ``only`` names nothing of the study.
            DataError: a package is missing.
        """
        plan = Plan(self.study, self.study.chosen(only))
        for name in plan.names:
            self.bench.check_needs(self.study.entries[name])
        self._carry_out(plan, crew or ThisProcess(self.perform))

    def tune(self, name: str) -> Tuned:
        """Search the learning rate of one entry on the validation part."""
        plan = Plan(self.study, [name], searches_only=True)
        self._carry_out(plan, ThisProcess(self.perform))
        return plan.found(name)

    def _carry_out(self, plan: Plan, crew: Crew) -> None:
        """Finish all jobs of the plan."""
        while jobs := plan.ready():
            job = None if crew.is_full else self._next(jobs, crew)
            if job is None:
                _note(plan, *crew.next_finished())
            elif self.store.find(job.name) is not None:
                _note(plan, job, self.perform(job))
            else:
                crew.start(job)

    def _next(self, jobs: Sequence[Job], crew: Crew) -> Job | None:
        """The first job that nobody runs, or else the first that another process runs, to wait for its result."""
        waiting = [job for job in jobs if job not in crew.running]
        free = (job for job in waiting if not self.store.is_running(job.name))
        return next(free, waiting[0] if waiting else None)

    def perform(self, job: Job) -> Result:
        """The finished job, run in this process unless it is stored already."""
        return self.untouched() if isinstance(job, Untouched) else self._trial(job)

    def untouched(self) -> dict[str, Any]:
        """The model as it is, on the test part."""
        entries = list(self.study.entries.values())
        lender = next((entry for entry in entries if entry.method != "full"), entries[0])
        config = self.bench.untouched_config(lender)
        wanted = self.bench.stored_config(config)
        found = self.store.find("untouched")
        if found is not None:
            wanted["training"] = found["config"]["training"]  # none took place
        return self.store.get("untouched", wanted, lambda work: self.bench.untouched(config, "test"))

    def _trial(self, trial: Trial) -> dict[str, Any]:
        entry = self.study.entries[trial.entry]
        part: Part = "validation" if trial.stage == "tuning" else "test"
        run = partial(self.bench.run, entry, trial.learning_rate, trial.seed, part)
        config = self.bench.config(entry, trial.learning_rate, trial.seed)
        return self.store.get(trial.name, self.bench.stored_config(config), run)


def stored_search(study: Study, name: str) -> Tuned | None:
    """What of an entry's search is finished, of the trials that the study as it is asks for; None before the first."""
    plan, store = Plan(study, [name]), TrialStore(study.folder)
    while known := {trial: found for trial in plan.search(name) if (found := store.find(trial.name)) is not None}:
        for trial, found in known.items():
            plan.finish(trial, found)
    return plan.found(name) if plan.finished else None


def stored(study: Study, stage: Stage, name: str) -> list[dict[str, Any]]:
    """The finished trials of an entry, by name."""
    store = TrialStore(study.folder)
    return [found for one in store.names(f"{stage}/{name}/") if (found := store.find(one)) is not None]


def _note(plan: Plan, job: Job, result: Result) -> None:
    plan.finish(job, result)
    logger.info("%s: %s; %d left or more", job.name, _summary(result), plan.at_least_left())


def _summary(result: dict[str, Any]) -> str:
    scores = result["scores"]["all"]
    seconds = result.get("seconds")  # neither of a resumed run nor of the untouched model
    took = "" if seconds is None else f" ({seconds} s)"
    if scores["gold_loss"] is None:
        return f"diverged{took}"
    return f"loss {scores['gold_loss']:.4f}, accuracy {scores['accuracy']:.4f}{took}"
