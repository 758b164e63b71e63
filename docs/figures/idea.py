"""Draws docs/images/idea.svg: what SMoA does to one weight. Run with `make figures`.

The weight is made for the picture: each band of its spectrum has its own rows and columns, so that it is visible, and
both are shuffled. smoa computes the partition that is drawn.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, FancyArrowPatch, Rectangle
from torch import Tensor

from smoa.partition import Blocks
from smoa.spectrum import make_partition

OUT = Path(__file__).parents[1] / "images"
NUM_BLOCKS, ROWS, COLS, RANK = 4, 6, 8, 2  # K; rows, columns and rank of one block
ZOOMED = 2  # the block that the lower half shows
CELL, ZOOM = 0.105, 1.45  # inches per entry; magnification in the lower half
STRIP, GAP = 0.13, 0.05
# Luminance rises from the first band to the last, so the four differ in gray too.
BANDS = ["#0b3c5d", "#2f7fa8", "#7cc0c9", "#d3e8c8"]
TRAINED, INK, MUTED = "#f0a05a", "#1a1a1a", "#5a5a5a"
LEFT, RIGHT, TOP, MIDDLE = 0.62, 4.98, 4.85, 0.72  # positions of the upper half's matrices and of the equation


def example_weight() -> Tensor:
    """(24, 32): band k of the spectrum is on 6 rows and 8 columns; with some noise, shuffled."""
    torch.manual_seed(3)
    weight = 0.17 * torch.randn(NUM_BLOCKS * ROWS, NUM_BLOCKS * COLS)
    for k, sigma in enumerate([4.6, 3.6, 2.8, 2.1]):
        u = torch.linalg.qr(torch.randn(ROWS, ROWS)).Q
        v = torch.linalg.qr(torch.randn(COLS, ROWS)).Q
        weight[k * ROWS : (k + 1) * ROWS, k * COLS : (k + 1) * COLS] += sigma * u @ v.T
    return weight[torch.randperm(len(weight))][:, torch.randperm(weight.shape[1])]


def box(ax: Axes, x: float, y: float, width: float, height: float, **style: object) -> None:
    """Draw a rectangle whose upper left corner is (x, y)."""
    ax.add_patch(Rectangle((x, y - height), width, height, **{"linewidth": 0, **style}))


def matrix(ax: Axes, values: Tensor, x: float, y: float, cell: float) -> None:
    """Draw magnitudes as shades of gray, with the upper left corner at (x, y)."""
    height, width = (size * cell for size in values.shape)
    extent = (x, x + width, y - height, y)
    ax.imshow(
        values.abs(), cmap="Greys", vmin=0, vmax=values.abs().max() * 0.85, extent=extent, interpolation="nearest"
    )
    box(ax, x, y, width, height, fill=False, edgecolor=INK, linewidth=0.9)


def natural_order(ax: Axes, weight: Tensor, partition: Blocks) -> None:
    """Draw the weight in its natural order; strips show the block of each row and column."""
    matrix(ax, weight, LEFT, TOP, CELL)
    for i, k in enumerate(partition.row_labels.tolist()):
        box(ax, LEFT - GAP - STRIP, TOP - i * CELL, STRIP, CELL, color=BANDS[k])
    for j, k in enumerate(partition.col_labels.tolist()):
        box(ax, LEFT + j * CELL, TOP + GAP + STRIP, CELL, STRIP, color=BANDS[k])
    height, width = (size * CELL for size in weight.shape)
    ax.text(LEFT - 0.25, TOP - height / 2, "m outputs", ha="right", va="center", rotation=90, fontsize=9.5)
    ax.text(LEFT + width / 2, TOP + 0.24, "n inputs", ha="center", va="bottom", fontsize=9.5)
    score_key(ax, LEFT, TOP - height - 0.2)


def score_key(ax: Axes, x: float, y: float) -> None:
    """Draw the key to the colors of the strips."""
    ax.text(x, y, "low score: leading\nsingular directions", ha="left", va="center", fontsize=8.5, color=MUTED)
    ax.text(x + 3.36, y, "high score: tail\nof the spectrum", ha="right", va="center", fontsize=8.5, color=MUTED)
    for k, color in enumerate(BANDS):
        box(ax, x + 1.3 + 0.22 * k, y + STRIP / 2, 0.22, STRIP, color=color)


def sorted_order(ax: Axes, weight: Tensor) -> None:
    """Draw the weight sorted by score, with diagonal blocks framed and everything else faded."""
    matrix(ax, weight, RIGHT, TOP, CELL)
    height, width = ROWS * CELL, COLS * CELL
    for k, color in enumerate(BANDS):
        top, left = TOP - k * height, RIGHT + k * width
        box(ax, RIGHT - GAP - STRIP, top, STRIP, height, color=color)
        box(ax, left, TOP + GAP + STRIP, width, STRIP, color=color)
        ax.text(RIGHT - 0.25, top - height / 2, f"$I_{k + 1}$", ha="right", va="center")
        ax.text(left + width / 2, TOP + 0.24, f"$J_{k + 1}$", ha="center", va="bottom")
        box(ax, RIGHT, top, k * width, height, color="white", alpha=0.6)
        box(ax, left + width, top, (NUM_BLOCKS - 1 - k) * width, height, color="white", alpha=0.6)
        box(ax, left, top, width, height, fill=False, edgecolor=INK, linewidth=1.8, zorder=4)
    note = {"ha": "center", "va": "center", "fontsize": 10, "color": INK}
    ax.text(RIGHT + 3 * width, TOP - height, r"$\Delta W = 0$", **note)
    ax.text(RIGHT + width, TOP - 3 * height, r"$\Delta W = 0$", **note)


def factor(ax: Axes, x: float, y: float, width: float, height: float) -> None:
    """Draw a trained factor. Nothing else in the picture is orange or hatched."""
    box(ax, x, y, width, height, facecolor=TRAINED, hatch="////", edgecolor="white")
    box(ax, x, y, width, height, fill=False, edgecolor=INK, linewidth=0.9)


def equation(ax: Axes, anchor: Tensor) -> None:
    """Draw the update of one block, ΔW = s (B A) ⊙ W, from left to right."""
    cell = CELL * ZOOM
    height, width, rank = ROWS * cell, COLS * cell, RANK * cell
    top = MIDDLE + height / 2
    update_at, b_at, anchor_at = LEFT, 2.92, 5.33
    a_at = b_at + rank + 0.08
    matrix(ax, (torch.randn(ROWS, RANK) @ torch.randn(RANK, COLS)) * anchor, update_at, top, cell)
    factor(ax, b_at, top, rank, height)
    factor(ax, a_at, MIDDLE + rank / 2, width, rank)
    matrix(ax, anchor, anchor_at, top, cell)
    for x, y, name in [
        (update_at + width / 2, top, r"$\Delta W[I_k, J_k]$"),
        (b_at + rank / 2, top, "$B_k$"),
        (a_at + width / 2, MIDDLE + rank / 2, "$A_k$"),
        (anchor_at + width / 2, top, "$W[I_k, J_k]$"),
    ]:
        ax.text(x, y + 0.07, name, ha="center", va="bottom")
    scale = r"$s_k = \frac{\alpha}{r} \cdot \frac{4}{\mathrm{rms}\; W[I_k, J_k]}$"
    ax.text(a_at + width / 2, MIDDLE - height / 2 + 0.1, scale, ha="center", va="center", fontsize=12)
    for x, sign, size in [
        (update_at + width + 0.2, "=", 16),
        (b_at - 0.4, "$s_k$", 15),
        (b_at - 0.13, "(", 24),
        (a_at + width + 0.13, ")", 24),
        ((a_at + width + 0.2 + anchor_at) / 2, r"$\odot$", 17),
    ]:
        ax.text(x, MIDDLE, sign, ha="center", va="center_baseline", fontsize=size, fontname="DejaVu Serif")
    zoom_lines(ax, anchor_at, anchor_at + width, top)


def zoom_lines(ax: Axes, left: float, right: float, y: float) -> None:
    """Connect the block of the upper half with its enlargement."""
    corner, bottom = RIGHT + ZOOMED * COLS * CELL, TOP - (ZOOMED + 1) * ROWS * CELL
    for start, end in [(corner, left), (corner + COLS * CELL, right)]:
        style = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
        ax.add_patch(ConnectionPatch((start, bottom), (end, y), "data", **style))


def legend(ax: Axes, x: float) -> None:
    """Draw the legend: what is trained, how much of it, and what is frozen."""
    factor(ax, x, MIDDLE + 0.5, 0.26, 0.2)
    ax.text(x + 0.36, MIDDLE + 0.4, "trained:", va="center", fontsize=9.5)
    ax.text(x + 0.36, MIDDLE + 0.17, r"$r\,(m+n)\,/\,K$", va="center", fontsize=11)
    ax.text(x + 0.36, MIDDLE - 0.04, "per layer", va="center", fontsize=9.5)
    box(ax, x, MIDDLE - 0.25, 0.26, 0.2, facecolor="#bdbdbd", edgecolor=INK, linewidth=0.9)
    ax.text(x + 0.36, MIDDLE - 0.35, "frozen", va="center", fontsize=9.5)


def captions(ax: Axes) -> None:
    """Write above each part what happens in it."""
    style = {"ha": "left", "va": "bottom", "fontsize": 11, "fontweight": "bold"}
    ax.text(LEFT, TOP + 0.56, "1  Score rows and columns of W, once", **style)
    ax.text(RIGHT, TOP + 0.56, "2  Sort, and cut into K aligned blocks", **style)
    ax.text(LEFT, 1.62, "3  Train one low-rank pair per block", **style)


def main() -> None:
    """Draw the picture, and save it as SVG and PNG."""
    plt.rcParams.update({"svg.hashsalt": "smoa", "svg.fonttype": "path", "mathtext.fontset": "cm", "font.size": 11})
    weight = example_weight()
    partition = make_partition(weight, NUM_BLOCKS)
    rows = torch.cat([partition.rows(k) for k in range(NUM_BLOCKS)])
    cols = torch.cat([partition.cols(k) for k in range(NUM_BLOCKS)])
    figure = plt.figure(figsize=(8.6, 5.75))
    ax = figure.add_axes((0, 0, 1, 1))
    natural_order(ax, weight, partition)
    sorted_order(ax, weight[rows][:, cols])
    equation(ax, weight[partition.rows(ZOOMED)][:, partition.cols(ZOOMED)])
    legend(ax, 7.05)
    captions(ax)
    middle = TOP - NUM_BLOCKS * ROWS * CELL / 2
    ax.add_patch(FancyArrowPatch((4.08, middle), (4.56, middle), arrowstyle="-|>", mutation_scale=16, color=INK))
    ax.set(xlim=(0, 8.6), ylim=(0, 5.75), aspect="equal")
    ax.axis("off")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "idea.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
