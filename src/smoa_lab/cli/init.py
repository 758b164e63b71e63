"""``smoa init``: writes a config for a model and data, with what a step of it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import AsJson, print_json, reporting

Taken = TypeVar("Taken")


def init(
    config: Annotated[Path | None, typer.Argument(help="YAML file to write; NAME.yaml for data called NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or gemma3-270m, smollm2-135m.")] = None,
    data: Annotated[str | None, typer.Option(help="File or folder of rows, a data set of the Hub, or a task.")] = None,
    parameters: Annotated[
        str | None, typer.Option(help="How many to train: a number, a share such as 0.1%, or lora:8, LoRA's of a rank.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="How long training may take.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base model: float32, bfloat16 or float16; else what suits the machine.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure three steps.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; what is not given is left to smoa.")] = False,
    json: AsJson = False,
) -> None:
    """Write a commented config for a model and data: ask what is not given, look at both, measure three steps."""
    with reporting("accelerate", "datasets", *DRAWING, "psutil", "trl"):
        from smoa.atomic import write_whole
        from smoa_lab.budget import budget_choice
        from smoa_lab.starting.config_text import config_text, expected, plain_report
        from smoa_lab.starting.machine import this_machine
        from smoa_lab.starting.measure_steps import measure as measure_steps
        from smoa_lab.starting.proposal import known_dtype, propose
        from smoa_lab.starting.survey import check_place, look_at_data, look_at_model

        ask = _Questions(asks=not yes and _on_terminal())
        chosen_dtype = None if dtype is None else known_dtype(dtype)
        _check_minutes(minutes, measure)
        if config is not None:
            _free(str(config))
        facts = ask("model", model, "Model (Hub id, folder, or smollm2-135m)", "smollm2-135m", look_at_model)
        place = ask("data", data, "Data (file, folder, data set of the Hub, or task)", None, check_place)
        choice = ask.or_default(
            "parameters",
            parameters,
            "Parameters (number, 0.1%, or lora:8)",
            "lora:8",
            lambda amount: budget_choice(facts.shapes, facts.parameters, amount),
        )
        if ask.asks and minutes is None and measure:
            minutes = ask("minutes", None, "Minutes that training may take (0: as long as it takes)", "0", _minutes)
        file = config or ask.or_default("config", None, "Write to", _name(place), _free)
        found, machine = look_at_data(place, facts), this_machine()
        proposal, measured = propose(facts, found, choice, machine, chosen_dtype), None
        if measure:
            proposal, measured = measure_steps(proposal)
            proposal = proposal.within(minutes, measured.seconds) if minutes else proposal
        write_whole(_free(str(file)), config_text(file, proposal, machine, measured))
        if json:
            print_json(plain_report(file, proposal, measured))
            return
        lines = expected(proposal, machine, measured)
        typer.echo("\n".join([f"{file}: written", *lines, f"Train: smoa train {file}"]))


class _Questions:
    """Takes an option, asks for it on a terminal, where a wrong answer is asked for again, or names what is missing."""

    def __init__(self, asks: bool) -> None:
        self.asks = asks

    def __call__(
        self, option: str, given: str | None, question: str, default: str | None, take: Callable[[str], Taken]
    ) -> Taken:
        from smoa.errors import ConfigError, SmoaError

        if given is not None:
            return take(given)
        if not self.asks:
            raise ConfigError(f"--{option} is missing: {question}")
        while True:
            try:
                return take(typer.prompt(question, default=default, err=True))
            except SmoaError as error:
                typer.echo(f"error: {error}", err=True)

    def or_default(
        self, option: str, given: str | None, question: str, default: str, take: Callable[[str], Taken]
    ) -> Taken:
        """What is given or, where it can be asked, answered; else the default."""
        return self(option, given or (None if self.asks else default), question, default, take)


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _check_minutes(minutes: float | None, measure: bool) -> None:
    from smoa.errors import ConfigError

    if minutes is not None and not measure:
        raise ConfigError("--minutes needs to know what a step takes; leave out --no-measure, or --minutes")


def _minutes(text: str) -> float:
    from smoa.errors import ConfigError

    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise ConfigError(f"minutes: {text!r} is not a number of minutes, such as 30")
    return minutes


def _name(place: str) -> str:
    """The config's file, called after the data."""
    return f"{Path(place.rstrip('/')).name.partition('.')[0] or 'run'}.yaml"


def _free(name: str) -> Path:
    """The file to write, which must not exist; raises ConfigError."""
    from smoa.atomic import check_place
    from smoa.errors import ConfigError

    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: the name of a config ends in .yaml; write {file}.yaml")
    check_place(file, is_new=True)
    return file
