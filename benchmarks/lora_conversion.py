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
from typing import Any

import torch
from _common import provenance, write_results

from smoa.export.lora import RankRule
from smoa_lab.convert import Converter

RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 640]
ERRORS = [0.5, 0.3, 0.1, 0.05]


def cut(converter: Converter, rank: int) -> dict[str, Any]:
    """What a LoRA of this rank keeps."""
    with tempfile.TemporaryDirectory() as scratch:
        report = converter.cut(RankRule(rank=rank), Path(scratch) / "lora")
    return {name: figure for name, figure in report.items() if name != "layers"} | {"rank": rank}


def ranks_needed(converter: Converter) -> dict[str, Any]:
    """The rank that each layer needs for given errors."""
    return {
        name: {
            "shape": list(spectrum.shape),
            "blocks": len(spectrum.rows),
            **{f"error {error}": RankRule(error=error).choose(spectrum.values) for error in ERRORS},
        }
        for name, spectrum in converter.spectra.layers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    arguments = parser.parse_args()
    metrics = json.loads((arguments.run / "metrics.json").read_text())
    metrics["config"]["training"].pop("output_dir")
    converter = Converter(arguments.run)
    points = [cut(converter, rank) for rank in arguments.ranks]
    for point in points:
        loss = point["loss"]
        print(
            f"rank {point['rank']:4d}  error {point['error']:.3f}  "
            f"loss {loss['lora']:.4f} ({loss['lora_change']:+.4f} ± {loss['lora_change_stderr']:.4f})"
        )
    run = {"config": metrics["config"], "provenance": metrics["provenance"], "training": metrics["training"]}
    result = {"run": run, "points": points, "ranks_needed": ranks_needed(converter)}
    print(write_results("lora_conversion", {"provenance": provenance(torch.device("cpu")), **result}))


if __name__ == "__main__":
    main()
