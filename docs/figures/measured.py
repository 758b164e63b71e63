"""Draws the pictures of single measurements in docs/images, each from a JSON beside it or of a benchmark.

    python docs/figures/measured.py [conversion] [precision] [rates] [weight_sizes]
    python docs/figures/measured.py --collect PAIR ENTRY FACTOR STUDY_FOLDER STUDY_ENTRY

- conversion: what a LoRA of each rank keeps of a trained adapter (benchmarks/saved.py lora_conversion).
- precision: how much of ΔW bfloat16 keeps in the output, measured here. ΔW = W ⊙ δ is relative to W. If W(1 + δ) is
  rounded to bfloat16, an entry with |δ| < 2⁻⁹ does not change. A ΔW that is rounded apart from W loses almost nothing.
- rates: the loss by learning rate, for LoRA and SMoA, and the table of studies/rates.md; validation losses of studies
  in quarter decades, one seed each. `--collect` adds an entry of a study's folder to the numbers; FACTOR is that of the
  scale, in units of 1 / rms of each block.
- weight_sizes: the rms of the weights that SMoA adapts in Gemma 3 270M, measured here. At equal alpha / r, a step of
  SMoA changes a weight by rms(W) times as much as a step of LoRA. For equal steps alpha has to be 1 / rms(W) times as
  large.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import nn

from smoa_lab.base_models import load_base_model
from smoa_lab.config.run import ModelSection
from smoa_lab.pages.charts import DASHES, LORA, MUTED, OTHER, PALETTE, SMOA, lines, save_picture, values
from smoa_lab.pages.tables import Table
from smoa_lab.study.trials import TrialStore

DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
RATES = IMAGES / "rates.json"
RATE_STYLES = {
    "LoRA": LORA,
    "SMoA, 3 / rms": (PALETTE["smoa"], DASHES[1]),
    "SMoA, 4 / rms": SMOA,
    "SMoA at LoRA's r": (PALETTE["smoa"], DASHES[2]),
}
TICKS = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)
HIGHEST, HIGHEST_SHARE = 0.45, 0.4
"""Losses so far above the lowest of a panel, or by that share of it, are left out of the picture."""
SIZE, TOKENS, WEIGHT_RMS = 1024, 256, 0.02
RELATIVE_SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def conversion() -> Any:
    points = read(DOCS.parent / "benchmarks" / "results" / "lora_conversion.json")["points"]
    ranks, first = [point["rank"] for point in points], points[0]
    losses = {
        "LoRA of that rank": [point["loss"]["lora"] for point in points],
        "base model": [first["loss"]["base"]] * len(points),
        "SMoA adapter": [first["loss"]["adapter"]] * len(points),
    }
    rows = [
        {"name": name, "rank": rank, "loss": loss}
        for name, of_ranks in losses.items()
        for rank, loss in zip(ranks, of_ranks, strict=True)
    ]
    axis = alt.Axis(values=ranks, grid=False)
    x = alt.X("rank:Q", title="rank of the LoRA", scale=alt.Scale(type="log", base=2, nice=False), axis=axis)
    y = alt.Y("loss:Q", title="loss on held-out answers (nats per token)", scale=alt.Scale(zero=False))
    errors = [
        {"rank": point["rank"], "low": point["loss"]["lora"] - error, "high": point["loss"]["lora"] + error}
        for point in points
        for error in [point["loss"]["lora_change_stderr"]]
    ]
    bars = alt.Chart(values(errors)).mark_rule(color=PALETTE["lora"]).encode(x="rank:Q", y="low:Q", y2="high:Q")
    by_rank = lines(rows, dict(zip(losses, (LORA, OTHER, SMOA), strict=True)), x, y) + bars
    keys = {"LoRA": "parameters", "same, stored by blocks": "blockwise_parameters"}
    rows = [
        {"name": name, "numbers": point[key], "error": point["error"]} for name, key in keys.items() for point in points
    ]
    rows.append({"name": "SMoA adapter", "numbers": first["adapter_parameters"], "error": 0})
    x = alt.X("numbers:Q", title="stored numbers", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s", tickCount=5))
    y = alt.Y("error:Q", title="‖ΔW − BA‖ / ‖ΔW‖, all layers")
    styles = {"LoRA": LORA, "same, stored by blocks": (PALETTE["lora"], DASHES[2]), "SMoA adapter": SMOA}
    named = [
        {"numbers": point["parameters"], "error": point["error"], "label": f"rank {point['rank']}"}
        for point in points
        if point["rank"] in (1, 8, 64, 256)
    ]
    labels = alt.Chart(values(named)).mark_text(align="left", dx=7, dy=-5, color=MUTED)
    by_size = lines(rows, styles, x, y) + labels.encode(x="numbers:Q", y="error:Q", text="label:N")
    return alt.hconcat(by_rank, by_size).resolve_scale(color="independent", strokeDash="independent")


def relative_errors(size: float) -> dict[str, float]:
    """‖error of x ΔWᵀ‖ / ‖x ΔWᵀ‖ for entries δ of rms `size`, formed together with W and apart from it."""
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE).mul_(WEIGHT_RMS).bfloat16().double()
    delta = weight * torch.randn(SIZE, SIZE).double() * size
    x = torch.randn(TOKENS, SIZE).double()
    exact = x @ delta.T
    rounded = {
        "together": x @ ((weight + delta).bfloat16().double() - weight).T,
        "apart": x @ delta.bfloat16().double().T,
    }
    return {"size": size} | {name: float((product - exact).norm() / exact.norm()) for name, product in rounded.items()}


def precision() -> Any:
    points = [relative_errors(size) for size in RELATIVE_SIZES]
    (IMAGES / "precision.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    names = {"together": "W + ΔW rounded to bfloat16", "apart": "ΔW rounded by itself"}
    rows = [
        {"name": name, "size": point["size"], "error": point[key]} for key, name in names.items() for point in points
    ]
    across, up = (alt.Scale(type="log") for _ in range(2))
    x = alt.X(
        "size:Q",
        title="rms of the relative change of an entry of W",
        scale=across,
        axis=alt.Axis(format="~e", tickCount=4),
    )
    y = alt.Y("error:Q", title="relative error of x ΔWᵀ", scale=up, axis=alt.Axis(format="~g", tickCount=4))
    drawn = lines(rows, dict(zip(names.values(), (OTHER, SMOA), strict=True)), x, y, width=460)
    ulp = alt.Chart(values([{"size": 2**-9, "label": "half a unit in the last place: 1/512"}])).encode(x="size:Q")
    label = ulp.mark_text(align="left", dx=6, dy=14).encode(y=alt.value(120), text="label:N")
    return drawn + ulp.mark_rule(color=MUTED, strokeDash=[2, 3]) + label


def weight_sizes() -> Any:
    model, _ = load_base_model(ModelSection(name="gemma3-270m"))
    sizes: dict[str, list[float]] = {target: [] for target in TARGETS}
    for path, module in model.named_modules():
        target = path.rpartition(".")[2]
        if target in sizes and isinstance(module, nn.Linear):
            sizes[target].append(float(module.weight.detach().double().square().mean().sqrt()))
    content = json.dumps({"model": "gemma3-270m", "rms": sizes}, indent=1)
    (IMAGES / "weight_sizes.json").write_text(content + "\n", encoding="utf-8")
    rows = [{"name": name, "layer": i, "rms": rms} for name, of_all in sizes.items() for i, rms in enumerate(of_all)]
    shades = (PALETTE[method] for method in ("smoa", "lora", "hira", "pissa", "full"))
    styles = {name: (shade, DASHES[0]) for name, shade in zip(sizes, shades, strict=True)}
    x = alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False))
    return lines(rows, styles, x, alt.Y("rms:Q", title="rms(W)"), width=460)


def losses(rows: list[dict[str, Any]], pair: str) -> dict[str, dict[float, float]]:
    """Loss by learning rate, by entry."""
    by_entry: dict[str, dict[float, float]] = {entry: {} for entry in RATE_STYLES}
    for row in rows:
        if row["pair"] == pair:
            by_entry[row["entry"]][row["learning_rate"]] = row["loss"]
    return {entry: dict(sorted(points.items())) for entry, points in by_entry.items() if points}


def rates() -> Any:
    rows = read(RATES)
    by_pair = {pair: losses(rows, pair) for pair in dict.fromkeys(row["pair"] for row in rows)}
    page = DOCS.parent / "studies" / "rates.md"
    before, _, _ = page.read_text(encoding="utf-8").partition("|")
    page.write_text(before + rates_table(by_pair) + "\n", encoding="utf-8")
    return alt.concat(*(panel(*pair) for pair in by_pair.items()), columns=2)


def rates_table(by_pair: dict[str, dict[str, dict[float, float]]]) -> str:
    """Losses of each entry by rate, the best in bold."""
    tried = sorted({rate for entries in by_pair.values() for points in entries.values() for rate in points})
    cells = []
    for pair, entries in by_pair.items():
        for entry, points in entries.items():
            best = min(points.values())
            texts = {rate: f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for rate, loss in points.items()}
            cells.append([f"{pair}: {entry}", *(texts.get(rate, "") for rate in tried)])
    return Table(["", *(f"{rate:g}" for rate in tried)], cells).markdown(["---"] * (len(tried) + 1))


def panel(title: str, entries: dict[str, dict[float, float]]) -> Any:
    lowest = min(loss for points in entries.values() for loss in points.values())
    rows = [
        {"name": entry, "learning_rate": rate, "loss": loss}
        for entry, points in entries.items()
        for rate, loss in points.items()
        if loss < lowest + min(HIGHEST, HIGHEST_SHARE * lowest)
    ]
    axis = alt.Axis(values=list(TICKS), format="~g", grid=False)
    across = alt.Scale(type="log", domain=TICKS[:: len(TICKS) - 1])
    x = alt.X("learning_rate:Q", title="learning rate", axis=axis, scale=across)
    y = alt.Y("loss:Q", title="validation loss (nats per token)", scale=alt.Scale(zero=False))
    return lines(rows, RATE_STYLES, x, y).properties(title=title)


def collect(pair: str, entry: str, factor: str, folder: str, study_entry: str) -> None:
    """Add the tuning runs of a study's entry to the numbers of `rates`."""
    store, rows = TrialStore(Path(folder)), read(RATES)
    for name in store.names(f"tuning/{study_entry}/"):
        run = store.find(name) or {}
        scores, config = run["scores"]["all"], run["config"]
        rate = config["training"]["learning_rate"]
        rows = [row for row in rows if (row["pair"], row["entry"], row["learning_rate"]) != (pair, entry, rate)]
        rows.append(
            {
                "pair": pair,
                "entry": entry,
                "factor": float(factor) or None,
                "learning_rate": rate,
                "loss": round(scores["gold_loss"], 4),
                "accuracy": round(scores["accuracy"], 4),
                "questions": scores["questions"],
                "parameters": run["parameters"],
                "adapter": config["adapter"],
                "seed": config["training"]["seed"],
                "commit": run["provenance"]["commit"],
                "versions": {name: run["provenance"]["versions"][name] for name in ("smoa", "torch", "peft")},
            }
        )
    rows.sort(key=lambda row: (row["pair"], row["entry"], row["learning_rate"]))
    RATES.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


PICTURES: dict[str, Callable[[], Any]] = {
    "conversion": conversion,
    "precision": precision,
    "rates": rates,
    "weight_sizes": weight_sizes,
}


def main() -> None:
    if sys.argv[1:2] == ["--collect"]:
        collect(*sys.argv[2:])
        return
    for name in sys.argv[1:] or PICTURES:
        save_picture(PICTURES[name](), IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
