"""Shared by the benchmarks: one command with a part for each measurement, timing, memory, provenance, result files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, LoraConfig, PeftConfig
from torch import Tensor, nn

from smoa import SmoaConfig

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
NOT_RESULTS = ":(exclude,top)benchmarks/results"
GEMMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
Part = Callable[..., dict[str, Any]]
Step = Callable[[], object]


def run(doc: str | None, **parts: Part) -> None:
    """Run the part that the command names, with its parameters as options, and write its result.

    A part takes the device and options with defaults, and returns the content of `benchmarks/results/<part>.json`;
    under "name" it may say another name of the file, or None to write nothing.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = parser.add_subparsers(dest="part", required=True)
    for name, part in parts.items():
        options = choices.add_parser(name, help=(part.__doc__ or "").splitlines()[0], description=part.__doc__)
        options.add_argument("--device", default="auto")
        options.add_argument("--threads", type=int, help="torch threads; 1 measures CPU time, for a busy machine")
        for key, parameter in list(inspect.signature(part, eval_str=True).parameters.items())[1:]:
            _add_option(options, key, parameter)
    given = vars(parser.parse_args())
    part, device_name, threads = parts[given.pop("part")], given.pop("device"), given.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    device = pick_device(device_name)
    torch.manual_seed(0)
    others = busy_elsewhere()
    content = part(device, **given)
    name = content.pop("name", part.__name__)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    content = {"config": config, **content, "cores_busy_elsewhere": others(), "provenance": provenance(device)}
    if name is not None:
        print(write_results(name, content))


def _add_option(options: argparse.ArgumentParser, key: str, parameter: inspect.Parameter) -> None:
    kind = parameter.annotation
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if parameter.default is parameter.empty:
        options.add_argument(key, type=kind)
    elif kind is bool:
        options.add_argument(f"--{key.replace('_', '-')}", action="store_true")
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        options.add_argument(f"--{key.replace('_', '-')}", nargs="+", type=item, default=parameter.default)
    else:
        options.add_argument(f"--{key.replace('_', '-')}", type=kind, default=parameter.default)


def pick_device(name: str = "auto") -> torch.device:
    """The named device; `auto` takes a GPU if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Step, device: torch.device | None = None) -> float:
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
    functions: Mapping[str, Step], repeats: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Times of each function, called in turn, so that a slow minute of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def lower_quartile(times: list[float]) -> float:
    """The lower quartile, because other processes only add time."""
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else times[0]


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def saved_bytes(model: nn.Module, step: Step) -> int:
    """Bytes of tensors that autograd keeps during one step, except the model's own, which exist anyway."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in storages.items() if place not in own)


def step_memory(step: Step) -> tuple[int, int]:
    """Bytes that torch's CPU allocator holds after a step, and the most at once during it, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    held = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return sum(held), max(accumulate(held))


def reset_peak(device: torch.device) -> int:
    """Count the peak of memory from here; on a GPU, the bytes that are held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current value
    return 0


def peak(device: torch.device) -> int:
    """Peak bytes since then: of device memory, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def resident(field: str, process: int | str = "self") -> int:
    """A figure of a process's memory as Linux has it, in bytes."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def held(device: torch.device) -> int:
    """Bytes allocated on a GPU, or resident on a CPU once freed memory is given back."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def cost(step: Step, device: torch.device) -> dict[str, float]:
    """Seconds of one call, and by how many bytes it raises the peak of memory and what is held."""
    before = held(device)
    reset_peak(device)
    taken = seconds(step, device)
    return {"seconds": taken, "peak_bytes": peak(device) - before, "held_bytes": held(device) - before}


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device; on a CPU, what Linux says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def in_own_process(method: str) -> Any:
    """What this command prints last as JSON if it is asked for one method only; RuntimeError with its last words."""
    command = [sys.executable, *sys.argv, "--only", method]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{method} ended with status {finished.returncode}: {last}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


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


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions, machine and clock of a result."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/benchmarks", NOT_RESULTS)
        ),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "clock": clock_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bfloat16_instructions(),
    }


def bfloat16_instructions() -> str:
    """By which of a CPU's instructions matrices in bfloat16 are multiplied; ONEDNN_MAX_CPU_ISA limits them."""
    if (allowed := os.environ.get("ONEDNN_MAX_CPU_ISA")) not in (None, "ALL", "DEFAULT"):
        return allowed.removesuffix("_CORE_BF16") + "-BF16" if allowed.endswith("_BF16") else allowed
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else "none"


def _processor() -> str:
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
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def drawn(
    method: str, rank: int, num_blocks: int, partition: str = "random", targets: Sequence[str] = GEMMA_TARGETS
) -> PeftConfig:
    """The config of a method with the parameters of LoRA of this rank, whose factors are all random. No weight is
    decomposed, which would not change what a step costs."""
    chosen: dict[str, Any] = {"target_modules": list(targets)}
    if method == "smoa":
        blocks = {"r": rank * num_blocks, "num_blocks": num_blocks, "partition": partition}
        return SmoaConfig(init_weights=False, **blocks, **chosen)
    if method == "hira":
        return HiraConfig(r=rank, init_weights=False, **chosen)
    return LoraConfig(r=rank, **({"use_dora": True} if method == "dora" else {"init_lora_weights": False}), **chosen)


def gemma_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 weight of every adapted layer (q, k, v, up, down) of a safetensors checkpoint."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.split(".")[-2] in GEMMA_TARGETS]  # noqa: SIM118
            for name in sorted(names):
                yield name.removesuffix(".weight"), tensors.get_tensor(name).float()
