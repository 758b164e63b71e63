"""Draws plots, and saves them in gray: lines differ in style and marker, not only in color."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from smoa.atomic import write_whole


def draw_run(history: list[dict[str, Any]], evaluation: dict[str, Any], file: Path, title: str) -> None:
    """A run: the loss over the optimizer's steps and, where it was measured, what changed on held-out data: the
    accuracy in bars below, or the loss of rows as a point at the first and the last step."""
    scores = [evaluation[stage]["all"] for stage in ("before", "after") if stage in evaluation]
    if len(scores) < 2 or "accuracy" not in scores[0]:
        figure, losses = new_figure(height=4.0)
    else:
        figure, (losses, accuracies) = new_figure(height=5.6, plots=2, ratios=(3, 1))
        _draw_accuracies(accuracies, *scores)
    if len(scores) == 2 and "perplexity" in scores[0] and history:
        ends, held_out = [0, history[-1]["step"]], [one["loss"] for one in scores]
        losses.plot(ends, held_out, "D", label="held-out rows, before and after", color="0.2", clip_on=False)
    _draw_losses(losses, history)
    losses.set_title(title)
    save_figure(figure, file)


def _draw_losses(axes: Any, history: list[dict[str, Any]]) -> None:
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, label=label, color="0.2")
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("loss on trained tokens\n(nats per token)")
    axes.grid(True, color="0.9")
    if axes.lines:  # a run shorter than its logging steps has none
        axes.legend()


def _draw_accuracies(axes: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Bars with their standard errors; a dashed line at the commonest label."""
    for place, (scores, shade) in enumerate(((after, "0.35"), (before, "0.75"))):
        percent, stderr = 100 * scores["accuracy"], 100 * scores["accuracy_stderr"]
        axes.barh(place, percent, xerr=stderr, color=shade, ecolor="black", capsize=3)
        axes.text(percent + stderr + 1, place, f"{percent:.1f} %", va="center")
    axes.set_yticks([0, 1], ["after", "before"])
    if after["majority"] is not None:
        axes.axvline(100 * after["majority"], linestyle="--", color="0.2", label="always the commonest label")
        axes.legend(loc="lower right", frameon=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"accuracy on {after['questions']} held-out questions (%), with the standard error")


def new_figure(height: float, plots: int = 1, ratios: tuple[float, ...] | None = None) -> tuple[Any, Any]:
    """A figure of ``height`` inches with one plot, or a tuple of plots one below the other, their heights in
    ``ratios``."""
    import matplotlib.figure  # not pyplot, which asks for a window system and keeps global state

    figure = matplotlib.figure.Figure(figsize=(8, height), dpi=150, layout="constrained")
    axes = tuple(figure.subplots(plots, squeeze=False, height_ratios=ratios)[:, 0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes if plots > 1 else axes[0]


def save_figure(figure: Any, file: Path) -> None:
    """Save as PNG in shades of gray, which takes 40 % of the bytes of colors."""
    from PIL import Image

    drawn, gray = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("L").save(gray, format="png", optimize=True)
    write_whole(file, gray.getvalue())
