"""Asks each machine of a cluster, before any work, whether it can run jobs: it has this smoa, and shares the folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import smoa
from smoa.errors import DataError
from smoa_lab.study.crews.ray_session import result_of
from smoa_lab.study.crews.ray_worker import Place

CHECKING = "checking the machines"


@dataclass(frozen=True)
class Found:
    """What a machine says of itself: its name, its Python, and its smoa or why that can't be imported."""

    host: str
    python: str
    version: str | None
    problem: str


def check_machines(ray: Any, place: Place) -> None:
    """Let each machine of the cluster import smoa and enter the study's folder.

    Raises:
        DataError: a machine cannot import what runs jobs, has another version of smoa, or does not share the folder.
    """
    on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            there = {"num_cpus": 0, "scheduling_strategy": on(node["NodeID"], soft=False)}
            told = result_of(ray, ray.remote(_asking()).options(**there).remote(), CHECKING)
            _check_packages(Found(*told))
            result_of(ray, ray.remote(Place.enter).options(**there).remote(place), CHECKING)


def _asking() -> Callable[[], tuple[str, str, str | None, str]]:
    """The question to a machine. It is defined within a function and imports what it needs itself, so that Ray sends
    its code: a function of a module is sent by name, and fails unexplained where the module is missing."""

    def ask() -> tuple[str, str, str | None, str]:
        import importlib
        import socket
        import sys

        try:
            importlib.import_module("smoa_lab.study.crews.ray_worker")
            version = importlib.import_module("smoa").__version__
        except Exception as error:  # whatever an environment raises that lacks something
            return socket.gethostname(), sys.executable, None, str(error)
        return socket.gethostname(), sys.executable, version, ""

    return ask


def _check_packages(found: Found) -> None:
    """Raise DataError unless the machine has what runs jobs, in the version of this one."""
    remedy = (
        f"install smoa {smoa.__version__} there with its extra cluster, and give `ray start` in that environment: all "
        "machines of a cluster must have the same versions"
    )
    if found.version is None:
        raise DataError(f"{found.host}: {found.python} cannot run a study's runs ({found.problem}); {remedy}")
    if found.version != smoa.__version__:
        raise DataError(
            f"{found.host}: {found.python} has smoa {found.version}, and this machine {smoa.__version__}; {remedy}"
        )
