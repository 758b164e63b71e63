"""Draws docs/images/conversion.png: what a LoRA of each rank keeps of a trained adapter.

Run with `make figures`. benchmarks/lora_conversion.py measures the numbers, in benchmarks/results/lora_conversion.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt

from smoa_lab.pages.charts import DASHES, LORA, MUTED, OTHER, PALETTE, SMOA, lines, save_picture, values

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "lora_conversion.json"
PICTURE = ROOT / "docs" / "images" / "conversion.png"


def loss_by_rank(points: list[dict[str, Any]]) -> Any:
    """The LoRA's loss on the task with its standard error, between the base model's and the adapter's."""
    known = {
        "LoRA of that rank": [point["loss"]["lora"] for point in points],
        "base model": [points[0]["loss"]["base"]] * len(points),
        "SMoA adapter": [points[0]["loss"]["adapter"]] * len(points),
    }
    ranks = [point["rank"] for point in points]
    rows = [
        {"name": name, "rank": rank, "loss": loss}
        for name, losses in known.items()
        for rank, loss in zip(ranks, losses, strict=True)
    ]
    axis = alt.Axis(values=ranks, grid=False)
    x = alt.X("rank:Q", title="rank of the LoRA", scale=alt.Scale(type="log", base=2, nice=False), axis=axis)
    y = alt.Y("loss:Q", title="loss on held-out answers (nats per token)", scale=alt.Scale(zero=False))
    errors = [
        {"rank": one["rank"], "low": one["loss"]["lora"] - error, "high": one["loss"]["lora"] + error}
        for one in points
        for error in [one["loss"]["lora_change_stderr"]]
    ]
    bars = alt.Chart(values(errors)).mark_rule(color=PALETTE["lora"]).encode(x="rank:Q", y="low:Q", y2="high:Q")
    return lines(rows, {"LoRA of that rank": LORA, "base model": OTHER, "SMoA adapter": SMOA}, x, y) + bars


def error_by_size(points: list[dict[str, Any]]) -> Any:
    """‖ΔW − BA‖ / ‖ΔW‖ against the stored numbers, as a LoRA and block by block."""
    keys = {"LoRA": "parameters", "same, stored by blocks": "blockwise_parameters"}
    rows = [{"name": name, "numbers": one[key], "error": one["error"]} for name, key in keys.items() for one in points]
    rows.append({"name": "SMoA adapter", "numbers": points[0]["adapter_parameters"], "error": 0})
    x = alt.X("numbers:Q", title="stored numbers", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s", tickCount=5))
    y = alt.Y("error:Q", title="‖ΔW − BA‖ / ‖ΔW‖, all layers")
    styles = {"LoRA": LORA, "same, stored by blocks": (PALETTE["lora"], DASHES[2]), "SMoA adapter": SMOA}
    named = [
        {"numbers": point["parameters"], "error": point["error"], "told": f"rank {point['rank']}"}
        for point in points
        if point["rank"] in (1, 8, 64, 256)
    ]
    labels = alt.Chart(values(named)).mark_text(align="left", dx=7, dy=-5, color=MUTED)
    return lines(rows, styles, x, y) + labels.encode(x="numbers:Q", y="error:Q", text="told:N")


def main() -> None:
    points = json.loads(RESULT.read_text())["points"]
    picture = alt.hconcat(loss_by_rank(points), error_by_size(points))
    save_picture(picture.resolve_scale(color="independent", strokeDash="independent"), PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
