"""Which learning rate SMoA wants beside LoRA's, from every stored search of both: writes studies/rate_ratio.json.

    python studies/rate_ratio.py

A pair is LoRA and SMoA of one study at the same size, SMoA with the default scale, K times LoRA's r and its alpha / r.
*Lost* is SMoA's validation loss at a factor times LoRA's chosen rate, less that at its own best rate, read off its
curve along straight lines in the logarithm of the rate. A factor for all is chosen by the mean over studies of what is
lost, and judged on the study that it was chosen without.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from stored import PACK, STUDIES, runs_of

from smoa.atomic import write_whole
from smoa_lab.basics.folders import json_text

TARGET = STUDIES / "rate_ratio.json"
FACTORS = (0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5)
Curve = dict[float, float]
DIVERGED = 3.0
"""Times the best loss at which a curve is cut: what lies above says nothing of the rates below."""


def curves(folder: Path) -> dict[str, tuple[dict[str, Any], Curve]]:
    """The adapter and the losses by rate of each entry's search."""
    losses, configs = defaultdict[str, Curve](dict), dict[str, Any]()
    for name, run in runs_of(folder).items():
        if name.startswith("tuning/"):
            entry, loss = name.split("/")[1], run["scores"]["all"]["gold_loss"]
        elif "seed-100" in name:
            entry, loss = name.split("/")[0], run["evaluation"]["after"]["loss"]
        else:
            continue
        configs[entry] = {"method": run["config"]["method"], **run["config"]["adapter"]}
        if loss is not None and math.isfinite(loss):
            losses[entry][run["config"]["training"]["learning_rate"]] = loss
    return {entry: (configs[entry], dict(sorted(curve.items()))) for entry, curve in losses.items()}


def best_rate(curve: Curve) -> float:
    """The vertex of the parabola through the best rate and its neighbours, as a search takes it."""
    rates = list(curve)
    place = min(range(len(rates)), key=lambda number: curve[rates[number]])
    if place in (0, len(rates) - 1):
        return rates[place]
    x = np.log([rates[place + step] for step in (-1, 0, 1)])
    a, b, _ = np.polyfit(x, [curve[rates[place + step]] for step in (-1, 0, 1)], 2)
    vertex = -b / (2 * a) if a > 0 else x[1]
    widest = min(x[1] - x[0], x[2] - x[1]) / 2
    return float(np.exp(np.clip(vertex, x[1] - widest, x[1] + widest)))


def pairs(folder: Path) -> list[dict[str, Any]]:
    """LoRA and SMoA at one size, with what SMoA loses at each factor times LoRA's rate."""
    every, found = curves(folder), []
    lora = {config["r"]: curve for config, curve in every.values() if config["method"] == "lora" and len(curve) > 2}
    for name, (config, curve) in every.items():
        other = config.get("scale", "lora") != "lora" or config.get("modulation", "hadamard") != "hadamard"
        if config["method"] != "smoa" or other or len(curve) < 3:
            continue
        base = lora.get(config["r"] // config["num_blocks"])
        if base is None or config["alpha"] != 2 * config["r"]:
            continue
        low = min(curve.values())
        cut = {rate: min(loss, DIVERGED * max(low, 0.1)) for rate, loss in curve.items()}
        lora_rate, x = best_rate(base), np.log(list(cut))
        lost = {
            str(factor): float(np.interp(math.log(factor * lora_rate), x, list(cut.values()))) - low
            for factor in FACTORS
        }
        found.append(
            {
                "study": folder.name,
                "entry": name,
                "lora_rate": lora_rate,
                "smoa_rate": best_rate(curve),
                "ratio": best_rate(curve) / lora_rate,
                "lost": lost,
            }
        )
    return found


def main() -> None:
    found = [pair for folder in sorted(STUDIES.iterdir()) if (folder / PACK).is_file() for pair in pairs(folder)]
    by_study = defaultdict[str, list[dict[str, float]]](list)
    for pair in found:
        by_study[pair["study"]].append(pair["lost"])
    lost = {study: {key: fmean(one[key] for one in some) for key in some[0]} for study, some in by_study.items()}

    def chosen(studies: list[str]) -> str:
        return min(lost[studies[0]], key=lambda key: fmean(lost[study][key] for study in studies))

    left_out = {study: chosen([other for other in lost if other != study]) for study in lost}
    content = {
        "pairs": found,
        "studies": len(lost),
        "ratio": {
            "median": median(pair["ratio"] for pair in found),
            "geometric_mean": math.exp(fmean(math.log(pair["ratio"]) for pair in found)),
            "smallest": min(pair["ratio"] for pair in found),
            "largest": max(pair["ratio"] for pair in found),
        },
        "mean_lost": {key: fmean(one[key] for one in lost.values()) for key in map(str, FACTORS)},
        "worst_lost": {key: max(one[key] for one in lost.values()) for key in map(str, FACTORS)},
        "chosen": chosen(list(lost)),
        "leave_one_study_out": {
            "chosen": left_out,
            "mean_lost": fmean(lost[study][factor] for study, factor in left_out.items()),
            "better_than_1": sum(lost[study][factor] < lost[study]["1.0"] for study, factor in left_out.items()),
            "worse_than_1": sum(lost[study][factor] > lost[study]["1.0"] for study, factor in left_out.items()),
        },
    }
    write_whole(TARGET, json_text(content) + "\n")
    for pair in found:
        shown = {key: round(value, 3) for key, value in pair["lost"].items()}
        print(f"{pair['study']:20} {pair['entry']:22} ratio {pair['ratio']:.2f}", shown)
    print(json.dumps({key: value for key, value in content.items() if key != "pairs"}, indent=1))


if __name__ == "__main__":
    main()
