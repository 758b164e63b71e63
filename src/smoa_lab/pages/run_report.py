"""A run for people: the README.md of its adapter, the answers before and after training, its losses drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
from peft import PeftConfig

from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.pages.card import NamedBase, adapter_card
from smoa_lab.pages.charts import INK, MUTED, WIDTH, color_of, tooltip, values
from smoa_lab.pages.tables import metric_table, spread, steps_text
from smoa_lab.pages.templates import render

ANSWERS = {"reference": "Reference", "before": "Before", "after": "After"}
Evaluation = Mapping[str, Mapping[str, Any]]
HELD_OUT = "held-out rows"
KINDS = {"training": "loss", "validation": "eval_loss"}
STAGES = ("before", "after")


def run_card(title: str, config: PeftConfig, base: NamedBase, metrics: dict[str, Any]) -> str:
    """The card of a run's adapter: base, results before and after, data, settings, versions, how to load it.

    ``config`` is the adapter's as saved, ``metrics`` the run's.
    """
    evaluation = metrics["evaluation"]
    sections = render(
        "run_card.md.jinja",
        metrics=metrics,
        spread=spread,
        stages=list(evaluation),
        results=metric_table(evaluation),
        steps=steps_text(metrics["training"]),
        samples=samples_text(metrics["samples"][:2], level=3),
        config=to_yaml({key: value for key, value in metrics["config"].items() if key != "adapter"}),
    )
    return adapter_card(title, config, base, sections)


def samples_text(samples: list[dict[str, str]], level: int = 2) -> str:
    """What was answered to held-out prompts: a heading of ``level`` for each, and below it the answers as written."""
    texts = []
    for number, sample in enumerate(samples, start=1):
        answers = [f"{title}:\n\n{_block(sample[name])}" for name, title in ANSWERS.items() if name in sample]
        texts.append(f"{'#' * level} Prompt {number}\n\n{_block(sample['question'])}" + "".join(answers))
    return "".join(texts)


def _block(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text
    return f"{fence}text\n{text.strip() or '(nothing)'}\n{fence}\n\n"


def losses(
    history: Sequence[Mapping[str, Any]], evaluation: Evaluation, method: str, training: Mapping[str, Any] | None = None
) -> Any | None:
    """The trainer's loss by step, each line named at its end; of held-out rows a point before and after, unless the
    trainer's loss is another one: that of preferences, or of a choice with what ends it."""
    points = [
        {"step": entry["step"], "loss": entry[key], "data": kind}
        for kind, key in KINDS.items()
        for entry in history
        if entry.get(key) is not None  # as of a run that diverged
    ]
    if not points:
        return None
    prefers = any("rewards/margins" in entry for entry in history)
    title = "loss of preferences" if prefers else "loss on trained tokens (nats per token)"
    is_other = prefers or "accuracy" in evaluation.get("after", {})
    stages = [] if is_other else zip(STAGES, (0, (training or {}).get("best_step") or history[-1]["step"]), strict=True)
    known = ((step, evaluation.get(stage, {}).get("loss")) for stage, step in stages)
    held_out = [{"step": step, "loss": loss, "data": HELD_OUT} for step, loss in known if loss is not None]
    shades = alt.Scale(domain=[*KINDS, HELD_OUT], range=[color_of(method), MUTED, INK])
    chart = alt.Chart(values(points)).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False)),
        color=alt.Color("data:N", scale=shades, legend=None),
        tooltip=tooltip(data="", step="d", loss=".4f"),
    )
    names = {point["data"]: point for point in [*points, *reversed(held_out)]}.values()
    return alt.layer(
        chart.mark_line(point=alt.OverlayMarkDef(size=24)),
        chart.properties(data=values(held_out)).mark_point(shape="diamond", size=90, filled=True, opacity=1),
        chart.properties(data=values(names)).mark_text(align="left", dx=8).encode(text="data:N"),
    ).properties(width=WIDTH - 80, height=230)
