"""``smoa compare`` tunes and compares methods, on a model and data or as a YAML file says; ``smoa tune`` searches the
learning rate of one run."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from shlex import quote
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
    study: Annotated[str | None, typer.Argument(help="YAML file of a study. Or give --model and --data.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change, e.g. seeds=[0,1].")] = None,
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
    minutes: Annotated[float | None, typer.Option(min=0, help="End by then, with fewer seeds and steps.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this entry or budget; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, here unless --ray-address is given.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Run on the Ray cluster at this HOST:PORT, or auto.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only time a few steps; say what it takes and tells.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report the finished runs.")] = False,
    metric: Metric = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Compare fine-tuning methods on your data: one search of the learning rate for each, fresh seeds, and a verdict.

    With --model and --data it needs no file: it writes one, studies/NAME/study.yaml, which you can edit and run again.
    """
    with reporting(*SHOWN):
        from smoa.errors import ConfigError
        from smoa_lab.basics.plain import portable
        from smoa_lab.budget import method_settings
        from smoa_lab.study.default_study import METHODS, default_study
        from smoa_lab.study.executor import Executor
        from smoa_lab.study.plan import check_folder, study_file
        from smoa_lab.study.planning import outlook, prepare
        from smoa_lab.study.ray_executor import RayExecutor
        from smoa_lab.study.run_study import Comparison
        from smoa_lab.study.study import load_study
        from smoa_lab.study.study_report import report

        began, overrides = time.monotonic(), overridden(overrides, "shared.")
        try:
            ranks = [int(rank) for rank in sizes.split(",")] if sizes else []
        except ValueError as error:
            raise ConfigError(f"--sizes {sizes}: write ranks of LoRA by commas, e.g. 1,4,16") from error
        if report_only and (only or plan or seeds is not None or minutes is not None):
            raise ConfigError("--report-only runs nothing: leave out --only, --plan, --seeds and --minutes")
        if plan and only:
            raise ConfigError("--plan is of all entries: leave out --only")
        if study is not None and not any((model, data, methods, parameters, ranks, settings)):
            given = Path(study, "study.yaml") if Path(study).is_dir() else Path(study)
            checked = load_study(given, overrides)
        elif model is None or data is None or (study is not None and "=" not in study):
            of_file = "--methods, --parameters, --sizes and --set"
            raise ConfigError(f"give the YAML file of a study, or both --model and --data, with which {of_file} go")
        else:
            words = [*([] if study is None else [study]), *overrides]
            names = [name.strip().lower() for name in methods.split(",")] if methods else METHODS
            own = method_settings(settings or [])
            checked, given = default_study(model, data, names, parameters, words, own, ranks), None
        checked.chosen(only or [])
        check_folder(checked, given)
        if checked.references:
            typer.echo("references: is ignored; each entry is compared with every other", err=True)
        with redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout, which is kept free for results
            on_ray = workers > 1 or ray_address is not None
            with RayExecutor(checked, workers, ray_address) if on_ray else Executor() as executor:
                if plan:
                    planned, told = outlook(checked, executor.result, minutes, workers, seeds, began)
                else:
                    with nullcontext() if report_only else study_file(checked, given):
                        execute = None if report_only else executor.result
                        planned = prepare(checked, execute, minutes, workers, seeds, began)
                    comparison = Comparison(checked, planned)
                    if not report_only:
                        table = planned.table(checked, workers)
                        table.print()
                        typer.echo(table.caption)
                        comparison.run(only or [], executor, report)
        if plan:
            if json:
                print_json({**planned.model_dump(mode="json"), "outlook": told})
                return
            table = planned.table(checked, workers)
            table.print()
            typer.echo(f"{table.caption} {told}")
            return
        made = report(comparison)
        if json:
            print_json(made.summary)
            return
        for sentence in made.verdict:  # in files, of absolute paths only the last name is left
            typer.echo(sentence.replace(quote(portable(metric)), quote(metric)) + "\n" if metric else f"{sentence}\n")
        for title, table in made.results().items():
            typer.echo(f"{title}\n")
            table.print()
            typer.echo("")
        typer.echo(f"Page, table and runs: {checked.folder}")


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
        from smoa_lab.study.default_study import tuning_study
        from smoa_lab.study.executor import Executor
        from smoa_lab.study.plan import check_folder, study_file
        from smoa_lab.study.planning import prepare
        from smoa_lab.study.run_study import Comparison
        from smoa_lab.study.search import rate_text

        study, executor = tuning_study(load_config(config, overrides), max_runs), Executor()
        check_folder(study)
        with study_file(study):
            comparison = Comparison(study, prepare(study, executor.result))
        comparison.run(executor=executor)
        chosen = next(iter(comparison.chosen.values()))
        if not any(loss is not None for loss in chosen.losses.values()):
            told = f"every rate down to {rate_text(min(chosen.losses))} diverged; start from a much lower one"
            told += ", in another training.output_dir"
            raise ConfigError(f"training.learning_rate: {told}")
        losses = {rate_text(rate): loss for rate, loss in chosen.losses.items()}
        if json:
            found = {"learning_rate": chosen.learning_rate, "tried": chosen.tried, "interior": chosen.place != "edge"}
            print_json({**found, "losses": losses})
            return
        rows = [[rate, "diverged" if loss is None else number(loss, 4)] for rate, loss in losses.items()]
        Table(["learning rate", "validation loss"], rows).print()
        if chosen.place == "edge":
            typer.echo(
                "\nThe best lies at the boundary of the range that was tried: search on with a higher --max-runs."
            )
        if chosen.place == "vertex":
            typer.echo(
                f"\n{rate_text(chosen.learning_rate)} is the vertex of the parabola through the best and its "
                f"neighbors; the adapter that is kept was trained at {rate_text(chosen.tried)}."
            )
        typer.echo(f"\nPut this under training:\n\n  learning_rate: {rate_text(chosen.learning_rate)}")
