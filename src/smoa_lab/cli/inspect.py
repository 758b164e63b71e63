"""``smoa inspect``: shows what an adapter changed in each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import AsJson, Base, TrustRemoteCode, print_json, reporting


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
        from smoa_lab.inspect import inspect_layers, layer_table

        if against:
            typer.echo(
                "--against is deprecated and will be removed in 0.4; name the adapters one after another", err=True
            )
        if html is not None:
            check_place(html)
        reports = {place: inspect_layers(place, base, trust_remote_code) for place in (*adapters, *(against or []))}
        if html is not None:
            from smoa_lab.inspect_page import inspection_page
            from smoa_lab.pages.templates import write_page

            names = _names(list(reports))
            by_name = {names[place]: layers for place, layers in reports.items()}
            write_page(html, inspection_page(f"Inside {', '.join(by_name)}", by_name, layer or []))
            typer.echo(f"Page: {html}", err=True)
        if json:
            plain = {str(place): [report.to_dict() for report in layers] for place, layers in reports.items()}
            print_json(plain if len(plain) > 1 else next(iter(plain.values())))
            return
        for place, layers in reports.items():
            if len(reports) > 1:
                typer.echo(f"\n{place}")
            layer_table(layers).without("effective rank").print()
            far = sum(report.moved_too_far for report in layers)
            if far:
                typer.echo(f"\n! {far} of {len(layers)} layers were moved far: the model may have forgotten much.")


def _names(places: list[Path]) -> dict[Path, str]:
    """The run's name instead of ``adapter``; of several with one name, the whole path."""
    names = {place: place.parent.name if place.name == "adapter" else place.name for place in places}
    return {place: str(place) if list(names.values()).count(name) > 1 else name for place, name in names.items()}
