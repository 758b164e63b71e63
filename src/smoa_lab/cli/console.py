"""What all subcommands share: the log on stderr, errors in one line, JSON, tables, and scores as text."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from smoa_lab.basics.extras import advice, missing
from smoa_lab.basics.foreign import ignore_foreign_warnings
from smoa_lab.basics.plain_json import json_text

FULL_DISK = ("No space left", "quota exceeded", "inline_container", "iostream error")
"""Words of the errors of Python, safetensors and torch when a disk is full."""
WIDEST = 100_000
"""Characters of a table's line in a pipe."""


@contextmanager
def reporting(*modules: str) -> Iterator[None]:
    """Show the lab's log on stderr; an error of smoa's ends the command with one message and exit code 1.

    So does a missing package of one of smoa's extras: at once if it is of ``modules``, which the command always needs.
    """
    lacking = missing(*modules)
    if lacking is not None:
        raise failed(f"this command {lacking}")
    from smoa.errors import SmoaError

    ignore_foreign_warnings()
    try:
        with _logging():
            yield
    except SmoaError as error:
        raise failed(str(error)) from error
    except ImportError as error:
        lacking = advice(error.name)
        if lacking is None:
            raise
        raise failed(f"this command {lacking}") from error
    except Exception as error:
        if not any(words in str(error) for words in FULL_DISK):
            raise
        raise failed(f"the disk is full ({error}); make room, and run the same command again") from error
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command again to resume from the last checkpoint", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _logging() -> Iterator[None]:
    """Show the lab's log on stderr; on a terminal in color, elsewhere as plain lines and without progress bars."""
    import transformers
    from rich.console import Console
    from rich.logging import RichHandler

    shown: logging.Handler
    if sys.stderr.isatty():
        shown = RichHandler(console=Console(stderr=True), show_level=False, show_path=False)
    else:
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        transformers.utils.logging.disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("smoa_lab")
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(shown)


def failed(message: str) -> typer.Exit:
    """The exit to raise, after printing the error on stderr."""
    from smoa_lab.basics.without_secrets import without_secrets

    typer.echo(f"error: {without_secrets(message)}", err=True)
    return typer.Exit(1)


def print_json(value: Any) -> None:
    """Print JSON and nothing else to stdout."""
    typer.echo(json_text(value))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column aligned left, the others right.

    On a terminal that is too narrow, cells are wrapped. In a pipe or a file they never are, whatever their width.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(header):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = Console(width=WIDEST).measure(table).maximum
    console.print(table)


def score(value: float | None, stderr: float | None = None) -> str:
    """``0.412 ± 0.035``, or a dash where there is no such score."""
    if value is None:
        return "–"
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
