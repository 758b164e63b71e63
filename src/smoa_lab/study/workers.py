"""Several processes that run a study at once: on this machine by the standard library, on a cluster by Ray.

A worker is a loop over the study's folder (:func:`smoa_lab.study.run_study.work`), which all of them share: none hands
out jobs, and one that dies takes only its run with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from smoa.errors import DataError
from smoa_lab.basics.trust import TRUSTED
from smoa_lab.study.run_study import Failed, work


@dataclass(frozen=True)
class Worker:
    """What one process does, from the folder and with the trust of the process that starts it: jobs of a study with so
    many ``threads``, and with one of the ``gpus`` of this machine, if there are any."""

    file: Path
    only: Sequence[str]
    deadline: float
    workers: int
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
    return work(worker.file, worker.only, worker.deadline, worker.workers)


def work_side_by_side(file: Path, only: Sequence[str], deadline: float, workers: int) -> Failed:
    """Run a study's jobs by several processes of this machine, each with its part of the cores and, where there are
    GPUs, with one."""
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = visible or [str(gpu) for gpu in range(torch.cuda.device_count())]
    worker = Worker(file, only, deadline, workers, max(1, (os.cpu_count() or 1) // workers), gpus)
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
    worker = Worker(file, only, deadline, workers, threads)
    task = ray.remote(_work).options(num_cpus=threads, num_gpus=int("GPU" in resources))
    try:
        return _together(ray.get([task.remote(worker, place) for place in range(workers)]))
    except ray.exceptions.RayError as error:  # whose text has the traceback of another machine, its cause has not
        raise DataError(f"{file.parent}: a worker failed: {getattr(error, 'cause', error)}") from error


def _together(found: Sequence[Failed]) -> Failed:
    return {name: error for failed in found for name, error in failed.items()}
