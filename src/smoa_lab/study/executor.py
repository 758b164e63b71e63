"""Runs the jobs of a study, one at a time."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import AbstractContextManager
from typing import Any

from smoa.errors import ConfigError
from smoa_lab.config.run import RunConfig
from smoa_lab.study.metrics import read_metrics
from smoa_lab.study.plan import Metrics
from smoa_lab.study.study import Job
from smoa_lab.training.guards import Diverged
from smoa_lab.training.run_folder import RunFolder, Taken
from smoa_lab.training.train import run, score_untouched, time_steps

logger = logging.getLogger(__name__)
TIMED, TIMED_SECONDS = 5, 30.0
"""Steps of each entry that are timed, at most for so many seconds after the first two, and all for about a
twentieth of --minutes."""


def perform(job: Job, config: RunConfig, timed: float = TIMED_SECONDS) -> Metrics | None:
    """Run a job in this process; a step that is ``timed`` is no longer followed by others. Its metrics get
    ``wall_seconds``; None where another process runs it."""
    folder, started = RunFolder(config.folder), time.perf_counter()
    if job.stage == "timing":
        return {**time_steps(config, TIMED, timed), "machine": socket.gethostname()}
    try:
        metrics = score_untouched(config) if job.is_untouched else run(config)
    except Diverged as error:
        logger.warning("%s: %s", job.name, error)
        with folder.alone():
            metrics = error.finish()
    except Taken:
        return None
    except ConfigError:
        if not folder.finished:  # else another process finished it a moment ago
            raise
        metrics = read_metrics(folder)
    return {**metrics, "wall_seconds": time.perf_counter() - started}


class Executor(AbstractContextManager["Executor"]):
    """Runs one job at a time, when its result is asked for."""

    workers = 1

    def __init__(self) -> None:
        self.running: dict[Job, Any] = {}
        """The jobs that were started and are not given back yet."""

    def __exit__(self, *error: object) -> None:
        """End what still runs."""

    def start(self, job: Job, *arguments: Any) -> None:
        """Begin what :func:`perform` does with the job and the other arguments."""
        self.running[job] = arguments

    def next_finished(self) -> tuple[Job, Metrics | Exception | None]:
        """Wait for one of the running jobs: its metrics, or the error that ended it."""
        job, arguments = self.running.popitem()
        try:
            return job, perform(job, *arguments)
        except Exception as error:  # of this entry, such as too little memory; others go on
            return job, error

    def result(self, job: Job, *arguments: Any) -> Metrics:
        """Of a job that nothing runs beside; raises what that job raised."""
        self.start(job, *arguments)
        _, metrics = self.next_finished()
        if isinstance(metrics, Exception):
            raise metrics
        assert metrics is not None
        return metrics
