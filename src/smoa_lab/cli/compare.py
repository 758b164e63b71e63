"""``smoa compare``: tunes and compares methods as a study's YAML file says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import AsJson, TrustRemoteCode, print_json, reporting

if TYPE_CHECKING:
    from smoa_lab.study.crews.ray_crew import RayCrew
    from smoa_lab.study.study_file import Study

HEADER = ["entry", "trained", "seeds", "loss", "accuracy %", "loss difference", "", "accuracy difference %", ""]
Reported = tuple[Any, Sequence[str], Sequence[Sequence[str]]]
"""A report's summary for JSON, and the header and lines of its table."""


def compare(
    study: Annotated[Path, typer.Argument(help="YAML file of the study; configs/studies has ready ones.")],
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
    pack: Annotated[
        bool, typer.Option("--pack", help="Afterwards move all finished runs into one compressed file, runs.jsonl.gz.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Tune all methods in the same way, run each with fresh seeds, and report which is better, same or worse."""
    on_ray = workers > 1 or ray_address is not None
    with reporting("accelerate", *DRAWING, "filelock", *(["ray"] if on_ray else [])):
        import transformers

        from smoa.atomic import check_place
        from smoa_lab.pages.tables import Table
        from smoa_lab.study.crews.ray_crew import RayCrew
        from smoa_lab.study.packing import pack as pack_runs
        from smoa_lab.study.study_file import load_study

        _check_options(report_only, bool(only) or on_ray)
        checked = load_study(study, overrides, trust_remote_code)
        check_place(checked.folder / "summary.json")
        transformers.utils.logging.set_verbosity_error()  # a line for every new classification head
        if not report_only:
            _run(checked, only or [], RayCrew(checked, workers, ray_address) if on_ray else None)
        if pack:
            pack_runs(checked.folder)
        summary, header, lines = _sequence(checked) if checked.kind == "sequence" else _entries(checked)
        if json:
            print_json(summary)
            return
        Table(header, lines).print()
        typer.echo(f"\nTable, figures and runs: {checked.folder}")


def _check_options(report_only: bool, about_runs: bool) -> None:
    from smoa.errors import ConfigError

    if report_only and about_runs:
        raise ConfigError(
            "--only, --workers and --ray-address are about runs, and --report-only runs nothing; leave one out"
        )


def _run(study: Study, only: Sequence[str], workers: RayCrew | None) -> None:
    """Run what is missing. Ray tells of dead workers on stdout, which is kept free for results."""
    from smoa_lab.study.comparison import Comparison

    if workers is None:
        Comparison(study).run(only)
        return
    with redirect_stdout(sys.stderr), workers as crew:
        Comparison(study).run(only, crew)


def _entries(study: Study) -> Reported:
    """Report a study of any other kind."""
    from smoa_lab.study.report.results.rows import as_json, difference_cells
    from smoa_lab.study.report.study_report import report

    rows = report(study)
    lines = [
        [
            row.entry,
            f"{row.parameters:,}",
            str(len(row.seeds)),
            f"{row.loss:.4f}",
            f"{100 * row.accuracy:.1f}",
            *difference_cells(row, row.loss_difference, 1, 4)[1:],
            *difference_cells(row, row.accuracy_difference, 100, 1)[1:],
        ]
        for row in rows
    ]
    return as_json(rows), HEADER, lines


def _sequence(study: Study) -> Reported:
    """Report a study of kind ``sequence``."""
    from smoa_lab.study.report.sequence.sequence_report import sequence_report
    from smoa_lab.study.report.sequence.sequence_tables import EQUAL_HEADER, equal_lines

    summary = sequence_report(study)
    return summary, EQUAL_HEADER, equal_lines(summary)
