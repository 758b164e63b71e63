"""The verdict of a study in sentences: which adapter to take and what that may lose, or what would tell."""

from __future__ import annotations

import math
from dataclasses import replace
from math import floor

from smoa_lab.pages.tables import counted
from smoa_lab.study.bounds import Family, level_of
from smoa_lab.study.decision import EQUAL, Budget
from smoa_lab.study.plan import FIRST_SEEDS, Plan, duration
from smoa_lab.study.search import rate_text

FEW_ROWS = 50
"""Held-out rows below which a comparison shows large differences only."""
MOST_SEEDS = 12
"""More rounds than these are not proposed."""


def verdict(budget: Budget, plan: Plan, command: str, of_round: float) -> list[str]:
    """What the results of one budget say; ``command`` goes on with the study, and takes ``of_round`` seconds for a
    further seed of all entries."""
    results = budget.results
    sentences = [answer(budget, plan, command, of_round)]
    if budget.of_sizes:  # the rest is said of each size
        return sentences
    for one in (one for one in results if one.entry in budget.at_edge):
        rate, tried = one.chosen.learning_rate, one.chosen.losses or {one.chosen.learning_rate: None}
        where = "of those that there was time for" if one.chosen.place == "cut" else "that was tried"
        if min(tried) < rate < max(tried):
            told = "lies beside a rate that was not tried: it may do better there."
        else:
            told = f"is the {'lowest' if rate == min(tried) else 'highest'} {where}: it may do better beyond."
        sentences.append(f"{one.entry}'s best rate, {rate_text(rate)}, {told}")
    sized, diverged = [one for one in results if abs(one.share - 1) > EQUAL], [one for one in results if one.diverged]
    sentences += [f"{one.entry} has {100 * one.share:.0f} % of {budget.against}'s parameters." for one in sized]
    sentences += [f"{one.entry} diverged in {one.diverged} of {counted(len(one.seeds), 'run')}." for one in diverged]
    if plan.extensions and not budget.was_planned:
        errs = f"it errs in {100 * budget.level:.2g} %, and all looks in at most 5 %"
        sentences.append(f"This look was not planned at first: {errs}.")
    few = results[0].groups
    return [*sentences, *([few_rows(few, results[0].rows)] if few < FEW_ROWS else [])]


def few_rows(number: int, rows: int | None = None) -> str:
    """The warning that a comparison on so few rows has of as many, or of more, ``rows``."""
    what = "row" if rows in (None, number) else "group"
    held_out = f"{what} is held out, which shows" if number == 1 else f"{what}s are held out, which show"
    return f"Only {number} {held_out} large differences only; {FEW_ROWS} or more are better."


def answer(budget: Budget, plan: Plan, command: str, of_round: float) -> str:
    """The adapter to take, the first in order of cost that keeps enough of what each other gained; or why none."""
    family, seeds = budget.family, max(len(one.seeds) for one in budget.results)
    if not budget.wanted:
        return "No verdict: all entries failed."
    if family is None and budget.metric is None:
        return "No verdict: every run has the same values."
    if family is None and len(plan.seeds) < 2:
        goes_on = f"`{command} --seeds {FIRST_SEEDS}` goes on, for about {duration((FIRST_SEEDS - seeds) * of_round)}"
        return f"No verdict: one seed of each says nothing of how seeds differ; {goes_on}."
    if family is None:
        first = plan.extensions[-1] if plan.extensions else 2
        return f"{budget.done} of {budget.wanted} final runs are done, and bounds are shown from round {first} on."
    if all(map(family.diverged, family.names)):
        return "Every entry diverged: take none."
    if family.untouched is None:
        return "No verdict: what training gained isn't known, as the base model was not scored on all rows."
    if len(family.weights) < 2:
        return "No verdict: all held-out rows belong together, and one group can't tell how others differ."
    decided, when = budget.decision(), f"after round {budget.round} of {max(budget.planned, budget.round)}"
    if decided is not None and decided.hurt:
        least = min(family.lower(name, None) for name in family.names)
        return f"Training hurt: every entry is worse than the base model, by {amount(budget, least)}: take none."
    if decided is not None and decided.entry is None:
        return f"Training gained nothing that could be shown, {when}: take none."
    if decided is not None and decided.entry is not None:
        return f"{taken(budget, family, decided.entry)}, {when}: take {decided.entry}{_place(budget, decided.entry)}."
    if budget.at_edge and any(one.chosen.place == "cut" for one in budget.results):
        return "Undecided: the time ended searches. Give more --minutes, or raise tuning.max_runs: they go on."
    if budget.at_edge:
        return (
            "Undecided: search further. Raise tuning.max_runs in the study's file: searches at the boundary of their "
            "range go on."
        )
    more = needed(budget, family, plan)
    if more is None:
        return (
            f"Undecided {when}: {MOST_SEEDS} more rounds would not tell; compare fewer methods, train longer, or raise "
            "tolerance."
        )
    if not more:
        of_rows = budget.results[0].rows == len(family.weights)
        groups = counted(len(family.weights), "row" if of_rows else "group")
        return f"Undecided {when}: more held-out rows are needed. {groups} alone leave too much open, whatever runs."
    told = f"Undecided {when}: about {counted(more, 'more round')}, {duration(more * of_round)}, would tell"
    return f"{told}: `{command} --seeds {budget.round + more}`."


def taken(budget: Budget, family: Family, name: str) -> str:
    """What is known of the one to take."""
    others = [other for other in family.names if other != name]
    alive = [other for other in others if not family.diverged(other)]
    gained = amount(budget, -family.upper(name, None))
    if not others:
        return f"{name} gained {gained} or more; there is nothing to compare it with"
    if not alive:
        return f"{name} is better than {' and '.join(others)}, which diverged"
    if all(family.upper(other, None) >= 0 for other in alive):
        return f"{name} gained {gained} or more, and {' and '.join(alive)} nothing that the rows and seeds show"
    share, each = family.kept(name, budget.tolerance), "each other" if len(alive) > 1 else alive[0]
    if share > 1:
        more = floor(100 * share - 100)
        return f"{name} gained at least {f'{more} % more than' if more else 'as much as'} {each}"
    return f"{name} keeps at least {floor(100 * share)} % of what {each} gained"


def _place(budget: Budget, name: str) -> str:
    kept = next(one.kept for one in budget.results if one.entry == name)
    first = ", the first in order of cost" if name == budget.order[0] and len(budget.order) > 1 else ""
    if budget.of_sizes:
        first = ", the smallest that does" if budget.family and budget.family.kept(name, budget.tolerance) <= 1 else ""
    return first + ("" if kept is None else f": {kept}")


def needed(budget: Budget, family: Family, plan: Plan) -> int | None:
    """How many more rounds should tell; 0 where the rows leave too much open, however many run; None for too many."""
    alive = [name for name in family.names if not family.diverged(name)]

    def tells(rounds: float, level: float) -> bool:
        then = replace(family, level=level)
        return any(then.suffices(name, budget.tolerance, rounds) for name in alive)

    later = level_of(family.entries, plan.rounds, len(plan.extensions) + 1)
    if not tells(1e6, later):
        return 0
    for more in range(1, MOST_SEEDS + 1):
        is_planned = not plan.extensions and budget.round + more <= plan.rounds
        if tells(budget.round + more, budget.level if is_planned else later):
            return more
    return None


def amount(budget: Budget, value: float) -> str:
    """A difference in the unit of what decides: three digits behind the point, or of a small number its first two."""
    assert budget.metric is not None
    metric, shown = budget.metric, budget.metric.scale * value
    if metric.scale != 1:
        return f"{shown:.{metric.digits}f} {metric.unit}"
    if not math.isfinite(shown):
        return f"any {metric.unit}"
    return f"{f'{shown:.3f}' if abs(shown) >= 0.01 or not shown else f'{shown:.2g}'} {metric.unit}"
