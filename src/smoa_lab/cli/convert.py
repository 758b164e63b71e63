"""``smoa convert``: approximates an adapter by a LoRA, for servers that load nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import AsJson, Base, TrustRemoteCode, print_json, reporting


def convert(
    adapter: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter (then no loss is measured).")],
    output: Annotated[Path, typer.Argument(help="New folder for the LoRA.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of ‖ΔW‖² to keep in every layer, e.g. 0.9.")] = None,
    error: Annotated[float | None, typer.Option(help="Largest ‖ΔW − BA‖/‖ΔW‖ of a layer, e.g. 0.3.")] = None,
    uniform_rank: Annotated[bool, typer.Option(help="Pad all layers to the same rank with zeros.")] = False,
    score: Annotated[bool, typer.Option(help="Measure the loss on the run's held-out questions.")] = True,
    base: Base = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Approximate a SMoA adapter by a LoRA, and measure what that loses of the update and of the task."""
    with reporting():
        from smoa.conversion import RankRule
        from smoa_lab.convert import convert_run
        from smoa_lab.pages.tables import Table

        rule = RankRule(rank, energy, error)
        result = convert_run(adapter, output, rule, base, uniform_rank, score, trust_remote_code)
        if json:
            print_json(result)
            return
        if layers:
            rows = [[layer["module"], layer["rank"], f"{layer['error']:.3f}"] for layer in result["layers"]]
            Table(["layer", "rank", "‖ΔW − BA‖/‖ΔW‖"], rows).print()
        _print_summary(result)


def _print_summary(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['folder']}: LoRA of rank {result['rank']}, {result['parameters']:,} parameters "
        f"(the adapter has {result['adapter_parameters']:,}); ‖ΔW − BA‖/‖ΔW‖ = {result['error']:.3f} over all layers."
    )
    loss = result["loss"]
    if loss is not None:
        typer.echo(
            f"Loss on {loss['questions']} held-out questions: base {loss['base']:.3f}, adapter {loss['adapter']:.3f}, "
            f"LoRA {loss['lora']:.3f} (change {loss['lora_change']:+.3f} ± {loss['lora_change_stderr']:.3f}); "
            f"{100 * loss['gain_kept']:.0f} % of the adapter's gain is kept."
        )
