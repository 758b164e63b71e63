"""Shared by the benchmarks: timing in turn, provenance of results, result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
GEMMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def pick_device(name: str = "auto") -> torch.device:
    """The named device; `auto` takes a GPU if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    """Time of one call by the clock of `clock_name`, with the device's queue empty before and after."""
    clock = time.process_time if clock_name(device) == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def clock_name(device: torch.device | None) -> str:
    """`cpu` with one thread on a CPU, where no thread spins and other processes hardly change CPU time; else `wall`."""
    on_cpu = device is None or device.type == "cpu"
    return "cpu" if on_cpu and torch.get_num_threads() == 1 else "wall"


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Times of each function, called in turn, so that a slow minute of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def busy_elsewhere() -> Callable[[], float | None]:
    """Start watching. The returned function gives the number of cores busy with other processes since (Linux only)."""
    before = _other_cpu_seconds()
    start = time.perf_counter()

    def cores() -> float | None:
        after = _other_cpu_seconds()
        if before is None or after is None:
            return None
        return round(max(0.0, (after - before) / (time.perf_counter() - start)), 2)

    return cores


def _other_cpu_seconds() -> float | None:
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft_irq, steal = fields[:8]
    busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def median_ratio(times: Mapping[str, list[float]], name: str, against: str) -> float:
    return statistics.median(times[name]) / statistics.median(times[against])


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions, machine and clock of a result."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/benchmarks")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "clock": clock_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _git(*arguments: str) -> str:
    finished = subprocess.run(["git", "-C", str(FOLDER), *arguments], capture_output=True, text=True, check=False)
    return finished.stdout.strip()


def write_results(name: str, content: Mapping[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def gemma_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 weight of every adapted layer (q, k, v, up, down) of a safetensors checkpoint."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.split(".")[-2] in GEMMA_TARGETS]  # noqa: SIM118
            for name in sorted(names):
                yield name.removesuffix(".weight"), tensors.get_tensor(name).float()
