"""``smoa inspect``: what an adapter did to each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import print_json, print_table, reporting


def inspect(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    against: Annotated[list[Path] | None, typer.Option(help="Another adapter to show beside it.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures to this file.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="On the page, show layers in detail whose names hold this; may be given more than once."),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's repository run its own code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show size, norm, ranks and spectral coverage of the update of every adapted layer."""
    with reporting():
        from smoa.atomic import write_whole
        from smoa_lab.inspection.layers import inspect as run_inspection
        from smoa_lab.inspection.page import inspection_page

        found = {place: run_inspection(place, base, trust_remote_code) for place in (adapter, *(against or []))}
        if html is not None:
            reports = {_name(place): one for place, one in found.items()}
            write_whole(html, inspection_page(f"Inside {adapter}", reports, layer or []))
            typer.echo(f"Page: {html}", err=True)
        if json:
            print_json(_plain(found))
            return
        for place, layers in found.items():
            if len(found) > 1:
                typer.echo(f"\n{place}")
            print_table(
                ["layer", "shape", "parameters", "‖ΔW‖/‖W‖", "rank", "bound", "effective rank", "coverage"],
                [_cells(one) for one in layers],
            )


def _name(place: Path) -> str:
    """The run's name rather than ``adapter``."""
    return place.parent.name if place.name == "adapter" else place.name


def _plain(found: dict[Path, Any]) -> Any:
    """One adapter as a list of layers, several by path."""
    plain = {str(place): [report.to_dict() for report in reports] for place, reports in found.items()}
    return plain if len(plain) > 1 else next(iter(plain.values()))


def _cells(report: Any) -> list[str]:
    return [
        report.module,
        f"{report.rows}×{report.columns}",
        f"{report.parameters:,}",
        f"{report.relative_update:.4f}",
        str(report.rank),
        "–" if report.rank_bound is None else str(report.rank_bound),
        f"{report.effective_rank:.1f}",
        f"{report.coverage:.3f}",
    ]
