"""Runs a study: searches each entry's learning rate in the same way, then runs it with fresh seeds on the test part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study.crews.crew import Crew, Result, ThisProcess
from smoa_lab.study.plan import Job, Plan, Tuned, Untouched
from smoa_lab.study.runner import Part, Runner
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial, TrialStore

logger = logging.getLogger(__name__)


class Comparison:
    """Runs what is missing of a study; every finished run counts, and a killed one is run again or resumed."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.store = TrialStore(study.folder)
        self.bench: Runner = study.bench()
        self._configs: dict[str, dict[str, Any]] = {}

    def run(self, only: Sequence[str] = (), crew: Crew | None = None) -> None:
        """Tune all entries, or those that ``only`` names or whose budget it names, then the final runs.

        ``crew`` runs them, by default this process. Other processes may run the same study meanwhile.

        Raises:
            ConfigError: ``only`` names nothing of the study, or an entry's adapter does not fit the model.
            DataError: a package is missing.
        """
        self._carry_out(Plan(self.study, self.study.chosen(only)), crew or ThisProcess(self.perform))

    def tune(self, name: str) -> Tuned:
        """Search the learning rate of one entry on the validation part."""
        plan = Plan(self.study, [name], searches_only=True)
        self._carry_out(plan, ThisProcess(self.perform))
        return plan.found(name)

    def _carry_out(self, plan: Plan, crew: Crew) -> None:
        """Finish all jobs of the plan, whose entries are checked before the first that is run."""
        checked = False
        while jobs := plan.ready():
            job = None if crew.is_full else self._next(jobs, crew)
            if job is None:
                _note(plan, *crew.next_finished())
            elif self.store.find(job.name) is not None:
                _note(plan, job, self.perform(job))
            else:
                checked = checked or self._check_needs(plan.names)
                crew.start(job)

    def _check_needs(self, names: Sequence[str]) -> bool:
        for name in names:
            try:
                self.bench.check_needs(self.study.entries[name])
            except ConfigError as error:
                raise ConfigError(f"entries.{name}: {error}") from error
        return True

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
        config = self._untouched_config()
        return self.store.get("untouched", self._wanted(config), lambda work: self.bench.untouched(config, "test"))

    def stored_untouched(self) -> dict[str, Any] | None:
        """The same if it is stored; raises ConfigError if it was run with other settings than the study's."""
        return self.store.finished("untouched", self._wanted(self._untouched_config()))

    def _untouched_config(self) -> RunConfig:
        entries = list(self.study.entries.values())
        return self.bench.untouched_config(next((one for one in entries if one.method != "full"), entries[0]))

    def _wanted(self, config: RunConfig) -> dict[str, Any]:
        """What is stored of the untouched model's config, whatever the training: none took place."""
        wanted, found = self.bench.stored_config(config), self.store.find("untouched")
        return wanted if found is None else {**wanted, "training": found["config"]["training"]}

    def _trial(self, trial: Trial) -> dict[str, Any]:
        entry = self.study.entries[trial.entry]
        part: Part = "validation" if trial.stage == "tuning" else "test"
        run = partial(self.bench.run, entry, trial.learning_rate, trial.seed, part)
        config = self.bench.config(entry, trial.learning_rate, trial.seed)
        return self.store.get(trial.name, self.bench.stored_config(config), run)

    def stored(self, trial: Trial) -> dict[str, Any] | None:
        """A finished trial; raises ConfigError if it was run with other settings than the study's."""
        if trial.entry not in self._configs:
            entry = self.study.entries[trial.entry]
            self._configs[trial.entry] = self.bench.stored_config(self.bench.config(entry, entry.learning_rate, seed=0))
        config = self._configs[trial.entry]
        training = {**config["training"], "learning_rate": trial.learning_rate, "seed": trial.seed}
        return self.store.finished(trial.name, {**config, "training": training})


def stored_search(study: Study, name: str) -> Tuned | None:
    """What of an entry's search is finished, of the trials that the study as it is asks for; None before the first.

    Raises:
        ConfigError: one of them was run with other settings than the study's.
    """
    plan, comparison = Plan(study, [name]), Comparison(study)
    while known := {trial: found for trial in plan.search(name) if (found := comparison.stored(trial)) is not None}:
        for trial, found in known.items():
            plan.finish(trial, found)
    return plan.found(name) if plan.finished else None


def stored_finals(study: Study, name: str, is_shown: Callable[[float], bool]) -> list[dict[str, Any]]:
    """The final runs of an entry with the study's seeds, by name, at the learning rates for which ``is_shown`` is true.

    Raises:
        ConfigError: one of them was run with other settings than the study's.
    """
    comparison = Comparison(study)
    names = comparison.store.names(f"final/{name}/")
    trainings = [found["config"]["training"] for one in names if (found := comparison.store.find(one)) is not None]
    shown = [one for one in trainings if one["seed"] in study.seeds and is_shown(one["learning_rate"])]
    trials = [Trial("final", name, one["learning_rate"], one["seed"]) for one in shown]
    return [found for trial in trials if (found := comparison.stored(trial)) is not None]


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
