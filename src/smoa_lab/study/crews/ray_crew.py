"""Workers side by side on Ray. Ray places them, starts them and runs the job of a dead one again."""

from __future__ import annotations

import logging
import uuid
from collections.abc import KeysView
from pathlib import Path
from types import TracebackType
from typing import Any

from smoa_lab.study.crews.crew import Result
from smoa_lab.study.crews.machine_check import check_machines
from smoa_lab.study.crews.ray_session import RETRIES, connect, machines, result_of
from smoa_lab.study.crews.ray_worker import Place, perform
from smoa_lab.study.crews.shares import equal_share
from smoa_lab.study.plan import Job
from smoa_lab.study.study_file import Study

logger = logging.getLogger(__name__)


class RayCrew:
    """Up to ``workers`` jobs at a time, each with an equal share of the cluster's cores or one GPU, as Ray tasks.

    Tasks and not actors: Ray runs the task of a lost machine wherever there is room, while an actor waits for a place
    of its own. Worker processes on cores are used again; one on a GPU ends with its job, and leaves no memory behind.

    The cluster is the one at ``address``, by default one of this machine. It is joined when the first job starts.
    """

    def __init__(self, study: Study, workers: int, address: str | None = None) -> None:
        self.study, self.workers, self.address = study, workers, address
        self.place = Place(str(Path.cwd()), study.folder / "work" / f"driver-{uuid.uuid4().hex}")
        self._jobs: dict[Job, Any] = {}
        self._ray: Any = None

    @property
    def running(self) -> KeysView[Job]:
        return self._jobs.keys()

    @property
    def is_full(self) -> bool:
        return len(self._jobs) >= self.workers

    def start(self, job: Job) -> None:
        if self._ray is None:
            self._begin()
        logger.info("%s", job.name)
        self._jobs[job] = self._task(job).remote(self.study, self.place, job, self.share.cores)

    def next_finished(self) -> tuple[Job, Result]:
        """Wait for one of the running jobs.

        Raises:
            DataError: workers died again and again at the same job.
        """
        done = self._ray.wait(list(self._jobs.values()))[0][0]
        job = next(job for job, task in self._jobs.items() if task == done)
        del self._jobs[job]
        return job, result_of(self._ray, done, job.name)

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End what still runs; a run that had saved a checkpoint goes on from there next time."""
        if self._ray is not None:
            for task in self._jobs.values():
                self._ray.cancel(task, force=True)
            self._ray.shutdown()
            self.place.mark.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._ray = connect(self.address)
        offers = machines(self._ray)
        on_gpus = any(one.gpus for one in offers) and not (self.study.shared.get("training") or {}).get("use_cpu")
        self.share = equal_share(offers, self.workers, on_gpus)
        self.place.mark.parent.mkdir(parents=True, exist_ok=True)
        self.place.mark.touch()
        if self.address is not None:
            check_machines(self._ray, self.place)
        gpu = " and a GPU" if self.share.gpus else ""
        logger.info("%d machines, %d workers; cores for each: %d%s", len(offers), self.workers, self.share.cores, gpu)

    def _task(self, job: Job) -> Any:
        """``perform`` as Ray's task for a job."""
        share = {"num_cpus": self.share.cores, "num_gpus": self.share.gpus}
        return self._ray.remote(perform).options(name=job.name, max_retries=RETRIES, **share)
