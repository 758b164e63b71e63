"""``smoa compare``: tunes and compares methods as a study's YAML file says."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import AsJson, TrustRemoteCode, print_json, reporting


def compare(
    study: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change, e.g. seeds=[0,1].")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run only this entry or budget; may be repeated.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Runs at a time, on this machine unless --ray-address is given.")
    ] = 1,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="Run on the Ray cluster at this HOST:PORT, or auto.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report the finished runs.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Tune all methods by the same search, run each with fresh seeds, and report which is better, same or worse."""
    on_ray = workers > 1 or ray_address is not None
    with reporting():
        from smoa.atomic import check_place
        from smoa.errors import ConfigError
        from smoa_lab.study.comparison import Comparison, load_study
        from smoa_lab.study.ray_executor import RayExecutor
        from smoa_lab.study.report import report

        if report_only and (only or on_ray):
            raise ConfigError(
                "--only, --workers and --ray-address are about runs, and --report-only runs nothing; leave one out"
            )
        checked = load_study(study, overrides)
        check_place(checked.folder / "summary.json")
        if not report_only:
            comparison = Comparison(checked)
            if on_ray:  # Ray reports dead workers on stdout, which is kept free for results
                with redirect_stdout(sys.stderr), RayExecutor(checked, workers, ray_address) as executor:
                    comparison.run(only or [], executor)
            else:
                comparison.run(only or [])
        made = report(checked)
        if json:
            print_json(made.summary)
            return
        for title, table in made.results().items():
            typer.echo(f"{title}\n")
            table.print()
            typer.echo("")
        typer.echo(f"Table, figures and runs: {checked.folder}")
