"""Measures the peak memory of merging an adapter into its base model on disk.

    python benchmarks/merge_memory.py runs/demo/adapter [--route streamed|loaded] [--dtype bfloat16]

`loaded` is the usual way: the base model in memory, `merge_and_unload`, `save_pretrained`. Anonymous memory is the
process's own. The rest of the resident set are mapped pages of the checkpoint, which the system can reclaim. The memory
after the imports is reported too. Linux only. Writes benchmarks/results/merge_memory_<route>_<dtype>.json.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch
from _common import provenance, write_results
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from smoa.export.merge import merge_and_save


def memory() -> dict[str, float]:
    """Resident memory and its anonymous part, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1e3 for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"))}


class Peak(threading.Thread):
    """Records the largest value of each figure of `memory` while the thread runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = self.start_values = memory()
        self.finished = threading.Event()

    def run(self) -> None:
        while not self.finished.wait(0.005):
            now = memory()
            self.largest = {name: max(now[name], self.largest[name]) for name in now}


def merge_loaded(adapter: Path, output: Path, dtype: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path, dtype=torch.float32
    )
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.to(getattr(torch, dtype)).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--route", choices=("streamed", "loaded"), default="streamed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    merge = merge_and_save if arguments.route == "streamed" else merge_loaded
    base = Path(str(PeftConfig.from_pretrained(str(arguments.adapter)).base_model_name_or_path))
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        merge(arguments.adapter, Path(scratch) / "merged", dtype=arguments.dtype)
    seconds = time.perf_counter() - started
    peak.finished.set()
    result = {
        "provenance": provenance(torch.device("cpu")),
        "checkpoint_mb": sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e6,
        "imports_mb": peak.start_values,
        "peak_mb": peak.largest,
        "seconds": round(seconds, 1),
    }
    print({name: value for name, value in result.items() if name != "provenance"})
    print(write_results(f"merge_memory_{arguments.route}_{arguments.dtype}", result))


if __name__ == "__main__":
    main()
