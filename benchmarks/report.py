"""Writes the tables and pictures of docs/performance.md from benchmarks/results/*.json.

    python benchmarks/report.py

Tables go between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from typing import Any

import altair as alt
from _common import FOLDER, RESULTS
from _layers import lower_quartile

from smoa_lab.pages.charts import DASHES, MUTED, OTHER, SMOA, lines, save_picture

DOCS = FOLDER.parent / "docs"
INJECTIONS = sorted(RESULTS.glob("injection_*.json"))
AXES = {"tokens": "tokens", "width": "width m = n", "num_blocks": "blocks K", "r": "rank budget r"}
FLOOR_BARS = {"4096x4096_float32": 1.20, "4096x4096_bfloat16": 1.40, "2048x640_float32": 1.25}


SWEEPS: dict[str, tuple[str, list[tuple[str, Any, Any]], alt.Scale]] = {
    "time": (
        "time of a training step, relative",
        [
            ("SMoA ÷ floor", lambda one: one["over_floor"], SMOA),
            ("SMoA ÷ frozen layer", lambda one: one["ratio"], OTHER),
        ],
        alt.Scale(zero=True),
    ),
    "memory": (
        "MB kept for the backward",
        [
            ("kept by SMoA", lambda one: one["kept_bytes"] / 1e6, SMOA),
            ("the input x alone", lambda one: one["input_bytes"] / 1e6, OTHER),
            ("size of W (not kept)", lambda one: one["weight_bytes"] / 1e6, (MUTED, DASHES[2])),
        ],
        alt.Scale(type="log"),
    ),
}
"""The pictures of the sweep: the axis, the lines (name, value, look), and the axis' scale."""


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(content: dict[str, Any]) -> str:
    origin = content["provenance"]
    return (
        f"{origin['device']} ({origin['cpu_capability']}), {origin['threads']} threads, "
        f"PyTorch {origin['versions']['torch']}"
    )


def measured(*contents: dict[str, Any]) -> str:
    """A sentence on the machines, dates and commits of the results."""
    found = {f"{machine(one)}, {one['provenance']['date'][:10]}, {one['provenance']['commit'][:7]}" for one in contents}
    return "\n\n" + textwrap.fill(f"Measured on {'; '.join(sorted(found))}.", 120)


def layer_step(compiled: bool = False) -> str:
    """Table of ratios to the frozen layer, one row per case and K."""
    methods = ("smoa", "lora", "hira", "released")
    rows, contents = [], []
    for path in sorted(RESULTS.glob("layer_step_*.json")):
        case = path.stem.removeprefix("layer_step_")
        if case.endswith("_compiled") == compiled:
            content = json.loads(path.read_text())
            contents.append(content)
            rows += [_layer_row(case, content["config"]["tokens"], result, methods) for result in content["results"]]
    header = [
        "layer, dtype",
        "tokens",
        "K",
        "frozen, s",
        "SMoA",
        "LoRA",
        "HiRA",
        "released",
        "floor",
        "÷ floor",
        "target",
    ]
    return table([*header, "÷ quicker of HiRA, released"], rows) + measured(*contents)


def _layer_row(case: str, tokens: int, result: dict[str, Any], methods: tuple[str, ...]) -> list[str]:
    ratio = result["ratio"]
    shape_and_dtype = "_".join(case.split("_")[:2])
    slower = [ratio[name] for name in ("hira", "released") if name in ratio]
    return [
        shape_and_dtype.replace("_", ", "),
        str(tokens),
        str(result["num_blocks"]),
        f"{lower_quartile(result['seconds']['frozen']):.3f}",
        *(f"{ratio[name]:.2f}" if name in ratio else "–" for name in methods),
        f"{result['floor']:.3f}",
        f"{ratio['smoa'] / result['floor']:.2f} ({result['ratio_of_fastest']['smoa'] / result['floor']:.2f})",
        f"{FLOOR_BARS[shape_and_dtype]:.2f}" if shape_and_dtype in FLOOR_BARS else "–",
        f"{ratio['smoa'] / min(slower):.2f}" if slower else "–",
    ]


def model_step() -> str:
    content = load("model_step")
    assert content is not None
    rows = [
        [
            name,
            f"{content['trainable'][key]:,}",
            f"{lower_quartile(content['seconds'][key]):.2f}",
            f"{content['peak_bytes'][key] / 1e9:.2f}",
        ]
        for key, name in (("smoa", "SMoA, K=4, r=32"), ("lora", "LoRA, r=8"))
    ]
    rows.append(
        ["SMoA ÷ LoRA (target)", "1", f"{content['ratio']:.3f} (1.15)", f"{content['memory_ratio']:.3f} (1.03)"]
    )
    return table(["method", "trainable parameters", "step, s", "peak memory, GB"], rows) + measured(content)


def decoding() -> str:
    content = load("decoding")
    assert content is not None
    names = {
        "base": "base model",
        "merged": "SMoA, merged",
        "default": "SMoA, unmerged, as `generate` does",
        "cached": "SMoA, unmerged, `cached_weights`",
        "unmerged": "SMoA, unmerged, nothing kept",
        "lora": "LoRA, unmerged",
    }
    bars, phases = content["bars"], content.get("phase_ratio", {})
    rows = [
        [
            name,
            f"{content['tokens_per_second'][key]:.1f}",
            f"{content['ratio'][key]:.2f}",
            f"{content['ratio_of_fastest'][key]:.2f}",
            *(f"{ratio[key]:.2f}" for ratio in phases.values()),
            f"{bars[key]:.2f}" if key in bars else "–",
        ]
        for key, name in names.items()
        if key in content["ratio"]
    ]
    note = (
        f"The cache takes {content['cache_bytes'] / 1e6:.0f} MB for a model of {content['model_bytes'] / 1e6:.0f} MB, "
        f"and {content['seconds_to_fill_cache']:.2f} s to fill."
    )
    if "default_cache_bytes" in content:
        note += f" What `generate` keeps by default takes {content['default_cache_bytes'] / 1e6:.0f} MB."
    return (
        table(["route", "tokens/s", "time ÷ base", "of the fastest", *phases, "target"], rows)
        + f"\n\n{note}"
        + measured(content)
    )


def kernels() -> str:
    """Time now ÷ with loops alone: of a step, and of a forward in brackets."""
    content = load("layer_kernels")
    assert content is not None
    cells = {
        (row["shape"], row["dtype"], row["partition"], row["num_blocks"], row["tokens"], row["part"]): row["ratio"]
        for row in content["results"]
    }
    cases, tokens = dict.fromkeys(key[:4] for key in cells), sorted({key[4] for key in cells})
    rows = [
        [f"{case[0]}, {case[1]}", case[2], str(case[3])]
        + [f"{cells[*case, count, 'step']:.2f} ({cells[*case, count, 'forward']:.2f})" for count in tokens]
        for case in cases
    ]
    ratios = cells.values()
    note = f"Geometric mean {content['geometric_mean']:.2f}, highest {max(ratios):.2f}, lowest {min(ratios):.2f}."
    header = ["layer, dtype", "blocks", "K", *(f"{count} tokens" for count in tokens)]
    return table(header, rows) + f"\n\n{note}" + measured(content)


def gpu() -> str:
    """What benchmarks/gpu.py measured, part by part."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))}
    if not parts:
        return "Not run: no GPU was available."
    tables = [
        f"`{name}`:\n\n" + table(list(columns), [[_cell(row.get(key)) for key in columns] for row in content["rows"]])
        for name, content in parts.items()
        if (columns := dict.fromkeys(key for row in content["rows"] for key in row))
    ]
    return "\n\n".join(tables) + measured(*parts.values())


def _cell(value: Any) -> str:
    return "–" if value in (None, "") else f"{value:.4g}" if isinstance(value, float) else str(value)


def injection() -> str:
    """Table of the exact scores' time ÷ a full SVD's, one row per weight or model."""
    contents = {path.stem.removeprefix("injection_"): json.loads(path.read_text()) for path in INJECTIONS}
    rows = [
        [
            name.replace("_threads", " threads").replace("_", ", ").replace("1 threads", "1 thread"),
            f"{statistics.median(content['seconds']['svd']):.2f}",
            f"{statistics.median(content['seconds']['exact']):.2f}",
            f"{content['ratio']:.2f}",
            f"{content['bar']:.2f}",
            content["provenance"]["cpu_capability"],
        ]
        for name, content in contents.items()
    ]
    header = ["weight", "SVD, s", "exact scores, s", "ratio", "target", "machine"]
    return table(header, rows) + measured(*contents.values())


def experts() -> str:
    """Table of what LoRA and SMoA cost on top of frozen experts, one row per size."""
    content = load("experts")
    assert content is not None
    config, rows = content["config"], []
    for case in content["cases"]:
        lora, smoa = (case["on_top"][method] for method in ("lora", "smoa"))
        rows.append(
            [f"{config['experts']} × {2 * case['intermediate']}×{config['hidden']}"]
            + [f"{method['seconds'] * 1000:.0f}" for method in (lora, smoa)]
            + [f"{case['ratio']['seconds']:.2f}"]
            + [f"{method['bytes'] / 1e6:.0f}" for method in (lora, smoa)]
            + [f"{case['ratio']['bytes']:.2f}"]
        )
    header = ["gate and up", "LoRA, ms", "SMoA, ms", "ratio", "LoRA, MB", "SMoA, MB", "ratio"]
    return table(header, rows) + measured(content)


def expert_partitions() -> str:
    """Table of time, bytes and agreement of the two partitions, one row per stack and K."""
    content = load("expert_partitions")
    assert content is not None
    rows = [
        [f"{case['stack']}, {case['shape'][0]} × {case['shape'][2]}×{case['shape'][3]}", str(case["num_blocks"])]
        + [f"{case['seconds'][kind]:.2f}" for kind in ("each", "shared")]
        + [f"{case['label_bytes'][kind]:,}" for kind in ("each", "shared")]
        + [f"{share:.2f}" for share in case["agreement"]]
        for case in content["cases"]
    ]
    header = ["stack", "K", "each, s", "shared, s", "each, bytes", "shared, bytes", "same rows", "same columns"]
    return table(header, rows) + measured(content)


def draw_sweep(content: dict[str, Any]) -> None:
    """Draw time ÷ floor and kept bytes against tokens, width, K and r, in one picture each."""
    for name, (title, names, scale) in SWEEPS.items():
        y = alt.Y("value:Q", title=title, scale=scale)
        panels = [
            lines(
                _sweep_rows(content["results"][quantity], quantity, names),
                {one: style for one, _, style in names},
                x,
                y,
            )
            for quantity, label in AXES.items()
            for x in [
                alt.X(f"{quantity}:Q", title=label, scale=alt.Scale(type="log", base=2), axis=alt.Axis(tickCount=6))
            ]
        ]
        told = f"One SMoA layer, {content['config']['dtype']}; where not varied: 1,024 tokens, 2048×2048, K=4, r=32"
        heading = alt.Title(told, subtitle=machine(content), offset=14)
        save_picture(alt.concat(*panels, columns=2, title=heading), DOCS / "images" / f"performance-{name}.png")


def _sweep_rows(points: list[dict[str, Any]], quantity: str, names: list[tuple[str, Any, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, quantity: one[quantity], "value": read(one)} for name, read, _ in names for one in points]


def main() -> None:
    tables = {
        "layer-step": layer_step(),
        "compiled": layer_step(compiled=True),
        "model-step": model_step(),
        "decoding": decoding(),
        "kernels": kernels(),
        "gpu": gpu(),
        "injection": injection(),
        "experts": experts(),
        "expert-partitions": expert_partitions(),
    }
    page = DOCS / "performance.md"
    text = page.read_text()
    for name, content in tables.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text, flags=re.S)
    page.write_text(text)
    sweep = load("sweep_float32")
    if sweep is not None:
        draw_sweep(sweep)


if __name__ == "__main__":
    main()
