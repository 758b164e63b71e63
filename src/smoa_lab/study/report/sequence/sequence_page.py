"""A sequence as an interactive page that works offline, from its summary alone."""

from __future__ import annotations

from typing import Any

from smoa_lab.drawing.chart_script import SCRIPT
from smoa_lab.drawing.pages import anchor, figure, page, paragraph, section, table
from smoa_lab.study.packing import PACK, shell_command
from smoa_lab.study.report.charts.frontier import CAPTION, frontier
from smoa_lab.study.report.sequence.sequence_tables import (
    INTRODUCTION,
    RUNS_HEADER,
    before_sentence,
    run_line,
    run_name,
    table_sections,
)

TITLES = ("loss on the second task (nats per token)", "loss on the first task (nats per token)")
WHERE = f"The whole JSON of a run is the file of that name in the study's folder or, once packed, a line of {PACK}: "


def sequence_page(title: str, summary: dict[str, Any], script: str = SCRIPT) -> str:
    """The HTML."""
    drawn = sequence_chart(summary)
    runs = [[anchor(run_name(run)), *run_line(run)[1:]] for run in summary["runs"]]
    parts = [
        *(paragraph(text) for text in (INTRODUCTION, before_sentence(summary["before"])) if text),
        *([] if drawn is None else [section("Kept against learned", figure(drawn, CAPTION))]),
        *(section(one.title, table(one.text, one.header, one.lines)) for one in table_sections(summary)),
        section(
            "Runs",
            paragraph(WHERE + shell_command(f"final/{summary['runs'][0]['entry']}/")),
            table("Every finished run. Click a heading to sort.", RUNS_HEADER, runs),
        ),
    ]
    return page(title, *parts, script=script)


def sequence_chart(summary: dict[str, Any]) -> Any | None:
    """What was kept against what was learned; None where every run diverged."""
    before = summary["before"]
    runs = [
        {
            **{key: run[key] for key in ("entry", "method", "learning_rate", "seed")},
            "learned": run["second_loss"],
            "kept": run["first_loss"],
            "run": f"#{run_name(run)}",
        }
        for run in summary["runs"]
    ]
    return frontier(runs, TITLES, before and before["first"]["gold_loss"])
