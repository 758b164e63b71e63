"""Two processes that train together over gloo, as torchrun would start them, without its second import of torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 300.0
"""Seconds; two processes that wait for each other never end by themselves."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**variables: str) -> dict[str, str]:
    """Of a child process: one thread, and nothing that makes it one of several processes unless asked."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"} | variables


def run_two(module: str, *arguments: str) -> None:
    """Run `python -m module` as ranks 0 and 1; fails with their output unless both end well."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = _outputs(ranks)
    codes = [rank.returncode for rank in ranks]
    assert codes == [0, 0], "\n".join([f"exit codes {codes}", *outputs])


def _outputs(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """What each process printed; when one fails or none ends, all are killed."""
    end = time.monotonic() + DEADLINE
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
    return [rank.communicate()[0] for rank in ranks]
