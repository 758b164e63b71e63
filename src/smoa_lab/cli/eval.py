"""``smoa eval``: scores a run, or an untouched model, on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import AsJson, Base, TrustRemoteCode, print_json, reporting


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or a config file for the untouched model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change, e.g. data.max_length=512.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Score a run's adapter, or an untouched model, on held-out rows."""
    with reporting():
        from smoa.atomic import write_whole
        from smoa_lab.basics.atomic import check_place
        from smoa_lab.basics.plain import json_text
        from smoa_lab.evaluate import evaluate_run
        from smoa_lab.open_run import open_run
        from smoa_lab.pages.tables import score_table
        from smoa_lab.training.run_folder import RunFolder

        if output is not None:
            check_place(output, is_new=True)
        config, adapter = open_run(run, overrides, base)
        result = evaluate_run(config, adapter, RunFolder(run) if run.is_dir() else None)
        if json:
            print_json(result)
        else:
            typer.echo(result["adapter"] or config.model.name)
            score_table({"": result["scores"]}).without("training").print()
        if output is not None:  # last: whatever happens to the file, the scores are printed
            write_whole(output, json_text(result) + "\n")
