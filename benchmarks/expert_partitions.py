"""Compares a partition for each expert with one for all: time to decompose, bytes of labels, and the blocks.

    python benchmarks/expert_partitions.py MODEL

No mixture is small enough to be at hand. The experts are the up and down projections of all layers of a trained model,
Gemma 3 270M: matrices of one shape that were trained for different inputs. Reported is the share of coordinates that a
shared partition puts into the block of the expert's own, which is 1 / K by chance.
Writes benchmarks/results/expert_partitions.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _common import gemma_weights, provenance, seconds, write_results
from torch import Tensor

from smoa.maths.experts import stack_partition
from smoa.maths.spectrum import spectral_scores


def stacks(folder: Path) -> dict[str, Tensor]:
    """(layers, 1, out_features, in_features) of each projection."""
    found: dict[str, list[Tensor]] = {"up_proj": [], "down_proj": []}
    for name, weight in gemma_weights(folder):
        kind = name.rpartition(".")[2]
        if kind in found:
            found[kind].append(weight)
    return {kind: torch.stack(weights)[:, None] for kind, weights in found.items()}


def compare(matrices: Tensor, num_blocks: int) -> dict[str, Any]:
    """Times, bytes and agreement of the two partitions of one stack."""
    labels: dict[str, tuple[Tensor, Tensor]] = {}
    times = {}
    for kind in ("each", "shared"):

        def decide(kind: str = kind) -> None:
            labels[kind] = stack_partition(matrices, num_blocks, "spectral", kind, spectral_scores)

        times[kind] = seconds(decide)
    agreement = [
        float((own == shared).float().mean()) for own, shared in zip(labels["each"], labels["shared"], strict=True)
    ]
    size = {kind: sum(side.nbytes for side in sides) for kind, sides in labels.items()}
    return {"num_blocks": num_blocks, "seconds": times, "label_bytes": size, "agreement": agreement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of Gemma 3 270M as safetensors")
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [
        {"stack": name, "shape": list(matrices.shape), **compare(matrices, num_blocks)}
        for name, matrices in stacks(arguments.model).items()
        for num_blocks in arguments.num_blocks
    ]
    for case in cases:
        print(case)
    mean = statistics.mean(case["seconds"]["each"] / case["seconds"]["shared"] for case in cases)
    config = {"num_blocks": arguments.num_blocks, "model": "google/gemma-3-270m (from GGUF Q4_K_M)"}
    result = {"config": config, "cases": cases, "ratio": mean, "provenance": provenance(torch.device("cpu"))}
    print(mean, write_results("expert_partitions", result))


if __name__ == "__main__":
    main()
