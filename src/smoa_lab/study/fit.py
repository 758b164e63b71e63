"""Fits a study into minutes: how many steps its runs take, and how many rounds, are written into its file."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from smoa.errors import ConfigError
from smoa_lab.study.run_study import duration, perform
from smoa_lab.study.study import Job, Stage, Study, edit, load_study
from smoa_lab.training.train import time_steps

logger = logging.getLogger(__name__)
TIMED, TIMED_SECONDS = 5, 30.0
"""Steps of each entry that are timed, at most for so many seconds after the first."""
LEAST_STEPS, FIRST_ROUNDS, LEAST_ROUNDS = 30, 3, 2
"""Steps below which fewer rounds are planned instead, since fewer hardly tell one rate from another; rounds that come
before more steps; and those without which there is no comparison."""
SEARCH_RUNS, MARGIN, OF_FINAL = 4, 1.15, 1.5
"""Runs that a search takes on average, rounded up. How much longer a study is taken to last than what was timed: two
rounds of three then fit even where all searches take six runs. What a final run takes beside its steps, in times of
scoring the base model: it also scores general text twice."""


@dataclass(frozen=True)
class Timed:
    """Seconds of all entries together: of a step, of a search's run beside its steps, and of a final one."""

    step: float
    search: float
    final: float
    runs_of_search: int
    workers: int

    def lasts(self, rounds: int, steps: int) -> float:
        """About how long the study takes."""
        whole = self.runs_of_search * (self.search + steps * self.step)
        whole += rounds * (OF_FINAL * self.final + steps * self.step)
        return MARGIN * whole / self.workers


def fit(file: Path, seconds: float, workers: int = 1) -> None:
    """Time a few steps of each entry, score the base model, and write into a study's file the most steps and rounds
    for which ``seconds`` are enough. Raises ConfigError where these are too few for the smallest comparison."""
    study, began = load_study(file), time.monotonic()
    most = (study.shared.get("training") or {}).get("max_steps", 0)
    if most < 1:
        raise ConfigError("--minutes: shared.training.max_steps says how many steps a run takes at most; give it")
    timed, least = _time(study, seconds, workers), min(LEAST_STEPS, most)
    seconds -= time.monotonic() - began
    if (needed := timed.lasts(LEAST_ROUNDS, least)) > seconds:
        told = f"the smallest comparison takes {duration(needed)}, and {duration(max(0.0, seconds))} are left"
        raise ConfigError(f"--minutes: {told}; give more, or fewer --methods")
    more = (n for n in range(study.planned, LEAST_ROUNDS, -1))
    rounds = next((n for n in more if timed.lasts(n, least if n <= FIRST_ROUNDS else most) <= seconds), LEAST_ROUNDS)
    steps = max(n for n in range(least, most + 1) if n == least or timed.lasts(rounds, n) <= seconds)
    edit(file, [f"shared.training.max_steps={steps}", f"seeds={study.seeds[:rounds]}"])
    logger.info("%d steps a run, %d rounds: about %s", steps, rounds, duration(timed.lasts(rounds, steps)))


def _time(study: Study, seconds: float, workers: int) -> Timed:
    """Score the base model and take a few steps of each entry, in a small part of the ``seconds``. What loading takes
    counts as what a run takes beside its steps."""
    entries, step = len(study.entries), 0.0

    def score(stage: Stage) -> float:
        job = study.untouched(stage)
        shutil.rmtree(study.folder / job.name, ignore_errors=True)  # of a start that was interrupted
        since = time.monotonic()
        perform(job, study.config(job))
        return entries * (time.monotonic() - since)

    search, final = score("untouched-validation"), score("untouched")
    limit, place = min(TIMED_SECONDS, seconds / 20 / entries), study.folder / "timing"
    for name, entry in study.entries.items():
        config = study.config(Job("search", name, entry.learning_rate, study.tuning.seed))
        config = config.model_copy(update={"training": {**config.training, "output_dir": str(place)}})
        took = time_steps(config, TIMED, limit)
        shutil.rmtree(place, ignore_errors=True)
        step += fmean(took[1:] or took)  # the first one is slower
    return Timed(step, search, final, SEARCH_RUNS if study.tuning.max_runs else 0, workers)
