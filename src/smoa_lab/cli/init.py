"""``smoa init``: writes a config for a model and data, with what a step of it takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import AsJson, Dtype, print_json, reporting

Taken = TypeVar("Taken")


def init(
    config: Annotated[Path | None, typer.Argument(help="YAML file to write; NAME.yaml for data called NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="model.name: Hub id, folder, or gemma3-270m, smollm2-135m.")] = None,
    data: Annotated[
        str | None, typer.Option(help="data: file or folder of rows, a data set of the Hub, or a task.")
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="How many to train: a number, a share such as 0.1%, or lora:8, as many as LoRA of rank 8, the default."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes to train at most; by default 3 epochs.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="model.dtype; by default what suits the machine.", show_default=False),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure three steps.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; use defaults for what is not given.")] = False,
    json: AsJson = False,
) -> None:
    """Write a commented config for your model and data: ask for what is missing, and measure three steps."""
    with reporting("datasets", *DRAWING, "trl"):
        from smoa.atomic import write_whole
        from smoa.errors import ConfigError
        from smoa_lab import init
        from smoa_lab.budget import budget_choice

        if minutes is not None and not measure:
            raise ConfigError("--minutes needs to know what a step takes; leave out --no-measure, or --minutes")
        if config is not None:
            _free(str(config))
        asks = not yes and _on_terminal()
        question = "Model (Hub id, folder, or smollm2-135m)"
        facts = _taken(asks, "model", model, init.look_at_model, question, "smollm2-135m")
        question = "Data (file, folder, data set of the Hub, or task)"
        place = _taken(asks, "data", data, init.check_data, question, None)
        choice = _taken(
            asks,
            "parameters",
            parameters or (None if asks else init.PARAMETERS),
            lambda amount: budget_choice(facts.shapes, facts.parameters, amount),
            "Parameters (number, 0.1%, or lora:8)",
            init.PARAMETERS,
        )
        if asks and minutes is None and measure:
            question = "Minutes that training may take (0: as long as it takes)"
            minutes = _taken(asks, "minutes", None, _minutes, question, "0")
        name = str(init.file_for(place))
        file = config or _taken(asks, "config", None if asks else name, _free, "Write to", name)
        rows, machine = init.look_at_data(place, facts), init.this_machine()
        proposal, measured = init.propose(facts, rows, choice, machine, dtype), None
        if measure:
            proposal, measured = init.measure(proposal)
            proposal = proposal.within(minutes, measured.seconds) if minutes else proposal
        write_whole(_free(str(file)), init.config_text(file, proposal, measured))
        if json:
            took = measured and {"seconds_per_step": measured.seconds, "peak_memory_bytes": measured.memory}
            values = proposal.values(init.output_dir(file))
            print_json({"file": str(file), "config": values, "steps": proposal.all_steps, "measured": took})
            return
        lines = init.expected(proposal, measured)
        typer.echo("\n".join([f"{file}: written", *lines, f"Train: smoa train {file}"]))


def _taken(
    asks: bool, option: str, given: str | None, take: Callable[[str], Taken], question: str, default: str | None
) -> Taken:
    """What is taken of an option or, where it can be asked, of an answer; a wrong answer is asked for again."""
    from smoa.errors import ConfigError, SmoaError

    if given is not None:
        return take(given)
    if not asks:
        raise ConfigError(f"--{option} is missing: {question}")
    while True:
        try:
            return take(typer.prompt(question, default=default, err=True))
        except SmoaError as error:
            typer.echo(f"error: {error}", err=True)


def _minutes(answer: str) -> float:
    """The minutes of an answer; raises ConfigError unless they are a number, and at least 0."""
    from smoa.errors import ConfigError

    try:
        minutes = float(answer)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise ConfigError(f"{answer!r} is not a valid number of minutes; give 0 or more")
    return minutes


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _free(name: str) -> Path:
    """The file to write, which must not exist; raises ConfigError."""
    from smoa.atomic import check_place
    from smoa.errors import ConfigError

    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: the name of a config ends in .yaml; write {file}.yaml")
    check_place(file, is_new=True)
    return file
