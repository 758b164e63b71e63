"""Runs what a study's file asks for and its folder lacks. Any number of processes may do so at once, on this machine or
others that share the folder: what is next is read from the folder, and whoever locks a run's folder does that run."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from smoa.errors import ConfigError, SmoaError
from smoa_lab.config.run import RunConfig
from smoa_lab.pages.tables import score_text
from smoa_lab.study.finished import read_finished
from smoa_lab.study.jobs import at_most_left, needless, next_jobs
from smoa_lab.study.metrics import Metrics, loss_of, scores_of
from smoa_lab.study.report import report
from smoa_lab.study.study import Job, load_study
from smoa_lab.training.run_folder import OfAnother, RunFolder, Taken
from smoa_lab.training.train import run, score_untouched
from smoa_lab.training.trainer import Diverged

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""How long a process that finds no free job waits before it looks again."""
Failed = dict[str, str]
"""The errors that ended entries, by entry."""


def work(file: Path, only: Sequence[str] = (), deadline: float = math.inf, workers: int = 1) -> Failed:
    """Run a study's jobs until none is left, or the time is past the ``deadline``, and report after each. Returns what
    ended entries, whose other jobs are left out; ``workers`` at once do so, by which the time that is left is told."""
    study, failed, took = load_study(file), Failed(), list[float]()
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
                took.append(time.monotonic() - began)
                left = at_most_left(study, read_finished(study), only, failed) * fmean(took) / workers
                _log(job, metrics, took[-1], max(0.0, min(left, deadline - time.time())))
                if study.seeds:
                    report(study, failed)
                break
        else:
            time.sleep(POLL_SECONDS)
    logger.info("The time is used, and nothing more starts")
    return failed


def perform(job: Job, config: RunConfig) -> Metrics | None:
    """Run a job in this process; None where another process runs it, or has just finished it."""
    folder = RunFolder(config.folder)
    try:
        return score_untouched(config) if job.is_untouched else run(config)
    except Diverged as error:
        logger.warning("%s: %s", job.name, error)
        with folder.alone():
            return error.finish()
    except Taken:
        return None
    except SmoaError:
        if folder.finished:  # by another process, or but for a score, which is computed whenever rows are read
            return None
        raise


def _log(job: Job, metrics: Metrics, took: float, left: float) -> None:
    """Say what a finished job reached; raises ConfigError where the base model has no loss to compare with."""
    scores, metric, loss = scores_of(metrics), metrics["config"]["data"]["metric"], loss_of(metrics)
    if job.is_untouched and loss is None and metric is None:
        raise ConfigError("shared.model: the base model's loss is not finite; set model.dtype: float32")
    name = "accuracy" if metric == "choice" else str(metric)
    reached = f"{score_text(name, scores[name])}, " if scores.get(name) is not None else ""
    reached += "diverged" if loss is None else f"loss {loss:.4f}"
    logger.info("%s: %s (%s); at most %s left", job.name, reached, duration(took), duration(left))


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
