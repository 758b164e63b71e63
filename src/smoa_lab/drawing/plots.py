"""Draws plots, and saves them in gray: lines differ in style and marker, not only in color."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from smoa.atomic import write_whole


def draw_loss_curve(history: list[dict[str, Any]], file: Path, title: str) -> None:
    """Training loss, and validation loss where it was measured, over the optimizer's steps, from the Trainer's log."""
    figure, axes = new_figure(height=4.0)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, label=label, color="0.2")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss on answer tokens (nats per token)")
    axes.set_title(title)
    axes.grid(True, color="0.9")
    if axes.lines:  # a run shorter than its logging steps has none
        axes.legend()
    save_figure(figure, file)


def new_figure(height: float, plots: int = 1) -> tuple[Any, Any]:
    """A figure of ``height`` inches with one plot, or a tuple of plots one below the other."""
    import matplotlib.figure  # not pyplot, which asks for a window system and keeps global state

    figure = matplotlib.figure.Figure(figsize=(8, height), dpi=150, layout="constrained")
    axes = tuple(figure.subplots(plots, squeeze=False)[:, 0])
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
