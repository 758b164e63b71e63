"""``smoa init``: writes a config for a model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import AsJson, BaseDtype, print_json, reporting


def init(
    model: Annotated[
        str,
        typer.Option(
            prompt="Model (Hub id, folder, or smollm2-135m)",
            help="model.name: Hub id, folder, or gemma3-270m, smollm2-135m.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            prompt="Data (file, folder, data set of the Hub, or named set)",
            help="data.train: file or folder of rows, a data set of the Hub, or a named set such as csqa.",
        ),
    ],
    config: Annotated[Path | None, typer.Argument(help="YAML file to write; NAME.yaml for data called NAME.")] = None,
    parameters: Annotated[
        str,
        typer.Option(help="How many to train: a number, a share such as 0.1%, or lora:8, as many as LoRA of rank 8."),
    ] = "lora:8",
    dtype: BaseDtype = None,
    json: AsJson = False,
) -> None:
    """Write a commented config for your model and data; ask for them if they are not given."""
    with reporting():
        from smoa.atomic import write_whole
        from smoa.errors import ConfigError
        from smoa_lab import init
        from smoa_lab.basics.atomic import check_place

        file = config or init.file_for(data)
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{file}: the name of a config ends in .yaml; write {file}.yaml")
        check_place(file, is_new=True)
        values = init.first_values(model, data, parameters, dtype)
        values["training"]["output_dir"] = f"runs/{file.stem}"
        write_whole(file, init.config_text(file, values))
        if json:
            print_json({"file": str(file), "config": values})
        else:
            typer.echo(f"{file}: written\nTrain: smoa train {file}")
