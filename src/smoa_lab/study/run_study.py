"""Runs what a study's file asks for and its folder lacks: by this process, by several of this machine, or on a cluster
by Ray; and fits a study into minutes.

Any number of processes may run a study at once, on machines that share its folder: each reads from the folder what
comes next, and the one that locks a run's folder does that run. None hands out jobs, and a process that dies takes only
its own run with it.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.basics.settings import TRUSTED
from smoa_lab.config.run import RunConfig
from smoa_lab.pages.tables import score_text
from smoa_lab.study.finished import (
    Finished,
    Metrics,
    Run,
    chosen,
    done,
    finals,
    loss_of,
    read_finished,
    scores_of,
    search,
    searched,
)
from smoa_lab.study.report import report
from smoa_lab.study.study import Job, Stage, Study, edit, load_study
from smoa_lab.study.verdict import verdict
from smoa_lab.training.run_folder import OfAnother, RunFolder, Taken
from smoa_lab.training.train import run, score_untouched, time_steps

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""How long a process that finds no free job waits before it looks again."""
TIMED, TIMED_SECONDS = 5, 30.0
"""Steps of each entry that are timed, at most for so many seconds after the first."""
LEAST_STEPS, FIRST_ROUNDS, LEAST_ROUNDS = 30, 3, 2
"""Steps below which fewer rounds are planned instead, since fewer hardly tell one rate from another; rounds that come
before more steps; and those without which there is no comparison."""
SEARCH_RUNS, MARGIN, OF_FINAL = 4, 1.15, 1.5
"""Runs that a search takes on average, rounded up. How much longer a study is taken to last than what was timed: two
rounds of three then fit even where all searches take six runs. What a final run takes beside its steps, in times of
scoring the base model: it also scores general text twice."""
Failed = dict[str, str]
"""The errors that ended entries, by entry."""


def work(file: Path, only: Sequence[str] = (), deadline: float = math.inf) -> Failed:
    """Run a study's jobs until none is left, or the time is past the ``deadline``, and report after each. Returns what
    ended entries, whose other jobs are left out."""
    study, failed = load_study(file), Failed()
    while time.time() < deadline:
        finished = read_finished(study)
        for each in needless(study, finished):
            shutil.rmtree(each.folder.adapter, ignore_errors=True)
        if not (jobs := next_jobs(study, finished, only, failed)):
            return failed
        for job in jobs:
            began = time.monotonic()
            try:
                metrics = perform(job, study.config(job))
            except OfAnother:
                raise
            except Exception as error:  # of this entry, such as too little memory; the others go on
                if job.is_untouched or len(failed) + 1 == len(study.entries):
                    raise
                failed[job.entry] = str(error) if isinstance(error, SmoaError) else f"{type(error).__name__}: {error}"
                logger.error("%s: %s", job.name, failed[job.entry])
                break
            if metrics is not None:
                _log(job, metrics, time.monotonic() - began)
                if study.seeds:
                    report(study, failed)
                break
        else:
            time.sleep(POLL_SECONDS)
    logger.info("The time is used, and nothing more starts")
    return failed


def perform(job: Job, config: RunConfig) -> Metrics | None:
    """Run a job in this process; None where another process runs it, or has just finished it."""
    try:
        return score_untouched(config) if job.is_untouched else run(config, may_diverge=True)
    except Taken:
        return None
    except SmoaError:
        if RunFolder(config.folder).finished:  # by another process, meanwhile
            return None
        raise


def _log(job: Job, metrics: Metrics, took: float) -> None:
    """Say what a finished job reached; raises ConfigError where the base model has no loss to compare with."""
    scores, metric, loss = scores_of(metrics), metrics["config"]["data"]["metric"], loss_of(metrics)
    if job.is_untouched and loss is None and metric is None:
        raise ConfigError("shared.model: the base model's loss is not finite; set model.dtype: float32")
    name = "accuracy" if metric == "choice" else str(metric)
    reached = f"{score_text(name, scores[name])}, " if scores.get(name) is not None else ""
    reached += "diverged" if loss is None else f"loss {loss:.4f}"
    logger.info("%s: %s (%s)", job.name, reached, duration(took))


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def next_jobs(study: Study, finished: Finished, only: Sequence[str] = (), failed: Collection[str] = ()) -> list[Job]:
    """What can be run now: the base model and searches, one rate of all entries at a time; then final runs of entries
    whose rates are chosen, one seed of all at a time, but of budgets that have their answer. Results choose jobs, and
    the order in which they come does not. What ``failed`` is left out."""
    names, searches = [name for name in study.chosen(only) if name not in failed], bool(study.tuning.max_runs)
    bases = [study.untouched("untouched")] * bool(study.seeds) + [study.untouched("untouched-validation")] * searches
    jobs = [job for job in bases if done(study, finished, job) is None]
    turns = list[tuple[int, Job]]()
    for name in names if searches else ():
        losses, missing = search(study, finished, name)
        turns += enumerate(missing, start=len(losses))
    jobs += [job for _, job in sorted(turns, key=itemgetter(0))]
    answered = {name for one in verdict(study, finished, failed).values() if one.is_answered for name in one.entries}
    runs = {name: finals(study, finished, name) for name in names if name not in answered}
    rates = {name: rate for name in runs if (rate := chosen(study, finished, name)) is not None}
    for seed in study.seeds:
        jobs += [Job("final", name, rates[name].learning_rate, seed) for name in rates if seed not in runs[name]]
    return list(dict.fromkeys(jobs))


def needless(study: Study, finished: Finished) -> list[Run]:
    """The runs whose adapters the study does not keep: those of searches, where final runs follow, and by ``keep`` all
    but the best of what an entry is known by."""
    found = list[Run]()
    for name in study.entries:
        searches = searched(study, finished, name)
        found += searches if study.seeds else []
        runs = [*finals(study, finished, name).values()] if study.seeds else searches
        if runs and study.keep != "all":
            best = min(runs, key=lambda run: run.lost)
            found += [run for run in runs if study.keep == "none" or run is not best]
    return found


@dataclass(frozen=True)
class Worker:
    """What one process does, from the folder and with the trust of the process that starts it: jobs of a study with so
    many ``threads``, and with one of the ``gpus`` of this machine, if there are any."""

    file: Path
    only: Sequence[str]
    deadline: float
    threads: int
    gpus: Sequence[str] = ()
    home: Path = field(default_factory=Path.cwd)
    trusted: Mapping[str, Any] = field(default_factory=lambda: dict(vars(TRUSTED)))


def _work(worker: Worker, place: int) -> Failed:
    os.chdir(worker.home)
    vars(TRUSTED).update(worker.trusted)
    if worker.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = worker.gpus[place % len(worker.gpus)]
    torch.set_num_threads(worker.threads)
    disable_progress_bar()
    shown, own = logging.StreamHandler(), logging.getLogger("smoa_lab.study")
    shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    own.handlers, own.level = [shown], logging.INFO
    return work(worker.file, worker.only, worker.deadline)


def work_side_by_side(file: Path, only: Sequence[str], deadline: float, workers: int) -> Failed:
    """Run a study's jobs by several processes of this machine, each with its part of the cores and, where there are
    GPUs, with one."""
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = visible or [str(gpu) for gpu in range(torch.cuda.device_count())]
    worker = Worker(file, only, deadline, max(1, (os.cpu_count() or 1) // workers), gpus)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            return _together(list(pool.map(partial(_work, worker), range(workers))))
        except BrokenProcessPool as error:
            raise DataError(f"{file.parent}: a worker died; if memory ran out, give fewer --workers") from error


def work_on_ray(file: Path, only: Sequence[str], deadline: float, workers: int, address: str) -> Failed:
    """Run a study's jobs by tasks on the Ray cluster at ``address``, whose machines share the folder. Each has its part
    of the cores and, where the cluster has GPUs, one of its own."""
    ray: Any = import_module("ray")  # an extra
    ray.init(address, log_to_driver=False)
    resources = ray.cluster_resources()
    threads = max(1, int(resources["CPU"]) // workers)
    worker = Worker(file, only, deadline, threads)
    task = ray.remote(_work).options(num_cpus=threads, num_gpus=int("GPU" in resources))
    try:
        return _together(ray.get([task.remote(worker, place) for place in range(workers)]))
    except ray.exceptions.RayError as error:  # whose text has the traceback of another machine, its cause has not
        raise DataError(f"{file.parent}: a worker failed: {getattr(error, 'cause', error)}") from error


def _together(found: Sequence[Failed]) -> Failed:
    return {name: error for failed in found for name, error in failed.items()}


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
        step += time_steps(config, TIMED, limit)
        shutil.rmtree(place, ignore_errors=True)
    return Timed(step, search, final, SEARCH_RUNS if study.tuning.max_runs else 0, workers)
