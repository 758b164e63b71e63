"""``smoa merge``: merges an adapter into its base model and saves the result as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from smoa_lab.cli.console import AsJson, Base, TrustRemoteCode, print_json, reporting

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""The choices of smoa.export.merge, whose import would make ``--help`` wait for torch."""


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the saved weights; auto: that of the base. Merging is done in float32.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 2GB.")] = "5GB",
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Merge an adapter into its base model and save the result as a model that needs no adapter."""
    with reporting():
        from smoa_lab.merge import merge_run

        export = merge_run(adapter, output, dtype, base, trust_remote_code, max_shard_size)
        if json:
            print_json(export.to_dict())
            return
        typer.echo(f"{export.folder}: {export.summary()}")
