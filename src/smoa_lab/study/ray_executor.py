"""Runs a study's jobs side by side on Ray, on this machine or on a cluster. Ray runs the job of a dead worker again."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch

import smoa
from smoa.errors import ConfigError, DataError
from smoa_lab.basics.trust import TRUSTED, Trust
from smoa_lab.data.own_metric import own_metric
from smoa_lab.study.executor import Executor, perform
from smoa_lab.study.plan import Metrics
from smoa_lab.study.study import Job, Study

logger = logging.getLogger(__name__)

STORE = 100 * 2**20
"""Bytes of Ray's object store; a study passes only the metrics of its runs."""
RETRIES = 3
"""How often Ray runs a task again whose worker, or whose machine, died."""
PATIENCE = 5.0
"""Seconds within which an address must answer. Ray itself would try for two minutes."""


@dataclass(frozen=True)
class Place:
    """Where a study is run: the folder in which the command was given, a file in the study's folder that only machines
    see which share it, what the command lets run, and smoa's version there."""

    folder: str
    mark: Path
    trust: Trust = field(default_factory=Trust)
    version: str = smoa.__version__

    def enter(self) -> None:
        """Make it the working folder, with the command's trust; raises DataError where this machine does not share it,
        or has another smoa."""
        if self.version != smoa.__version__:
            raise DataError(
                f"{socket.gethostname()}: {sys.executable} has smoa {smoa.__version__}, and the command "
                f"{self.version}; all machines of a cluster must have the same versions"
            )
        if not Path(self.folder).is_dir() or not Path(self.folder, self.mark).is_file():
            raise DataError(
                f"{self.mark.parent}: {socket.gethostname()} does not see what other machines write there; all "
                f"machines of the cluster must share this folder, and {self.folder}, under the same path"
            )
        os.chdir(self.folder)
        vars(TRUSTED).update(vars(self.trust))


def work(place: Place, threads: int, job: Job, *arguments: Any) -> Metrics | None:
    """What a worker does: run the job, and return its metrics, or None where another process runs it."""
    place.enter()
    torch.set_num_threads(threads)
    return perform(job, *arguments)


class RayExecutor(Executor):
    """Up to ``workers`` jobs at a time, each with an equal share of the cluster's cores or one GPU, as Ray tasks.

    Tasks and not actors: Ray runs the task of a lost machine wherever there is room, while an actor waits for a place
    of its own. Worker processes on cores are used again; one on a GPU ends with its job, and leaves no memory behind.

    The cluster is the one at ``address``, by default one of this machine. It is joined when the first job starts.
    """

    def __init__(self, study: Study, workers: int, address: str | None = None) -> None:
        super().__init__()
        self.study, self.workers, self.address = study, workers, address
        if TRUSTED.metric is not None:
            own_metric()  # its digest is known from now on
        self.place = Place(str(Path.cwd()), study.folder / f".driver-{uuid.uuid4().hex}", replace(TRUSTED))
        self._ray: Any = None

    def start(self, job: Job, *arguments: Any) -> None:
        if self._ray is None:
            self._begin()
        logger.info("%s", job.name)
        share: dict[str, Any] = {"num_cpus": self.cores, "num_gpus": int(self.on_gpus)}
        if job.stage == "timing":  # all on one machine: steps of two can't be compared
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            share["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.first, soft=True)
        task = self._ray.remote(work).options(name=job.name, max_retries=RETRIES, **share)
        self.running[job] = task.remote(self.place, self.cores, job, *arguments)

    def next_finished(self) -> tuple[Job, Metrics | Exception | None]:
        """Wait for one of the running jobs: its metrics or its error, also if its workers died again and again."""
        ray = self._ray
        done = ray.wait(list(self.running.values()))[0][0]
        job = next(job for job, task in self.running.items() if task == done)
        del self.running[job]
        try:
            return job, ray.get(done)
        except ray.exceptions.RayTaskError as error:
            return job, error.cause
        except ray.exceptions.RayError as error:
            return job, DataError(
                f"{job.name}: its worker died {RETRIES + 1} times ({str(error).splitlines()[0]}); where memory ran "
                "out, give fewer --workers. Ray's logs are in /tmp/ray/session_latest/logs"
            )

    def __exit__(self, *error: object) -> None:
        """End what still runs; a run that had saved a checkpoint goes on from there next time."""
        if self._ray is not None:
            for task in self.running.values():
                self._ray.cancel(task, force=True)
            self._ray.shutdown()
            self.place.mark.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._ray = connect(self.address)
        alive = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        machines = [(int(offers.get("CPU", 0)), int(offers.get("GPU", 0))) for offers in alive.values()]
        uses_cpu = (self.study.shared.get("training") or {}).get("use_cpu")
        self.on_gpus = any(gpus for _, gpus in machines) and not uses_cpu
        self.cores = equal_share(machines, self.workers, self.on_gpus)
        has_room = (cores >= self.cores and gpus >= self.on_gpus for cores, gpus in machines)
        self.first = next(compress(alive, has_room))
        self.place.mark.parent.mkdir(parents=True, exist_ok=True)
        self.place.mark.touch()
        gpu = " and a GPU" if self.on_gpus else ""
        logger.info("%d machines, %d workers; cores for each: %d%s", len(machines), self.workers, self.cores, gpu)


def connect(address: str | None) -> Any:
    """The package ``ray``, with a cluster: the one at ``address``, or one of this machine that ends with this process.
    It is started or joined quietly, and without telemetry in what is started."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, object_store_memory=STORE, **quiet)
        return ray
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]") or "?", int(port)), PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: does not answer ({error}); give HOST:PORT, as `ray start --head` tells, or auto"
        ) from error
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:  # Ray exits where no cluster answers
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster of this version that this machine may join ({error}); run "
            "`ray start` on this machine too, and set RAY_AUTH_MODE=token here if the cluster's machines have it"
        ) from error
    return ray


def equal_share(machines: Sequence[tuple[int, int]], workers: int, on_gpus: bool) -> int:
    """The most cores, with one GPU if ``on_gpus``, for each of ``workers`` on machines of so many cores and GPUs."""

    def places(share: int) -> int:
        return sum(min(cores // share, gpus if on_gpus else cores) for cores, gpus in machines)

    for share in range(max((cores for cores, _ in machines), default=0), 0, -1):
        if places(share) >= workers:
            return share
    least, room = "a GPU and a core" if on_gpus else "a core", places(1)
    raise ConfigError(f"--workers {workers}: each takes {least} or more, there is room for {room}; give at most {room}")
