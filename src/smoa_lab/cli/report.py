"""``smoa report``: writes the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import AsJson, print_json, reporting


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    output: Annotated[Path | None, typer.Option(help="The page's file; RUN/report.html by default.")] = None,
    json: AsJson = False,
) -> None:
    """Write a run's page: scores, loss, answers before and after, what was forgotten, config, how to load it."""
    with reporting(*DRAWING):
        from smoa_lab.report import report_run

        page, missing = report_run(run, output)
        if json:
            print_json({"page": str(page), "missing": missing})
            return
        typer.echo(f"Page: {page}")
        if missing:
            typer.echo(" ".join(missing), err=True)
