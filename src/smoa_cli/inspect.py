"""``smoa inspect``: what an adapter did to each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_cli.console import print_json, print_table, reporting


def inspect(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's repository run its own code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show size, norm and rank of the update of every adapted layer."""
    with reporting():
        from smoa.experiments.inspection import inspect as run_inspection

        reports = run_inspection(adapter, base, trust_remote_code)
        if json:
            print_json([report.to_dict() for report in reports])
            return
        rows = [
            [
                report.module,
                f"{report.rows}×{report.columns}",
                f"{report.parameters:,}",
                f"{report.relative_update:.4f}",
                str(report.rank),
                f"{report.effective_rank:.1f}",
            ]
            for report in reports
        ]
        print_table(["layer", "shape", "parameters", "‖ΔW‖/‖W‖", "rank", "effective rank"], rows)
