"""Which learning rate each method wants beside LoRA's, from every search in studies/searches.json. It makes the table
of docs/migration.md, and writes studies/rate_ratio.json:

    python studies/rate_ratio.py

For SMoA at LoRA's own settings it also asks which fixed factor would serve all.
A pair is LoRA and SMoA of one study at the same size, SMoA with the default scale, K times LoRA's r and its alpha / r.
*Lost* is SMoA's validation loss at a factor times LoRA's chosen rate, less that at its own best rate, read off its
curve along straight lines in the logarithm of the rate. A factor for all is chosen by the mean over studies of what is
lost, and judged on the study that it was chosen without.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from stored import STUDIES, searches

from smoa_lab.basics.files import write_whole
from smoa_lab.basics.values import json_text
from smoa_lab.pages.tables import Table

TARGET = STUDIES / "rate_ratio.json"
FACTORS = (0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5)
Curve = dict[float, float]
DIVERGED = 3.0
"""Times the best loss at which a curve is cut: what lies above says nothing of the rates below."""
REPEATED = "chats"
"""A study that was repeated as chats-2, which is the one that counts."""


@dataclass(frozen=True)
class Search:
    """An entry's method, the settings of its adapter, its trainable parameters, and its losses by rate."""

    method: str
    adapter: dict[str, Any]
    parameters: int
    curve: Curve
    diverged: bool


def searches_of(study: str) -> dict[str, Search]:
    """The search of each entry of a study."""
    found = {}
    for entry, one in searches()[study].items():
        losses = {float(rate): loss for rate, loss in one["losses"].items()}
        curve = {rate: loss for rate, loss in losses.items() if loss is not None}
        found[entry] = Search(one["method"], one["adapter"], one["parameters"], curve, len(curve) < len(losses))
    return found


def names() -> list[str]:
    return [study for study in searches() if study != REPEATED]


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


def pairs(study: str) -> list[dict[str, Any]]:
    """LoRA and SMoA at one size, with what SMoA loses at each factor times LoRA's rate."""
    every, found = searches_of(study), []
    lora = {one.adapter["r"]: one.curve for one in every.values() if one.method == "lora" and len(one.curve) > 2}
    for entry, one in every.items():
        curve, adapter = one.curve, one.adapter
        other = adapter.get("scale", "lora") != "lora" or adapter.get("modulation", "hadamard") != "hadamard"
        if one.method != "smoa" or other or len(curve) < 3:
            continue
        base = lora.get(adapter["r"] // adapter["num_blocks"])
        if base is None or adapter["alpha"] != 2 * adapter["r"]:
            continue
        low = min(curve.values())
        cut = {rate: min(loss, DIVERGED * max(low, 0.1)) for rate, loss in curve.items()}
        lora_rate, x = best_rate(base), np.log(list(cut))
        lost = {
            str(factor): float(np.interp(math.log(factor * lora_rate), x, list(cut.values()))) - low
            for factor in FACTORS
        }
        smoa_rate = best_rate(curve)
        rates = {"lora_rate": lora_rate, "smoa_rate": smoa_rate, "ratio": smoa_rate / lora_rate}
        found.append({"study": study, "entry": entry, **rates, "lost": lost})
    return found


def kind_of(search: Search) -> str:
    """What a search is of: the method, and for SMoA what its best rate depends on."""
    if search.method != "smoa":
        return NAMES.get(search.method, search.method)
    modulation = search.adapter.get("modulation", "hadamard")
    if modulation == "none":
        return "blocks without W"
    scale, cut = search.adapter.get("scale") or "lora", search.adapter.get("partition") or "spectral"
    is_default = modulation == "hadamard" and scale in ("lora", "paper")
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


@dataclass(frozen=True)
class Beside:
    """A search beside that of LoRA: its best rate ÷ LoRA's, and the loss that LoRA's rate adds, where it was tried."""

    study: str
    kind: str
    ratio: float
    added: float | None
    at_an_edge: bool
    diverged: bool


def against_lora(study: str) -> list[Beside]:
    """Every searched entry of a study beside the LoRA whose number of parameters is nearest to its own."""
    every, found = searches_of(study), []
    loras = [one for one in every.values() if one.method == "lora" and len(one.curve) > 2]
    for one in every.values():
        curve = one.curve
        if one.method == "lora" or not loras or len(curve) < 3:
            continue
        lora = min(loras, key=lambda each: abs(math.log(each.parameters / one.parameters)))
        lora_rate, rates, low = best_rate(lora.curve), list(curve), min(curve.values())
        kept = float(np.interp(math.log(lora_rate), np.log(rates), list(curve.values())))
        found.append(
            Beside(
                study,
                kind_of(one),
                best_rate(curve) / lora_rate,
                kept - low if rates[0] <= lora_rate <= rates[-1] else None,
                min(curve, key=curve.__getitem__) in (rates[0], rates[-1]),
                one.diverged or max(curve.values()) > DIVERGED * max(low, 0.1),
            )
        )
    return found


def table() -> str:
    """What docs/migration.md shows: a row for each kind, the most searched first."""
    of_kind = defaultdict[str, list[Beside]](list)
    for each in (each for study in names() for each in against_lora(study)):
        of_kind[each.kind].append(each)
    rows = []
    for kind, own in sorted(of_kind.items(), key=lambda pair: -len(pair[1])):
        ratios = [each.ratio for each in own if not each.at_an_edge]
        added = [each.added for each in own if each.added is not None]
        studies, diverged = len({each.study for each in own}), sum(each.diverged for each in own)
        rows.append(
            [
                kind,
                f"{len(own)} ({studies})",
                f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "–",
                f"{median(added):.3f}, {max(added):.3f}" if added else "–",
                len(own) - len(ratios),
                diverged,
            ]
        )
    header = ["method", "searches (studies)", "best rate ÷ LoRA's: median, range"]
    header += ["loss added at LoRA's rate: median, worst", "best at the edge of its search", "some rate diverged"]
    return Table(header, rows).markdown()


def main() -> None:
    found = [pair for study in names() for pair in pairs(study)]
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


if __name__ == "__main__":
    main()
