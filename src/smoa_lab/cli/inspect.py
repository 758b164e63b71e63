"""``smoa inspect``: shows what an adapter changed in each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import print_json, print_table, reporting
from smoa_lab.cli.options import AsJson, Base, TrustRemoteCode


def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="Folder of a run, or of an adapter; several side by side.")],
    against: Annotated[list[Path] | None, typer.Option(hidden=True)] = None,
    base: Base = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts to this file.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Show layers whose name contains this in detail on the page; may be repeated."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Show size, norm, ranks and spectral coverage of the update of every adapted layer."""
    with reporting(*(DRAWING if html else ())):
        from smoa.atomic import check_place
        from smoa_lab.inspection.layer_reports import inspect_layers

        if against:
            typer.echo(
                "--against is deprecated and will be removed in 0.4; name the adapters one after another", err=True
            )
        if html is not None:
            check_place(html)
        found = {place: inspect_layers(place, base, trust_remote_code) for place in (*adapters, *(against or []))}
        if html is not None:
            _write_page(html, found, layer or [])
        if json:
            print_json(_plain(found))
            return
        for place, layers in found.items():
            if len(found) > 1:
                typer.echo(f"\n{place}")
            print_table(
                ["layer", "shape", "parameters", "‖ΔW‖/‖W‖", "‖ΔW‖₂/‖W‖₂", "rank", "bound", "stable rank", "coverage"],
                [_cells(one) for one in layers],
            )
            far = sum(one.moved_too_far for one in layers)
            if far:
                typer.echo(f"\n! {far} of {len(layers)} layers were moved far: the model may have forgotten much.")


def _write_page(file: Path, found: dict[Path, Any], layers: list[str]) -> None:
    from smoa_lab.drawing.pages import write_page
    from smoa_lab.inspection.inspection_page import inspection_page

    reports = {name: found[place] for place, name in _names(list(found)).items()}
    write_page(file, inspection_page(f"Inside {', '.join(reports)}", reports, layers))
    typer.echo(f"Page: {file}", err=True)


def _names(places: list[Path]) -> dict[Path, str]:
    """The run's name instead of ``adapter``; of several with one name, the whole path."""
    names = {place: place.parent.name if place.name == "adapter" else place.name for place in places}
    return {place: str(place) if list(names.values()).count(name) > 1 else name for place, name in names.items()}


def _plain(found: dict[Path, Any]) -> Any:
    """One adapter as a list of layers, several by path."""
    plain = {str(place): [report.to_dict() for report in reports] for place, reports in found.items()}
    return plain if len(plain) > 1 else next(iter(plain.values()))


def _cells(report: Any) -> list[str]:
    return [
        report.module,
        f"{report.rows}×{report.columns}",
        f"{report.parameters:,}",
        report.told("relative_update"),
        report.told("relative_spectral_norm"),
        str(report.rank),
        "–" if report.rank_bound is None else str(report.rank_bound),
        f"{report.stable_rank:.1f}",
        f"{report.coverage:.3f}",
    ]
