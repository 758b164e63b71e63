"""``smoa merge``: base model and adapter into one model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import print_json, reporting


class Dtype(StrEnum):
    """The merged weights' dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Of the saved weights; merging itself is done in float32. auto: as the base.")
    ] = Dtype.auto,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 2GB.")] = "5GB",
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's repository run its own code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge an adapter into its base model and save the result as a model of its own."""
    with reporting():
        from smoa_lab.runs.merge_run import merge as run_merge

        export = run_merge(adapter, output, dtype.value, base, trust_remote_code, max_shard_size)
        if json:
            print_json(export.to_dict())
            return
        typer.echo(f"{export.folder}: {export.summary()}")
