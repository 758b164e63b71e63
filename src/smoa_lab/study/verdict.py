"""The verdict of a study in sentences: which adapter to take and what that may lose, or what would tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smoa_lab.pages.tables import counted
from smoa_lab.scoring.differences import Difference, half_width
from smoa_lab.study.plan import FEW_ROWS, FIRST_SEEDS, duration, few_rows
from smoa_lab.study.results import Budget, Result
from smoa_lab.study.search import rate_text

EQUAL = 0.02
"""Shares of the reference's parameters that are so near to it need no word."""
MOST_SEEDS = 12
"""More seeds than these are not proposed."""
FOUND = 1.4
"""A difference of so many half-widths of an interval is found four times in five."""


def verdict(budget: Budget, command: str, of_round: float) -> list[str]:
    """What the results of one budget say; ``command`` goes on with the study, and takes ``of_round`` seconds for a
    further seed of all entries."""
    results = budget.results
    sentences = [answer(budget, command, of_round)]
    for one in (one for one in results if one.chosen.place == "edge"):
        rate, tried = one.chosen.learning_rate, one.chosen.losses
        told = f"is the {'lowest' if rate == min(tried) else 'highest'} that was tried: it may do better beyond."
        sentences.append(f"{one.entry}'s best rate, {rate_text(rate)}, {told}")
    sized, diverged = [one for one in results if abs(one.share - 1) > EQUAL], [one for one in results if one.diverged]
    sentences += [f"{one.entry} has {100 * one.share:.0f} % of {one.reference}'s parameters." for one in sized]
    sentences += [f"{one.entry} diverged in {one.diverged} of {counted(len(one.seeds), 'run')}." for one in diverged]
    if budget.level < 0.05:
        errs = f"it errs in {100 * budget.level:.2g} %, all looks in at most 10 %"
        sentences.append(f"This is not the first look: {errs}.")
    return [*sentences, *([few_rows(results[0].rows)] if results[0].rows < FEW_ROWS else [])]


def answer(budget: Budget, command: str, of_round: float) -> str:
    """The adapter to take: the cheapest that loses little against each other one. Little is a share of what training
    gained for certain."""
    results, measure, gain = budget.results, budget.measure, budget.gain
    ran, seeds = sum(len(one.seeds) for one in results), len(results[0].seeds)
    if ran < budget.planned:
        return f"{ran} of {budget.planned} final runs are done, and differences are shown when all are."
    if seeds < 2:
        goes_on = f"`{command} --seeds {FIRST_SEEDS}` goes on, for about {duration((FIRST_SEEDS - seeds) * of_round)}"
        return f"No verdict: one seed of each says nothing of how seeds differ; {goes_on}."
    if measure is None:
        return "No verdict: every run has the same values."
    if any(one.chosen.place == "edge" for one in results):
        return "Undecided: search further. Raise tuning.max_runs in the study's file: searches at an edge go on."
    if results[0].diverged:
        return "Every entry diverged: take none."
    if gain is None:
        return "No verdict: what training gained isn't known, as the untouched model was not scored."
    if gain.low <= 0:
        told = f"{amount(budget, gain.mean)}, of which {amount(budget, gain.high - gain.mean)} are uncertain"
        return f"Training gained nothing that could be shown ({told}): take none."
    if len(results) < 2:
        return f"Training gained {amount(budget, gain.mean)}; there is nothing to compare {results[0].entry} with."
    limit = budget.tolerance * gain.low
    by_cost = sorted(results, key=lambda one: (one.step_seconds, one.parameters))
    for one in by_cost:
        worst = max(loss.high for (of, _), loss in budget.pairs.items() if of == one.entry)
        if worst <= limit:
            return _taken(budget, one, by_cost, worst, gain.mean)
    if (needed := _needed(budget, seeds, limit)) is None:
        return f"Undecided: {counted(MOST_SEEDS, 'more seed')} would not tell; compare fewer methods, or train longer."
    more, apart = needed
    if not more:
        return (
            f"Undecided: more held-out rows are needed. {counted(results[0].rows, 'row')} alone leave "
            f"{amount(budget, apart)} open, however many seeds run; {amount(budget, limit)} are little."
        )
    told = f"about {duration(more * of_round)}, would tell {amount(budget, apart)} apart"
    told += f" ({amount(budget, limit)} are little)"
    return f"Undecided: {counted(more, 'more seed')}, {told}: `{command} --seeds {seeds + more}`."


def _taken(budget: Budget, one: Result, by_cost: Sequence[Result], worst: float, gained: float) -> str:
    others, amount_of = [other.entry for other in by_cost if other is not one], amount(budget, abs(worst))
    if worst == -math.inf:
        return f"{one.entry} is better than {' and '.join(others)}, which diverged: take {one.entry}."
    if worst <= 0:
        said = f"{one.entry} is better than {' and '.join(others)} by {amount_of} or more"
    elif len(others) == 1:
        said = f"{others[0]} is no more than {amount_of} better than {one.entry}"
    else:
        said = f"None is more than {amount_of} better than {one.entry}"
    cheapest = ", the cheapest" if one is by_cost[0] else ""
    share = f"{100 * abs(worst) / gained:.0f} % of what training gained"
    place = "" if one.kept is None else f": {one.kept}"
    return f"{said} ({100 - 100 * budget.level:.4g} %), {share}: take {one.entry}{cheapest}{place}."


def _needed(budget: Budget, seeds: int, limit: float) -> tuple[int, float] | None:
    """How many more seeds should settle it, 0 where the rows alone leave more open than ``limit``; and how large a
    difference is found then, or is open."""
    tests = len(budget.results) - 1

    def width(loss: Difference, number: float) -> float:
        """Half an interval's, with so many seeds, at the next look."""
        of_rows = ((loss.high - loss.low) / 2) ** 2 - half_width(loss.error, budget.level / tests) ** 2
        stderr, freedom = loss.error
        then = stderr * (seeds / number) ** 0.5, round(freedom * (min(number, 2 * MOST_SEEDS) - 1) / (seeds - 1), 1)
        return math.hypot(max(0.0, of_rows) ** 0.5, half_width(then, budget.level / 2 / tests))

    losses = {
        one.entry: [loss for (of, _), loss in budget.pairs.items() if of == one.entry and loss.mean > -math.inf]
        for one in budget.results
        if not one.diverged
    }
    for more in (math.inf, *range(1, MOST_SEEDS + 1)):
        widths = {name: [width(loss, seeds + more) for loss in own] for name, own in losses.items()}
        pairs = {name: zip(losses[name], own, strict=True) for name, own in widths.items() if own}
        worst = {name: max(loss.mean + each for loss, each in own) for name, own in pairs.items()}
        settled = [name for name, each in worst.items() if each <= limit]
        if more == math.inf and not settled:
            return 0, min(max(own) for own in widths.values() if own)
        if more != math.inf and settled:
            return int(more), FOUND * min(max(widths[name]) for name in settled)
    return None


def amount(budget: Budget, value: float) -> str:
    """A difference in the unit of what decides: three digits behind the point, or of a small number its first two."""
    assert budget.measure is not None
    measure, shown = budget.measure, budget.measure.scale * value
    if measure.scale != 1:
        return f"{shown:.{measure.digits}f} {measure.unit}"
    return f"{f'{shown:.3f}' if abs(shown) >= 0.01 or not shown else f'{shown:.2g}'} {measure.unit}"
