"""Reads a study and runs it: the same search of a learning rate for each entry, then fresh seeds on the test part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from filelock import Timeout

from smoa.errors import ConfigError
from smoa_lab.config.run import ConfigText, RunConfig
from smoa_lab.config.validation import block_problems
from smoa_lab.study.runner import Part, Runner
from smoa_lab.study.search import Tuned, first_index, nearest_index, next_indices, rate
from smoa_lab.study.study import Study
from smoa_lab.study.trials import Job, Result, Trial, TrialStore, Untouched

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""How long a process that finds no free job waits before it looks again."""


def load_study(path: str | Path, overrides: list[str] | None = None) -> Study:
    """Read a study, lay ``key.key=value`` overrides over it and check every entry's run.

    Raises:
        ConfigError: lists the problems of the study, and of each entry's run, before any work starts.
    """
    text = ConfigText.read(path, overrides)
    file = Path(path)
    values = {"folder": f"studies/{file.stem}", **text.values}
    text.refuse(block_problems(Study, values))
    study = Study.model_validate(values)
    for name, entry in study.entries.items():
        Runner(study.shared).config(entry, entry.learning_rate, seed=0, place=f"{file}: entries.{name}")
    return study


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
    """Runs what is missing of a study; every finished run counts, and a killed one is run again or resumed.

    Results choose jobs, and the order in which they come does not: many workers run the very trials that one runs.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.store = TrialStore(study.folder)
        self.runner = Runner(study.shared)
        self.finished: set[Job] = set()
        self._losses: dict[str, dict[int, float | None]] = {}
        self._configs: dict[str, dict[str, Any]] = {}

    def run(self, only: Sequence[str] = (), executor: Executor | None = None) -> None:
        """Tune all entries, or those that ``only`` names or whose budget it names, then the final runs.

        ``executor`` runs them, by default this process. Other processes may run the same study meanwhile. Entries are
        checked before the first job that is run.

        Raises:
            ConfigError: ``only`` names nothing of the study, or an entry's adapter does not fit the model.
        """
        names, checked = self.study.chosen(only), False
        executor = executor or Executor(partial(self.perform, waits=False))
        while jobs := self.ready(names):
            waiting = [job for job in jobs if job not in executor.running and not executor.is_full]
            free = (job for job in waiting if not self.store.is_running(job.name))
            job = next(free, waiting[0] if waiting else None)  # at last one that another process runs
            if job is not None and self.store.find(job.name) is None:
                checked = checked or self._check_needs(names)
                executor.start(job)
                continue
            try:
                job, result = executor.next_finished() if job is None else (job, self.perform(job))
            except Timeout:  # another process runs it, or took it at the same moment
                time.sleep(POLL_SECONDS)
                continue
            self.finish(job, result)
            scores, seconds = result["scores"]["all"], result.get("seconds")
            took = "" if seconds is None else f" ({seconds} s)"  # neither of a resumed run nor of the untouched model
            diverged = scores["gold_loss"] is None
            reached = "diverged" if diverged else f"loss {scores['gold_loss']:.4f}, accuracy {scores['accuracy']:.4f}"
            logger.info("%s: %s%s; %d left or more", job.name, reached, took, self.at_least_left(names))

    def tune(self, name: str) -> Tuned:
        """Search the learning rate of one entry on the validation part."""
        self._check_needs([name])
        while trials := self.search(name):
            self.finish(trials[0], self.perform(trials[0]))
        return self.tuned(name)

    def ready(self, names: Sequence[str]) -> list[Job]:
        """What can be run now: the untouched model, searches, one rate of all entries at a time, then final runs, one
        seed of all at a time."""
        turns = [
            (len(self._losses.get(name, {})) + turn, trial)
            for name in names
            for turn, trial in enumerate(self.search(name))
        ]
        searches = [trial for _, trial in sorted(turns, key=itemgetter(0))]
        rates = {name: self.tuned(name).learning_rate for name in names if not self.search(name)}
        finals = [Trial("final", name, value, seed) for seed in self.study.seeds for name, value in rates.items()]
        jobs: list[Job] = [Untouched(), *searches, *finals]
        return [job for job in jobs if job not in self.finished]

    def at_least_left(self, names: Sequence[str]) -> int:
        """Jobs that are not finished; of a search only those that it is sure to need."""
        return len(self.ready(names)) + sum(len(self.study.seeds) for name in names if self.search(name))

    def finish(self, job: Job, result: Result) -> None:
        """Note the JSON of a finished job."""
        self.finished.add(job)
        if isinstance(job, Trial) and job.stage == "tuning":
            diverged = any(nll is None for nll in result["questions"]["nll"])
            loss = None if diverged else result["scores"]["all"]["gold_loss"]
            self._losses.setdefault(job.entry, {})[nearest_index(job.learning_rate)] = loss

    def search(self, name: str) -> list[Trial]:
        """The trials that an entry's search needs next; none when it is over."""
        tuning, losses = self.study.tuning, self._losses.get(name, {})
        if tuning.max_runs == 0:
            return []
        start = first_index(self.study.entries[name].learning_rate)
        indices = next_indices(start, losses, tuning.max_runs, tuning.refine)
        return [Trial("tuning", name, rate(index), tuning.seed) for index in indices]

    def tuned(self, name: str) -> Tuned:
        """The outcome of an entry's search that is over."""
        if self.study.tuning.max_runs == 0:
            return Tuned({}, self.study.entries[name].learning_rate, interior=False)
        return Tuned.of(self._losses[name])

    def _check_needs(self, names: Sequence[str]) -> bool:
        for name in names:
            try:
                self.runner.check_needs(self.study.entries[name])
            except ConfigError as error:
                raise ConfigError(f"entries.{name}: {error}") from error
        return True

    def perform(self, job: Job, waits: bool = True) -> Result:
        """The finished job, run in this process unless it is stored already. Where another process runs it, that is
        waited for, or without ``waits`` a Timeout raised."""
        if isinstance(job, Untouched):
            config = self._untouched_config()
            return self.store.get(
                job.name, self._wanted(job), lambda work: self.runner.untouched(config, "test"), waits
            )
        entry = self.study.entries[job.entry]
        part: Part = "validation" if job.stage == "tuning" else "test"
        run = partial(self.runner.run, entry, job.learning_rate, job.seed, part)
        return self.store.get(job.name, self._wanted(job), run, waits)

    def stored(self, job: Job) -> Result | None:
        """A finished job; raises ConfigError if it was run with other settings than the study's."""
        return self.store.finished(job.name, self._wanted(job))

    def _wanted(self, job: Job) -> dict[str, Any]:
        """What is stored of a job's config. An entry's trials differ in rate and seed alone; of the untouched model any
        training will do, since none took place."""
        if isinstance(job, Untouched):
            wanted, stored = self._untouched_config().model_dump(mode="json"), self.store.find(job.name)
            return wanted if stored is None else {**wanted, "training": stored["config"]["training"]}
        if job.entry not in self._configs:
            entry = self.study.entries[job.entry]
            self._configs[job.entry] = self.runner.config(entry, entry.learning_rate, seed=0).model_dump(mode="json")
        config = self._configs[job.entry]
        return {**config, "training": {**config["training"], "learning_rate": job.learning_rate, "seed": job.seed}}

    def _untouched_config(self) -> RunConfig:
        entries = list(self.study.entries.values())
        return self.runner.untouched_config(next((entry for entry in entries if entry.method != "full"), entries[0]))

    def stored_search(self, name: str) -> Tuned | None:
        """What of an entry's search is finished, of the trials that the study as it is asks for; None before the first.

        Raises:
            ConfigError: one of them was run with other settings than the study's.
        """
        while known := {trial: run for trial in self.search(name) if (run := self.stored(trial)) is not None}:
            for trial, run in known.items():
                self.finish(trial, run)
        return self.tuned(name) if name in self._losses else None

    def stored_finals(self, name: str, learning_rate: float) -> dict[int, Result]:
        """The final runs of an entry at a learning rate, by their seeds, of those of the study.

        Raises:
            ConfigError: one of them was run with other settings than the study's.
        """
        trials = {seed: Trial("final", name, learning_rate, seed) for seed in self.study.seeds}
        return {seed: run for seed, trial in trials.items() if (run := self.stored(trial)) is not None}
