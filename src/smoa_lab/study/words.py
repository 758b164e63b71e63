"""A verdict in sentences: which adapter to take and what that may lose, or what would tell."""

from __future__ import annotations

import math
from dataclasses import replace
from math import floor

from smoa_lab.pages.tables import counted
from smoa_lab.study.bounds import Family
from smoa_lab.study.search import rate_text
from smoa_lab.study.verdict import EQUAL, Verdict

FEW_GROUPS = 50
"""Held-out rows, or groups of rows, below which a comparison shows large differences only."""
MOST_ROUNDS = 12
"""More rounds than these are not proposed."""


def sentences(of: Verdict, command: str) -> list[str]:
    """What the results of one budget say; ``command`` goes on with the study."""
    told = [_answer(of, command)]
    for name in of.at_edge:
        one = of.chosen[name]
        where = "lowest" if one.learning_rate == min(one.losses) else "highest"
        told.append(f"{name}'s best rate, {rate_text(one.learning_rate)}, is the {where} tried; go beyond it.")
    if of.family is None:
        return told
    shares = {name: of.parameters(name) / of.parameters(of.against) for name in of.entries}
    for name, share in shares.items():
        if abs(share - 1) > EQUAL:
            told.append(f"{name} has {100 * share:.0f} % of {of.against}'s parameters.")
    for name, runs in of.runs.items():
        if diverged := sum(run.loss is None for run in runs.values()):
            told.append(f"{name} diverged in {diverged} of {counted(len(runs), 'run')}.")
    if of.added or of.round > of.study.planned:
        errs = f"it errs in {100 * of.level:.2g} %, and all looks in at most 5 %"
        told.append(f"This look was not planned at first: {errs}.")
    if len(of.family.weights) < FEW_GROUPS:
        told.append(f"Only {_held_out(of)} held out, which show large differences only; have {FEW_GROUPS} or more.")
    return told


def _answer(of: Verdict, command: str) -> str:
    """The adapter to take, the first in order of cost that keeps enough of what each other gained; or why none."""
    family, when = of.family, f"after round {of.round} of {max(of.study.planned, of.round)}"
    if family is None and of.round:
        return "No verdict: every run has the same values."
    if family is None and len(of.study.seeds) < 2:
        return f"No verdict: one seed of each says nothing of how seeds differ; `{command} --seeds 3` goes on."
    if family is None:
        wanted = len(of.study.seeds) * len(of.entries)
        return f"{of.done} of {wanted} final runs are done; `{command}` goes on, and bounds are shown from round 2 on."
    if all(map(family.diverged, family.names)):
        return "Every entry diverged: take none."
    if len(family.weights) < 2:
        return "No verdict: all held-out rows belong together, and one group can't tell how others differ."
    if of.hurt:
        least = _amount(of, min(family.lower(name, None) for name in family.names))
        return f"Training hurt: every entry is worse than the base model, by {least}: take none."
    if of.take is not None:
        kept = [str(folder) for folder in sorted(of.study.folder.glob(f"{of.take}/*/adapter"))]
        first = ", the first in order of cost" if of.take == of.order[0] and len(of.order) > 1 else ""
        return f"{_reason(of, family, of.take)}, {when}: take {of.take}{first}{': ' + kept[0] if kept else ''}."
    if of.is_answered:
        return f"Training gained nothing that could be shown, {when}: take none."
    if of.at_edge:
        return f"Undecided {when}: raise tuning.max_runs in the study's file, so that searches at their edge go on."
    if (more := _needed(of, family)) is None:
        least = f"{MOST_ROUNDS} more rounds would not tell"
        return f"Undecided {when}: {least}; compare fewer methods, train longer, or raise tolerance."
    if not more:
        return f"Undecided {when}: more held-out rows are needed. {_held_out(of)} leave too much open, whatever runs."
    return f"Undecided {when}: about {counted(more, 'more round')} would tell: `{command} --seeds {of.round + more}`."


def _reason(of: Verdict, family: Family, name: str) -> str:
    """What is known of the one to take."""
    others, gained = [other for other in family.names if other != name], _amount(of, -family.upper(name, None))
    if not others:
        return f"{name} gained {gained} or more; there is nothing to compare it with"
    alive = [other for other in others if not family.diverged(other)]
    if not alive:
        return f"{name} is better than {' and '.join(others)}, which diverged"
    if all(family.upper(other, None) >= 0 for other in alive):
        return f"{name} gained {gained} or more, and {' and '.join(alive)} nothing that the rows and seeds show"
    share, each = family.kept(name, of.study.tolerance), "each other" if len(alive) > 1 else alive[0]
    if share > 1:
        more = floor(100 * share - 100)
        return f"{name} gained at least {f'{more} % more than' if more else 'as much as'} {each}"
    return f"{name} keeps at least {floor(100 * share)} % of what {each} gained"


def _needed(of: Verdict, family: Family) -> int | None:
    """How many more rounds should tell; 0 where the rows leave too much open, however many run; None for too many."""

    def tells(rounds: float, level: float) -> bool:
        then = replace(family, level=family.level * level / of.level)
        return any(then.suffices(name, of.study.tolerance, rounds) for name in family.names if name not in diverged)

    diverged = [name for name in family.names if family.diverged(name)]
    further = [look for look in of.looks(of.round + MOST_ROUNDS) if look[0] > of.round]
    if not tells(1e6, further[0][1]):
        return 0
    return next((number - of.round for number, level in further if tells(number, level)), None)


def _held_out(of: Verdict) -> str:
    """How many rows, or groups of them, there are."""
    groups = len(of.family.weights) if of.family else 0
    return counted(groups, "row" if groups == of.rows else "group")


def _amount(of: Verdict, value: float) -> str:
    """A difference in the unit of what decides: three digits behind the point, or of a small number its first two."""
    metric = next(iter(of.families))
    shown = metric.scale * value
    if metric.scale != 1 or not math.isfinite(shown):
        return f"{shown:.{metric.digits}f} {metric.unit}"
    return f"{f'{shown:.3f}' if abs(shown) >= 0.01 or not shown else f'{shown:.2g}'} {metric.unit}"
