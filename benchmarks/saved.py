"""Measures what becomes of a saved adapter.

python benchmarks/saved.py merge_memory runs/demo/adapter [--route streamed|loaded] [--dtype bfloat16]
python benchmarks/saved.py lora_conversion runs/demo
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _common import resident, run
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from smoa.conversion import RankRule
from smoa.export.merge import merge_and_save
from smoa_lab.convert import Converter

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 640)
ERRORS = (0.5, 0.3, 0.1, 0.05)


def memory() -> dict[str, float]:
    """Resident memory and its anonymous part, in MB."""
    return {"resident": resident("VmRSS") / 1.024e6, "anonymous": resident("RssAnon") / 1.024e6}


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


def merge_memory(
    device: torch.device, adapter: Path, route: str = "streamed", dtype: str = "float32"
) -> dict[str, Any]:
    """The peak memory of merging an adapter into its base model on disk.

    `loaded` is the usual way: the base model in memory, `merge_and_unload`, `save_pretrained`. Anonymous memory is the
    process's own. The rest of the resident set are mapped pages of the checkpoint, which the system can reclaim. The
    memory after the imports is reported too. Linux only.
    """
    base = Path(str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path))
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "merged"
        if route == "streamed":
            merge_and_save(adapter, target, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
            merged.to(getattr(torch, dtype)).save_pretrained(target)
    seconds = round(time.perf_counter() - started, 1)
    peak.finished.set()
    checkpoint = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e6
    sizes = {"checkpoint_mb": checkpoint, "imports_mb": peak.start_values, "peak_mb": peak.largest}
    print(sizes, seconds)
    return {"name": f"merge_memory_{route}_{dtype}", **sizes, "seconds": seconds}


def lora_conversion(device: torch.device, folder: Path, ranks: tuple[int, ...] = RANKS) -> dict[str, Any]:
    """What a LoRA of each rank keeps of a trained adapter, FOLDER being a finished run: of ΔW, and of the task's loss.

    Every LoRA is saved, loaded by PEFT onto the base model and scored on the run's held-out questions.
    docs/figures/measured.py draws the picture in docs/export.md.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["config"]["training"].pop("output_dir")
    converter = Converter(folder)
    points = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as scratch:
            report = converter.cut(RankRule(rank=rank), Path(scratch) / "lora")
        points.append({name: figure for name, figure in report.items() if name != "layers"} | {"rank": rank})
        print(rank, points[-1]["error"], points[-1]["loss"])
    needed = {
        name: {
            "shape": list(spectrum.shape),
            "blocks": len(spectrum.rows),
            **{f"error {error}": RankRule(error=error).choose(spectrum.values) for error in ERRORS},
        }
        for name, spectrum in converter.spectra.layers.items()
    }
    run_of = {key: metrics[key] for key in ("config", "provenance", "training")}
    return {"run": run_of, "points": points, "ranks_needed": needed}


if __name__ == "__main__":
    run(__doc__, merge_memory=merge_memory, lora_conversion=lora_conversion)
