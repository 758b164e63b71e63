"""``smoa compare`` tunes and compares methods, on a model and data or as a YAML file says; ``smoa tune`` searches the
learning rate of one run."""

from __future__ import annotations

import math
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import (
    AsJson,
    Data,
    Metric,
    Model,
    Overrides,
    Settings,
    Trusted,
    overridden,
    print_json,
    reporting,
)

SHOWN = ("smoa_lab.study", "smoa_lab.data", "smoa_lab.base_models")
"""Whose log a study shows: what its runs tell lies in their folders."""


def compare(
    study: Annotated[str | None, typer.Argument(help="A study's file or folder. Or give --model and --data.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to write into it, e.g. tolerance=0.2.")] = None,
    model: Model = None,
    data: Data = None,
    methods: Annotated[
        str | None, typer.Option(help="Without a file: what is compared, by commas.", show_default="lora,smoa")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Without a file: how many each trains, as for smoa init.", show_default="lora:8")
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Or at several: ranks of LoRA with as many, e.g. 1,4,16.")] = None,
    settings: Settings = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Final runs of each; more than before go on.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Nothing starts later; a new study is fitted.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this entry or budget; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, here unless --ray-address is given.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Run on the Ray cluster at this HOST:PORT, or auto.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report the finished runs.")] = False,
    metric: Metric = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Compare fine-tuning methods on your data: one search of the learning rate for each, fresh seeds, and a verdict.

    With --model and --data it writes the study's file, in studies/NAME or the folder that is named: edit it, and run it
    again.
    """
    with reporting(*SHOWN):
        from smoa.errors import ConfigError
        from smoa_lab.budget import method_settings
        from smoa_lab.study.finished import read_finished
        from smoa_lab.study.report import report
        from smoa_lab.study.run_study import fit, work, work_on_ray, work_side_by_side
        from smoa_lab.study.study import STUDY, load_study
        from smoa_lab.study.written import METHODS, ask, check, default_study, write_study

        deadline = time.time() + 60 * minutes if minutes is not None else math.inf
        words = [*([study] if study and "=" in study else []), *(overrides or [])]
        place, changes = None if study is None or "=" in study else Path(study), overridden(words, "shared.")
        if model is not None and data is not None:
            names = [name.strip().lower() for name in methods.split(",")] if methods else METHODS
            ranks, own = [int(rank) for rank in sizes.split(",")] if sizes else [], method_settings(settings or [])
            values = default_study(model, data, names, parameters, changes, own, ranks)
            file = write_study(values, place)
        elif place is not None and not any((model, data, methods, parameters, sizes, settings)):
            file = place / STUDY if place.is_dir() else place
        else:
            of_new = "--methods, --parameters, --sizes and --set"
            raise ConfigError(f"give a study, or both --model and --data, with which {of_new} go")
        failed = dict[str, str]()
        if not report_only:
            asked = ask(file, changes, seeds)
            check(asked, only or [])
            with redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout, which is kept free for results
                if minutes is not None and not any("/" in job for job in read_finished(asked)):  # else it is fitted
                    fit(file, deadline - time.time(), workers)
                if ray_address is not None:
                    failed = work_on_ray(file, only or [], deadline, workers, ray_address)
                elif workers > 1:
                    failed = work_side_by_side(file, only or [], deadline, workers)
                else:
                    failed = work(file, only or [], deadline)
        made = report(load_study(file), failed)
        if json:
            print_json(made.summary)
            return
        for sentence in made.verdict:
            typer.echo(f"{sentence}\n")
        for title, table in made.tables.items():
            typer.echo(f"{title}\n")
            table.print()
            typer.echo("")
        typer.echo(f"Table, pictures and runs: {file.parent}")


def tune(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, as for `smoa train`.")],
    overrides: Overrides = None,
    max_runs: Annotated[int, typer.Option(min=3, help="Rates to try at most.")] = 6,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Find the learning rate with the lowest loss on validation rows; print the line for the config."""
    with reporting(*SHOWN):
        from smoa.errors import ConfigError
        from smoa_lab.config.run import load_config
        from smoa_lab.pages.tables import Table, number
        from smoa_lab.study.finished import chosen, read_finished
        from smoa_lab.study.run_study import work
        from smoa_lab.study.search import rate_text
        from smoa_lab.study.written import ask, check, tuning_study, write_study

        run = load_config(config, overrides)
        file = write_study(tuning_study(run, max_runs), run.folder.with_name(f"{run.folder.name}-tuning"))
        study = ask(file, [f"tuning.max_runs={max_runs}"])
        check(study)
        work(file)  # its one entry's error ends the command
        found = chosen(study, read_finished(study), next(iter(study.entries)))
        assert found is not None
        if not any(loss is not None for loss in found.losses.values()):
            told = f"every rate down to {rate_text(min(found.losses))} diverged; start from a much lower one"
            raise ConfigError(f"training.learning_rate: {told}, in another training.output_dir")
        losses = {rate_text(rate): loss for rate, loss in found.losses.items()}
        if json:
            known = {"learning_rate": found.learning_rate, "tried": found.tried, "interior": found.place != "edge"}
            print_json({**known, "losses": losses})
            return
        rows = [[rate, "diverged" if loss is None else number(loss, 4)] for rate, loss in losses.items()]
        Table(["learning rate", "validation loss"], rows).print()
        if found.place == "edge":
            typer.echo("\nThe best is at the boundary of what was tried: search on with a higher --max-runs.")
        if found.place == "vertex":
            typer.echo(
                f"\nIt is the vertex of a parabola; the adapter that is kept was trained at {rate_text(found.tried)}."
            )
        typer.echo(f"\nPut this under training:\n\n  learning_rate: {rate_text(found.learning_rate)}")
