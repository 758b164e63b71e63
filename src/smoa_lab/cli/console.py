"""What all subcommands share: options, the log on stderr, errors in one line, and JSON."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from smoa_lab.basics.values import json_text

Base = Annotated[str | None, typer.Option(help="Base model to use instead of the one recorded in the adapter.")]


def _trust(context: typer.Context, option: typer.CallbackParam, given: Any) -> Any:
    """Let this process run the code that an option names, until the command ends."""
    from smoa_lab.basics.settings import TRUSTED, Trust  # here, since it imports pydantic

    setattr(TRUSTED, str(option.name), given)
    context.call_on_close(partial(vars(TRUSTED).update, vars(Trust())))
    return given


def overridden(given: list[str] | None, block: str = "") -> list[str]:
    """The overrides of a command; with ``--metric`` also the one that lets a run, or a study's ``block``, use it."""
    from smoa_lab.basics.settings import TRUSTED

    return [*(given or []), *([f"{block}data.metric=score"] if TRUSTED.metric is not None else [])]


Trusted = Annotated[bool, typer.Option(help="Let the model's repository run its own code.", callback=_trust)]
Metric = Annotated[
    str | None,
    typer.Option(metavar="FILE:NAME", help="Your function that scores.", callback=_trust, is_eager=True),
]
"""Options whose callback does all that they do; commands ignore their values."""
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to change, e.g. training.learning_rate=1e-3.", callback=lambda given: overridden(given)
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Dtype = Literal["float32", "bfloat16", "float16"]
"""The choices of ``model.dtype``, whose import would make ``--help`` wait for torch."""
BaseDtype = Annotated[Dtype | None, typer.Option(help="Dtype of the base; else a run's, or what suits the machine.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.KEY=VALUE", help="Further key of a method; may be repeated."),
]
Adapter = Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")]
Model = Annotated[str | None, typer.Option(help="Without a file: a Hub id, a folder, or gemma3-270m, smollm2-135m.")]
Data = Annotated[str | None, typer.Option(help="Without a file: rows, as a file, a folder or a data set's name.")]


@contextmanager
def reporting(*of: str) -> Iterator[None]:
    """Show warnings and the lab's log, or only that of the packages ``of``, on stderr. An error ends the command with
    its message and exit code 1; for an error that isn't smoa's own, the message begins with the name of its class, and
    ``SMOA_TRACEBACK=1`` shows where it was raised."""
    from smoa.errors import SmoaError

    try:
        with _logging(of or ("smoa_lab",)):
            yield
    except SmoaError as error:
        raise failed(str(error)) from error
    except (typer.Exit, ModuleNotFoundError):  # the latter names an extra to install
        raise
    except Exception as error:
        if os.environ.get("SMOA_TRACEBACK"):
            raise
        raise failed(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command again: a run goes on from its last checkpoint", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _logging(of: tuple[str, ...]) -> Iterator[None]:
    """Show the lab's log on stderr; elsewhere than on a terminal without progress bars."""
    import transformers

    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    shown.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith(of))
    logger = logging.getLogger("smoa_lab")
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(shown)


def failed(message: str) -> typer.Exit:
    """The exit to raise, after printing the error on stderr."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)


def print_json(value: Any) -> None:
    """Print JSON and nothing else to stdout."""
    typer.echo(json_text(value))


def show(text: str, value: Any, as_json: bool) -> None:
    """Print what a command did in words or, where that is asked for, as JSON."""
    print_json(value) if as_json else typer.echo(text)
