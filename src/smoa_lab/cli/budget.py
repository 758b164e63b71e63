"""``smoa budget``: lists the r and num_blocks that fit a parameter budget."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from smoa_lab.cli.console import AsJson, TrustRemoteCode, print_json, reporting


def budget(
    model: Annotated[
        str, typer.Argument(help="Hub id, local folder, or gemma3-270m, smollm2-135m; its weights are not loaded.")
    ],
    amount: Annotated[
        str,
        typer.Argument(help="Share of the model, such as 0.1%, a number of parameters, or lora:8, LoRA's of rank 8."),
    ],
    targets: Annotated[
        str, typer.Option(help="Names of the layers to adapt, separated by commas, or all-linear.")
    ] = "all-linear",
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """List the r and num_blocks that fit a parameter budget, with their rank bound and size on disk."""
    with reporting():
        from rich.filesize import decimal

        from smoa_lab.budget import budget_choices
        from smoa_lab.pages.tables import Table

        choices = budget_choices(model, amount, tuple(name.strip() for name in targets.split(",")), trust_remote_code)
        if json:
            print_json([asdict(choice) for choice in choices])
            return
        rows = [
            [
                choice.num_blocks,
                choice.r,
                f"{choice.parameters:,}",
                f"{choice.percent} %",
                decimal(choice.bytes_on_disk),
                choice.rank_bound,
                choice.lora_r,
            ]
            for choice in choices
        ]
        header = ["num_blocks", "r", "parameters", "of model", "on disk", "rank bound", "LoRA's r"]
        Table(header, rows).print()
