"""The tables of a sequence and what is said about them, from the values of its summary."""

from __future__ import annotations

from typing import Any, NamedTuple

from smoa_lab.study.report.sequence.curves import EXPLANATIONS
from smoa_lab.study.trials import Trial

COMPARED_HEADER = ["minus the reference's", "", "p", "Holm's p", "by Holm"]
EQUAL_HEADER = ["entry", "level", "at rate", "loss kept", "the reference at", "its loss", *COMPARED_HEADER, "least gap"]
NEXT_HEADER = ["entry", "best rate", "next rate", "second loss", "loss kept", "its rise", *COMPARED_HEADER]
RUNS_HEADER = [
    *("run", "second loss", "accuracy %", "first loss", "accuracy %", "forgot", "forgot elsewhere"),
    *EXPLANATIONS.values(),
    "s",
]
TASKS = ("first", "second")
FORGOT = {"forgot": "first task", "forgot_elsewhere": "text elsewhere"}
EXPLAINED_HEADER = ["Spearman's correlation over all runs with what was forgotten of the", *FORGOT.values()]
INTRODUCTION = (
    "Every entry starts from the same model, trained on the first task, and trains the second one. Every rate is a "
    "run; nothing was tuned. Losses are of gold answers on the test parts, in nats per token. Forgot is the rise of a "
    "loss with its standard error, paired by question or text."
)
EQUAL = (
    "The level is the lowest loss of the second task that both the entry and its reference reach: the higher one of "
    "their lowest losses. Both losses of an entry are interpolated linearly along the logarithm of its learning rate, "
    "from the lowest rate up, to where the second one comes down to the level. ≤: its lowest rate already learns more, "
    "and is taken. Only seeds count that both have. Intervals are of 95 %: questions of both tasks are resampled, and "
    "level and rates found anew each time; over seeds Student's t, of the differences of single seeds, each at a level "
    "of its own. One seed gets no verdict. Holm's p-values are corrected for all comparisons of this table and the "
    "next. Least gap: how far the loss kept is above the lowest of all entries, at the level where that is least, of "
    "all levels that half of the entries reach."
)
LOWER = (
    "The same at each lower rate of the reference, where it learned less and forgot less: the level is its second-task "
    "loss there. Where its losses lie close together while it forgets ever more, this tells more than its best rate."
)
ELSEWHERE = "As above, of the loss on the text elsewhere."
NEXT = (
    "Best is the rate of an entry's lowest second-task loss, next the one after it in the sweep. The losses are those "
    "at the next rate, the rise is that from the best rate. Differences compare entries at their own next rates. Which "
    "rate is the best is taken as known: intervals don't allow for another one being as good. Corrected for this table."
)
EXPLAINED = "Figures of ΔW are means over at most 18 layers. – : one of the two is the same in all runs."


class TableSection(NamedTuple):
    """A table of a sequence under its heading, with what has to be known to read it."""

    title: str
    text: str
    header: list[str]
    lines: list[list[str]]


def table_sections(summary: dict[str, Any]) -> list[TableSection]:
    """All tables but that of the runs, in the order in which pages show them."""
    away = summary["kept_elsewhere"]
    found = [
        TableSection("First task at equal learning of the second", EQUAL, EQUAL_HEADER, equal_lines(summary)),
        TableSection("First task at less learning", LOWER, EQUAL_HEADER[:-1], _equal_lines(summary["lower_levels"])),
        TableSection("Text elsewhere at equal learning", ELSEWHERE, EQUAL_HEADER[:-1], _equal_lines(away["equal"])),
        TableSection(
            "Text elsewhere at less learning", ELSEWHERE, EQUAL_HEADER[:-1], _equal_lines(away["lower_levels"])
        ),
        TableSection("First task, one rate too high", NEXT, NEXT_HEADER, _next_lines(summary)),
        TableSection("Text elsewhere, one rate too high", ELSEWHERE, NEXT_HEADER, _next_lines(away)),
        TableSection("Explanations", EXPLAINED, EXPLAINED_HEADER, explained_lines(summary)),
    ]
    return [one for one in found if one.lines]


def equal_lines(summary: dict[str, Any]) -> list[list[str]]:
    """The rows under ``EQUAL_HEADER``."""
    gaps = (summary["least_gaps"].get(one["entry"]) for one in summary["equal"])
    told = ("–" if gap is None else f"{gap:.3f}" for gap in gaps)
    return [[*line, gap] for line, gap in zip(_equal_lines(summary["equal"]), told, strict=True)]


def _equal_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [_equal_line(one) for one in rows]


def _next_lines(comparisons: dict[str, Any]) -> list[list[str]]:
    return [_next_line(one) for one in comparisons["next_rate"]]


def _equal_line(one: dict[str, Any]) -> list[str]:
    return [
        one["entry"],
        f"{one['level']:.3f}",
        *_reading(one["own"]),
        *_reading(one["other"]),
        *_difference_cells(one),
    ]


def _reading(read: dict[str, Any]) -> list[str]:
    return [f"{'≤ ' if read['is_lowest'] else ''}{read['rate']:.2g}", f"{read['kept_loss']:.3f}"]


def _next_line(one: dict[str, Any]) -> list[str]:
    rates = (f"{one[key]:.2g}" for key in ("best", "rate"))
    if one["kept_loss"] is None:
        return [one["entry"], *rates, "diverged", "", "", *_difference_cells(one)]
    losses = (f"{one[key]:.3f}" for key in ("learned_loss", "kept_loss"))
    return [one["entry"], *rates, *losses, f"{one['cost']:+.3f}", *_difference_cells(one)]


def _difference_cells(one: dict[str, Any]) -> list[str]:
    """Interval, verdict, p, Holm's p and the verdict by it."""
    found = one["difference"]
    if found is None:
        return ["", "reference" if one["entry"] == one["reference"] else "", "", "", ""]
    interval = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)
    adjusted = "–" if found["holm_p"] is None else f"{found['holm_p']:.2g}"
    return [interval, found["verdict"], f"{found['p']:.2g}", adjusted, found["holm_verdict"] or "–"]


def run_name(run: dict[str, Any]) -> str:
    """The name of a run's trial."""
    return Trial("final", run["entry"], run["learning_rate"], run["seed"]).name


def run_line(run: dict[str, Any]) -> list[str]:
    """The row of a run under ``RUNS_HEADER``."""
    return [
        run_name(run).removeprefix("final/"),
        *(
            _number(run[f"{task}_{score}"], digits, scale)
            for task in ("second", "first")
            for score, digits, scale in (("loss", 3, 1), ("accuracy", 1, 100))
        ),
        *(_with_error(run[key]) for key in FORGOT),
        *("–" if run[key] is None else f"{run[key]:.3g}" for key in EXPLANATIONS),
        _number(run["seconds"], 0),
    ]


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}"


def _with_error(found: dict[str, float | None]) -> str:
    if found["mean"] is None or found["stderr"] is None:
        return "–"
    return f"{found['mean']:+.3f} ± {found['stderr']:.3f}"


def explained_lines(summary: dict[str, Any]) -> list[list[str]]:
    """The rows under ``EXPLAINED_HEADER``."""
    named = ((title, summary["correlations"][key]) for key, title in EXPLANATIONS.items())
    return [[title, *(_number(found[forgot], 2) for forgot in FORGOT)] for title, found in named]


def before_sentence(before: dict[str, Any] | None) -> str:
    """The scores before each of the tasks; nothing where they are unknown."""
    if before is None:
        return ""

    def losses(scores: dict[str, Any]) -> str:
        away = "" if scores["elsewhere"] is None else f", elsewhere {scores['elsewhere']:.3f}"
        told = (f"{name} {scores[name]['gold_loss']:.3f} ({100 * scores[name]['accuracy']:.1f} %)" for name in TASKS)
        return ", ".join(told) + away

    return f"Loss (accuracy) before the first task: {losses(before['start'])}; after it: {losses(before)}."
