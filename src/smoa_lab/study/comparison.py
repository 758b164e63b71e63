"""Runs a study: searches each entry's learning rate in the same way, then runs it with fresh seeds on the test part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study.runner import Part, Runner
from smoa_lab.study.search import Job, Plan, Result, Tuned, Untouched
from smoa_lab.study.study import Study
from smoa_lab.study.study_file import runner_of
from smoa_lab.study.trials import Trial, TrialStore

logger = logging.getLogger(__name__)


class Executor:
    """Runs one job at a time by ``perform``, when its result is asked for."""

    running: dict[Job, Any]
    """The jobs that were started and are not given back yet."""

    def __init__(self, perform: Callable[[Job], Result]) -> None:
        self.perform = perform
        self.running = {}

    @property
    def is_full(self) -> bool:
        """Whether no other job can be started now."""
        return bool(self.running)

    def start(self, job: Job) -> None:
        """Take a job."""
        self.running[job] = None

    def next_finished(self) -> tuple[Job, Result]:
        """Wait for one of the running jobs; raises what that job raised."""
        job, _ = self.running.popitem()
        return job, self.perform(job)


class Comparison:
    """Runs what is missing of a study; every finished run counts, and a killed one is run again or resumed."""

    def __init__(self, study: Study, runner: Runner | None = None) -> None:
        self.study = study
        self.store = TrialStore(study.folder)
        self.runner = runner or runner_of(study)
        self._configs: dict[str, dict[str, Any]] = {}

    def run(self, only: Sequence[str] = (), executor: Executor | None = None) -> None:
        """Tune all entries, or those that ``only`` names or whose budget it names, then the final runs.

        ``executor`` runs them, by default this process. Other processes may run the same study meanwhile.

        Raises:
            ConfigError: ``only`` names nothing of the study, or an entry's adapter does not fit the model.
            DataError: a package is missing.
        """
        self._carry_out(Plan(self.study, self.study.chosen(only)), executor or Executor(self.perform))

    def tune(self, name: str) -> Tuned:
        """Search the learning rate of one entry on the validation part."""
        plan = Plan(self.study, [name], searches_only=True)
        self._carry_out(plan, Executor(self.perform))
        return plan.tuned(name)

    def _carry_out(self, plan: Plan, executor: Executor) -> None:
        """Finish all jobs of the plan, whose entries are checked before the first that is run."""
        checked = False
        while jobs := plan.ready():
            job = None if executor.is_full else self._next(jobs, executor)
            if job is None:
                _note(plan, *executor.next_finished())
            elif self.store.find(job.name) is not None:
                _note(plan, job, self.perform(job))
            else:
                if not checked:
                    self._check_needs(plan.names)
                    checked = True
                executor.start(job)

    def _check_needs(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self.runner.check_needs(self.study.entries[name])
            except ConfigError as error:
                raise ConfigError(f"entries.{name}: {error}") from error

    def _next(self, jobs: Sequence[Job], executor: Executor) -> Job | None:
        """The first job that nobody runs, or else the first that another process runs, to wait for its result."""
        waiting = [job for job in jobs if job not in executor.running]
        free = (job for job in waiting if not self.store.is_running(job.name))
        return next(free, waiting[0] if waiting else None)

    def perform(self, job: Job) -> Result:
        """The finished job, run in this process unless it is stored already."""
        if isinstance(job, Untouched):
            config = self._untouched_config()
            return self.store.get(job.name, self._wanted(config), lambda work: self.runner.untouched(config, "test"))
        entry = self.study.entries[job.entry]
        part: Part = "validation" if job.stage == "tuning" else "test"
        return self.store.get(
            job.name,
            self._stored_config(job),
            lambda work: self.runner.run(entry, job.learning_rate, job.seed, part, work),
        )

    def stored(self, job: Job) -> Result | None:
        """A finished job; raises ConfigError if it was run with other settings than the study's."""
        if isinstance(job, Untouched):
            return self.store.finished(job.name, self._wanted(self._untouched_config()))
        return self.store.finished(job.name, self._stored_config(job))

    def _stored_config(self, trial: Trial) -> dict[str, Any]:
        """What is stored of a trial's config. An entry's trials differ in rate and seed alone."""
        if trial.entry not in self._configs:
            entry = self.study.entries[trial.entry]
            known = self.runner.config(entry, entry.learning_rate, seed=0)
            self._configs[trial.entry] = self.runner.stored_config(known)
        config = self._configs[trial.entry]
        training = {**config["training"], "learning_rate": trial.learning_rate, "seed": trial.seed}
        return {**config, "training": training}

    def _untouched_config(self) -> RunConfig:
        entries = list(self.study.entries.values())
        return self.runner.untouched_config(next((entry for entry in entries if entry.method != "full"), entries[0]))

    def _wanted(self, config: RunConfig) -> dict[str, Any]:
        """What is stored of the untouched model's config, whatever the training: none took place."""
        wanted, stored = self.runner.stored_config(config), self.store.find("untouched")
        return wanted if stored is None else {**wanted, "training": stored["config"]["training"]}

    def stored_search(self, name: str) -> Tuned | None:
        """What of an entry's search is finished, of the trials that the study as it is asks for; None before the first.

        Raises:
            ConfigError: one of them was run with other settings than the study's.
        """
        plan = Plan(self.study, [name])
        while known := {trial: run for trial in plan.search(name) if (run := self.stored(trial)) is not None}:
            for trial, run in known.items():
                plan.finish(trial, run)
        return plan.tuned(name) if plan.finished else None

    def stored_finals(self, name: str, is_shown: Callable[[float], bool] = lambda rate: True) -> list[Result]:
        """The final runs of an entry with the study's seeds, by name, at the learning rates for which ``is_shown`` is
        true.

        Raises:
            ConfigError: one of them was run with other settings than the study's.
        """
        runs = [self.store.find(run) or {} for run in self.store.names(f"final/{name}/")]
        trainings = [run["config"]["training"] for run in runs]
        shown = [each for each in trainings if each["seed"] in self.study.seeds and is_shown(each["learning_rate"])]
        trials = [Trial("final", name, each["learning_rate"], each["seed"]) for each in shown]
        return [run for trial in trials if (run := self.stored(trial)) is not None]


def _note(plan: Plan, job: Job, result: Result) -> None:
    plan.finish(job, result)
    scores, seconds = result["scores"]["all"], result.get("seconds")
    took = "" if seconds is None else f" ({seconds} s)"  # neither of a resumed run nor of the untouched model
    diverged = scores["gold_loss"] is None
    reached = "diverged" if diverged else f"loss {scores['gold_loss']:.4f}, accuracy {scores['accuracy']:.4f}"
    logger.info("%s: %s%s; %d left or more", job.name, reached, took, plan.at_least_left())
