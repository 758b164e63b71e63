"""Which learning rate each method wants beside LoRA's, from every stored search: writes studies/rate_ratio.json, and
the table of docs/migration.md.

    python studies/rate_ratio.py

For SMoA at LoRA's own settings it also asks which fixed factor would serve all.
A pair is LoRA and SMoA of one study at the same size, SMoA with the default scale, K times LoRA's r and its alpha / r.
*Lost* is SMoA's validation loss at a factor times LoRA's chosen rate, less that at its own best rate, read off its
curve along straight lines in the logarithm of the rate. A factor for all is chosen by the mean over studies of what is
lost, and judged on the study that it was chosen without.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from stored import PACK, STUDIES, runs_of

from smoa_lab.basics.files import write_whole
from smoa_lab.basics.values import json_text

TARGET = STUDIES / "rate_ratio.json"
PAGE, BEGIN, END = STUDIES.parent / "docs" / "migration.md", "<!-- begin rates -->\n", "<!-- end rates -->\n"
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
        diverged = configs.get(entry, {}).get("diverged", False)
        configs[entry] = {"method": run["config"]["method"], "diverged": diverged, **run["config"]["adapter"]}
        if loss is None or not math.isfinite(loss):
            configs[entry]["diverged"] = True
        else:
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


def kind_of(config: dict[str, Any]) -> str:
    """What a search is of: the method, and for SMoA what its best rate depends on."""
    method = str(config["method"])
    if method != "smoa":
        return NAMES.get(method, method)
    if config.get("modulation", "hadamard") == "none":
        return "blocks without W"
    scale, cut = config.get("scale") or "lora", config.get("partition") or "spectral"
    is_default = config.get("modulation", "hadamard") == "hadamard" and scale in ("lora", "paper")
    return f"SMoA, {cut}, scale {scale}" if is_default else "SMoA, other anchors and scales"


NAMES = {
    "melora": "blocks without W",
    "full": "full fine-tuning",
    "dora": "DoRA",
    "hira": "HiRA",
    "shira": "SHiRA",
    "pissa": "PiSSA",
    "rslora": "rsLoRA",
    "miss": "MiSS",
    "loha": "LoHa",
    "gralora": "GraLoRA",
}


def against_lora(folder: Path) -> list[dict[str, Any]]:
    """Every searched entry of a study beside the LoRA whose number of parameters is nearest to its own."""
    every, sizes, found = curves(folder), parameters_of(folder), []
    loras = [entry for entry, (config, curve) in every.items() if config["method"] == "lora" and len(curve) > 2]
    for entry, (config, curve) in every.items():
        if config["method"] == "lora" or not loras or len(curve) < 3:
            continue
        lora = min(loras, key=lambda name: abs(math.log(sizes[name] / sizes[entry])))
        lora_rate, rate, rates = best_rate(every[lora][1]), best_rate(curve), list(curve)
        low, (first, *_, last) = min(curve.values()), rates
        kept = float(np.interp(math.log(lora_rate), np.log(rates), list(curve.values())))
        best = rates.index(min(curve, key=curve.__getitem__))
        found.append(
            {
                "study": folder.name,
                "entry": entry,
                "kind": kind_of(config),
                "lora": lora,
                "lora_rate": lora_rate,
                "rate": rate,
                "ratio": rate / lora_rate,
                "loss": low,
                "loss_at_lora_rate": kept if first <= lora_rate <= last else None,
                "is_interpolated": all(abs(math.log(lora_rate / each)) > 0.01 for each in rates),
                "at_an_edge": best in (0, len(rates) - 1),
                "diverged": config["diverged"] or max(curve.values()) > DIVERGED * max(low, 0.1),
                "steps": [after / before for before, after in pairwise(rates)],
            }
        )
    return found


def parameters_of(folder: Path) -> dict[str, int]:
    """Trainable parameters of each entry."""
    sizes = {}
    for name, run in runs_of(folder).items():
        if count := run.get("parameters"):
            sizes[name.split("/")[name.startswith("tuning/")]] = (
                count["trainable"] if isinstance(count, dict) else count
            )
    return sizes


def table(searches: list[dict[str, Any]]) -> str:
    """What docs/migration.md shows: a row for each kind, the most searched first."""
    of_kind = defaultdict[str, list[dict[str, Any]]](list)
    for each in searches:
        of_kind[each["kind"]].append(each)
    lines = [
        "| method | searches (studies) | best rate ÷ LoRA's: median, range | loss added at LoRA's rate: median, worst "
        "| best at the edge of its search | some rate diverged |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, own in sorted(of_kind.items(), key=lambda pair: -len(pair[1])):
        inside = [each for each in own if not each["at_an_edge"]]
        ratios = [each["ratio"] for each in inside]
        lost = [each["loss_at_lora_rate"] - each["loss"] for each in own if each["loss_at_lora_rate"] is not None]
        rate = f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "–"
        added = f"{median(lost):.3f}, {max(lost):.3f}" if lost else "–"
        studies, edges = len({each["study"] for each in own}), len(own) - len(inside)
        diverged = sum(each["diverged"] for each in own)
        lines.append(f"| {kind} | {len(own)} ({studies}) | {rate} | {added} | {edges} | {diverged} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    studies = [folder for folder in sorted(STUDIES.iterdir()) if (folder / PACK).is_file()]
    searches = [each for folder in studies for each in against_lora(folder)]
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    write_whole(PAGE, f"{head}{BEGIN}{table(searches)}{END}{tail}")
    found = [pair for folder in studies for pair in pairs(folder)]
    by_study = defaultdict[str, list[dict[str, float]]](list)
    for pair in found:
        by_study[pair["study"]].append(pair["lost"])
    lost = {study: {key: fmean(one[key] for one in some) for key in some[0]} for study, some in by_study.items()}

    def chosen(studies: list[str]) -> str:
        return min(lost[studies[0]], key=lambda key: fmean(lost[study][key] for study in studies))

    left_out = {study: chosen([other for other in lost if other != study]) for study in lost}
    content = {
        "searches": searches,
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
    print(json.dumps({key: value for key, value in content.items() if key not in ("searches", "pairs")}, indent=1))


if __name__ == "__main__":
    main()
