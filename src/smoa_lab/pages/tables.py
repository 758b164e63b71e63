"""A table, built once and shown in the terminal and in Markdown; among them the table of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoa_lab.data.answers import TITLES, shown_as

WIDEST = 100_000
"""Characters of a line in a pipe."""


@dataclass(frozen=True)
class Table:
    """Rows under a header; ``str`` makes the text of a cell."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def markdown(self, marks: Sequence[str] = ()) -> str:
        """``marks`` align the columns, as in Markdown; without them the first one is text, the others are numbers."""
        rows = [self.header, *self.rows]
        first, *lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
        marks = marks or ["---", *["--:"] * (len(self.header) - 1)]
        return "\n".join([first, f"|{'|'.join(marks)}|", *lines])

    def print(self) -> None:
        """Print the table: the first column aligned left, the others right.

        On a terminal that is too narrow, cells are wrapped. In a pipe or a file they never are, whatever their width.
        """
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for number, name in enumerate(self.header):
            grid.add_column(Text(name), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            grid.add_row(*(Text(str(cell)) for cell in row))
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = Console(width=WIDEST).measure(grid).maximum
        console.print(grid)


def metric_table(evaluation: Mapping[str, Mapping[str, Any]], caption: str = "") -> Table:
    """The metrics at each stage of training, as ``metrics.json`` has them, with their standard errors."""
    known = (name for scores in evaluation.values() for name, score in scores.items() if score is not None)
    names = list(dict.fromkeys(name for name in known if not name.endswith("_stderr")))
    header = ["training", *(name.replace("_", " ") for name in names)]

    def told(scores: Mapping[str, Any], name: str) -> str:
        value, stderr = scores.get(name), scores.get(f"{name}_stderr")
        if value is None or isinstance(value, int):
            return "–" if value is None else f"{value:,}"
        return f"{value:.3f}{spread(stderr)}"

    rows = [[stage, *(told(scores, name) for name in names)] for stage, scores in evaluation.items()]
    return Table(header, rows, caption)


def steps_text(training: Mapping[str, Any]) -> str:
    """How many steps a run took, in what time, and which one's adapter is kept, if not the last one's. A resumed run
    knows only the time of its last part."""
    of_part = ", the last ones" if training.get("resumed") else ""
    best = f" (the best, step {training['best_step']}, is kept)" if training.get("best_step") else ""
    return f"{training['steps']} steps{of_part} in {training['seconds']:.0f} s{best}"


def outcome(metrics: Mapping[str, Any]) -> list[str]:
    """What a run learned and forgot, a line each; less of a run that diverged, whose losses are no numbers."""
    gain, forgot = metrics["gain"] or {}, metrics["forgetting"] or {}
    lines = []
    if None in (gain.get("loss", 0), forgot.get("change", 0)):
        lines.append("Training diverged: a loss is no number.")
    if gain.get("loss") is not None:
        error = spread(gain["loss_stderr"])
        lines.append(f"The loss changed by {gain['loss']:+.3f}{error and f'{error} (standard error, paired by row)'}.")
    for name in (name for name in TITLES if name in gain):
        (times, digits, _), stderr = shown_as(name), gain[f"{name}_stderr"]
        change = f"{times * gain[name]:+.{digits}f}{spread(stderr, digits, times)} points"
        lines.append(f"{TITLES[name].capitalize()} changed by {change}.")
    if forgot.get("change") is not None:
        lines.append(f"Forgotten: {forgot['change']:+.3f}{spread(forgot['stderr'])} nats per token of general text.")
    return lines


def number(value: float | None, digits: int = 3, scale: float = 1) -> str:
    """A number with so many digits, or a dash where there is none."""
    return "–" if value is None else f"{scale * value:.{digits}f}"


def spread(stderr: float | None, digits: int = 3, scale: float = 1) -> str:
    """A standard error, to follow a number; nothing where there is none, as of one row."""
    return "" if stderr is None or math.isnan(stderr) else f" ± {scale * stderr:.{digits}f}"


def score_text(name: str, value: float | None) -> str:
    """A metric's title and value: ``right answers (exact) 75.0 %``."""
    times, digits, sign = shown_as(name)
    return f"{TITLES[name]} {number(value, digits, times)}{sign}"


def counted(number: int, what: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{number:,} {what}{'s' * (number != 1)}"
