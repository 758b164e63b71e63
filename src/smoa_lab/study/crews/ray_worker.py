"""What a worker process on Ray does: checks that it sees the study's folder, then runs a job of the study."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from smoa.errors import DataError
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.crews.crew import Result
from smoa_lab.study.plan import Job
from smoa_lab.study.study_file import Study

_begun: dict[Path, Comparison] = {}
"""The study that this process works on, with its records read, by the mark of who started it."""


@dataclass(frozen=True)
class Place:
    """Where a study is run: the folder in which the command was given, and a file in the study's folder that only
    machines see which share it."""

    folder: str
    mark: Path

    def enter(self) -> None:
        """Make it the working folder; raises DataError where this machine does not share it."""
        if not Path(self.folder).is_dir() or not Path(self.folder, self.mark).is_file():
            raise DataError(
                f"{self.mark.parents[1]}: {socket.gethostname()} does not see what other machines write there; all "
                f"machines of the cluster must share this folder, and {self.folder}, under the same path"
            )
        os.chdir(self.folder)


def perform(study: Study, place: Place, job: Job, threads: int) -> Result:
    """Run the job, or wait for it where another process runs it, and return its JSON.

    Raises:
        DataError: this machine does not share the study's folder.
    """
    place.enter()
    torch.set_num_threads(threads)
    comparison = _begun.setdefault(place.mark, Comparison(study))
    return comparison.perform(job)
