"""Measures what a LoRA of each rank keeps of a trained adapter: of ΔW, and of the task's loss.

    smoa train configs/demo.yaml
    python benchmarks/lora_conversion.py runs/demo

Every LoRA is saved, loaded by PEFT onto the base model and scored on the run's held-out questions. Writes
benchmarks/results/lora_conversion.json, from which docs/figures/conversion.py draws the picture in docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from _common import provenance, write_results

from smoa_lab.runs.convert_run import trade_off

RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 640]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    arguments = parser.parse_args()
    metrics = json.loads((arguments.run / "metrics.json").read_text())
    metrics["config"]["training"].pop("output_dir")
    with tempfile.TemporaryDirectory() as scratch:
        result = trade_off(arguments.run, arguments.ranks, Path(scratch))
    for point in result["points"]:
        loss = point["loss"]
        print(
            f"rank {point['rank']:4d}  error {point['error']:.3f}  "
            f"loss {loss['lora']:.4f} ({loss['lora_change']:+.4f} ± {loss['lora_change_stderr']:.4f})"
        )
    run = {"config": metrics["config"], "provenance": metrics["provenance"], "training": metrics["training"]}
    print(write_results("lora_conversion", {"provenance": provenance(torch.device("cpu")), "run": run, **result}))


if __name__ == "__main__":
    main()
