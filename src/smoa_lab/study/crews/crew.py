"""A crew takes the jobs of a study and gives back their results: here what it offers, and the crew of one process."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from smoa_lab.study.plan import Job

Result = dict[str, Any]
"""The JSON of a finished job."""


class Crew(Protocol):
    """Runs jobs, one or several at a time."""

    @property
    def running(self) -> Collection[Job]:
        """The jobs that were started and are not given back yet."""

    @property
    def is_full(self) -> bool:
        """Whether no other job can be started now."""

    def start(self, job: Job) -> None:
        """Take a job."""

    def next_finished(self) -> tuple[Job, Result]:
        """Wait for one of the running jobs; raises what that job raised."""


class ThisProcess:
    """Runs one job at a time by ``perform``, when its result is asked for."""

    def __init__(self, perform: Callable[[Job], Result]) -> None:
        self.perform = perform
        self.running: list[Job] = []

    @property
    def is_full(self) -> bool:
        return bool(self.running)

    def start(self, job: Job) -> None:
        self.running.append(job)

    def next_finished(self) -> tuple[Job, Result]:
        job = self.running.pop()
        return job, self.perform(job)
