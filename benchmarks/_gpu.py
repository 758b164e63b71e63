"""Rows of a GPU benchmark: measured once each, written at once, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _common import RESULTS, interleaved, provenance, synchronize, write_results
from _layers import lower_quartile
from torch import nn
from torch.profiler import ProfilerActivity, profile


class Rows:
    """The rows of `benchmarks/results/gpu_<part>.json`.

    Args:
        part: Name of the part.
        device: Where it runs; rows of another device are dropped.
        minutes: After so many, `wanted` says no.
        tiny: A dry run: nothing is read or written.
    """

    def __init__(self, part: str, device: torch.device, minutes: float, tiny: bool) -> None:
        self.name, self.device, self.tiny = f"gpu_{part}", device, tiny
        self.until = time.monotonic() + 60 * minutes
        self.origin = provenance(device)
        path = RESULTS / f"{self.name}.json"
        stored = json.loads(path.read_text()) if path.exists() and not tiny else {"rows": []}
        same = stored["rows"] and stored["provenance"]["device"] == self.origin["device"]
        self.rows: list[dict[str, Any]] = stored["rows"] if same else []

    def wanted(self, **case: Any) -> bool:
        """Whether there is time, and no row for this case yet."""
        return time.monotonic() < self.until and not any(case.items() <= row.items() for row in self.rows)

    def measure(self, function: Callable[[], dict[str, Any]], **case: Any) -> None:
        """Add the figures of a case, or the error: an out-of-memory is a result too."""
        if not self.wanted(**case):
            return
        try:
            figures = function()
        except (RuntimeError, ValueError, ImportError) as error:
            figures = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        self.rows.append(case | figures)
        print(self.rows[-1], flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.tiny:
            write_results(self.name, {"rows": self.rows, "provenance": self.origin})


def cost_of(step: Callable[[], object], device: torch.device, repeats: int = 20) -> dict[str, Any]:
    """Of one call: milliseconds, milliseconds of the device, operations started, peak bytes on top of what is held."""
    interleaved({"": step}, 3, device)
    held = reset_peak(device)
    step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    times = [event_seconds(step, device) for _ in range(repeats)]
    return {"ms": 1e3 * lower_quartile(times), "peak_bytes": peak} | profiled(step, device)


@contextmanager
def waiting_refused(device: torch.device) -> Iterator[None]:
    """Raise an error where the program waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def reset_peak(device: torch.device) -> int:
    """Bytes that are held; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def event_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Time of one call, by the device's events if it has them."""
    if device.type != "cuda":
        return interleaved({"": step}, 1, device)[""][0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels that one call starts on a GPU, and their time; None on a CPU, where operations are counted by a test."""
    if device.type != "cuda":
        return {"launches": None, "device_ms": None}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize(device)
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(kernels), "device_ms": sum(event.device_time for event in kernels) / 1e3}


def compiled(model: nn.Module, wanted: bool) -> nn.Module:
    """The model, compiled if wanted."""
    torch.compiler.reset()
    return torch.compile(model) if wanted else model  # type: ignore[return-value]
