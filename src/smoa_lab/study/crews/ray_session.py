"""Starts Ray on this machine, or joins a cluster at an address: quietly, and without telemetry in what is started."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.extras import import_package
from smoa_lab.study.crews.shares import Machine

STORE = 100 * 2**20
"""Bytes of Ray's object store; a study passes only the JSON of its runs."""
RETRIES = 3
"""How often Ray runs a task again whose worker, or whose machine, died."""
PATIENCE = 5.0
"""Seconds within which an address must answer. Ray itself would try for two minutes."""


def connect(address: str | None) -> Any:
    """The package ``ray``, with a cluster: the one at ``address``, or one of this machine that ends with this process.

    Raises:
        ConfigError: nothing answers at the address, or no cluster that this machine belongs to.
        DataError: Ray is not installed.
    """
    ray = import_package("ray", "--workers")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, object_store_memory=STORE, **quiet)
        return ray
    _check_answers(address)
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:  # Ray exits where no cluster answers
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster of this version that this machine may join ({error}); run "
            "`ray start` on this machine too, and set RAY_AUTH_MODE=token here if the cluster's machines have it"
        ) from error
    return ray


def machines(ray: Any) -> list[Machine]:
    """Those of the cluster that are alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(int(offers.get("CPU", 0)), int(offers.get("GPU", 0))) for offers in alive]


def result_of(ray: Any, task: Any, what: str) -> Any:
    """What a task returns, once it is finished; ``what`` it is, for the error.

    Raises:
        DataError: its workers died again and again.
        Exception: what the task itself raised.
    """
    raised = ray.exceptions
    try:
        return ray.get(task)
    except raised.RayTaskError as error:
        raise error.cause from error
    except raised.RayError as error:
        raise DataError(
            f"{what}: its worker died {RETRIES + 1} times ({str(error).splitlines()[0]}); where memory ran out, "
            "give fewer --workers. Ray's logs are in /tmp/ray/session_latest/logs"
        ) from error


def _check_answers(address: str) -> None:
    """Raise ConfigError unless the address is ``auto``, or ``HOST:PORT`` and somebody listens there."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"--ray-address {address}: must be HOST:PORT, as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: does not answer ({error}); start the cluster with `ray start --head`"
        ) from error
