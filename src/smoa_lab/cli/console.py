"""What all subcommands share: log lines to stderr, errors in one line, figures in tables."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


@contextmanager
def reporting() -> Iterator[None]:
    """Show the lab's log on stderr; an error of ours ends the command with one message and exit code 1."""
    import transformers
    from rich.console import Console
    from rich.logging import RichHandler

    from smoa.errors import SmoaError

    plain = logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    terminal = sys.stderr.isatty()
    shown = RichHandler(console=Console(stderr=True), show_level=False, show_path=False) if terminal else plain
    logger = logging.getLogger("smoa_lab")
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    # Between transformers and peft: nothing that a user could do.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    if not terminal:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except SmoaError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    finally:
        logger.removeHandler(shown)


def print_json(value: Any) -> None:
    """For scripts: JSON on stdout and nothing else."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        first, *others = (cell for cell in row)
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        typer.echo("  ".join(cells).rstrip())


def score(value: float | None, stderr: float | None = None, digits: int = 3) -> str:
    """``0.412 ± 0.035``, or a dash where there is no such score."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if stderr is None else f"{value:.{digits}f} ± {stderr:.{digits}f}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
