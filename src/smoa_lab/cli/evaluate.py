"""``smoa eval``: score a run, or an untouched model, on held-out questions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import print_json, print_table, reporting, score


class Protocol(StrEnum):
    """How answers are scored."""

    likelihood = "likelihood"
    lm_eval = "lm-eval"
    generation = "generation"


def evaluate(
    run: Annotated[Path, typer.Argument(help="A finished run's folder, or a config file for the untouched model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change, e.g. data.tasks=[piqa].")] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="Likelihood of the answers, the same through lm-eval, or generated text.")
    ] = (Protocol.likelihood),
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch when generating.")] = 16,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams when generating; 1 is greedy.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the result, with every text, to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")] = False,
) -> None:
    """Score a run's adapter, or an untouched model, on held-out questions."""
    with reporting():
        from smoa_lab.runs.evaluate_run import evaluate as run_evaluation
        from smoa_lab.runs.evaluate_run import open_run

        config, adapter = open_run(run, overrides)
        result = run_evaluation(config, adapter, protocol.value, batch_size, num_beams, output)
        if json:
            print_json(result)
        else:
            _print_scores(result)


def _print_scores(result: dict[str, Any]) -> None:
    columns = {name: None for scores in result["scores"].values() for name in scores if not name.endswith("_stderr")}
    rows = [[task, *(_cell(scores, name) for name in columns)] for task, scores in result["scores"].items()]
    typer.echo(f"{result['adapter'] or 'untouched model'}, by {result['protocol']}")
    print_table(["task", *(name.replace("_", " ") for name in columns)], rows)


def _cell(scores: dict[str, Any], name: str) -> str:
    value = scores.get(name)
    return str(value) if isinstance(value, int) else score(value, scores.get(f"{name}_stderr"))
