"""Measures how often the bounds of `smoa compare` miss, and what searches of a rate cost:

    python studies/calibration.py           # studies/calibration.json, shown by docs/results.md
    python studies/calibration.py whole     # of whole studies alone, the longest part; the rest of the file stays
    python studies/calibration.py levels    # print the levels of looks, for src/smoa_lab/study/bounds.py

The draws are simulated; searches are simulated on stored curves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit
from stored import STUDIES, searches

from smoa_lab.basics.files import write_whole
from smoa_lab.basics.values import json_text
from smoa_lab.study.bounds import Estimate, Floats, contrast, looks
from smoa_lab.study.search import Chosen, best_of, next_indices, rate

FILE = STUDIES / "calibration.json"
DRAWS, SEARCHED = 4000, 200
"""Simulated studies of a cell; searches of a curve."""
RATIOS = (0.0, 0.02, 0.05, 0.1, 0.3, 1.0)
"""The variance that the choice of rows gives a mean, in those of one seed."""
GROUPS, SIZES, SEEDS, ENTRIES = (5, 10, 20, 50, 200), (1, 5, 10), (2, 3, 5), (2, 4)
INTRACLASS = 0.5
"""The correlation of rows of a group."""
RIGHT = (0.05, 0.5, 0.9, 0.98)
WILD = 5.0
"""How many times the seeds' standard deviation of the other entries a wild one has."""
TOLERANCE = 0.1
WHOLE_DRAWS, WHOLE_AT_ONCE = 10_000, 1_000
WHOLE_ENTRIES, WHOLE_ROUNDS, WHOLE_GROUPS = (2, 3, 5), (3, 4, 5), (5, 10, 50, 200)
"""Of whole studies: draws of a cell, and of these in memory at once."""
GAIN = 40.0
"""What training gains there, in standard deviations of one seed."""
SHARES, SHIFTS = ((0.05, 0.5), (0.25, 0.75), (0.5, 0.98)), (0.0, 0.1)
"""Right answers of the base model and of the best entry; the standard deviation of a seed's effect on how hard each row
is, in that of rows."""
SPENT, MOST_ROUNDS, LEVEL_ENTRIES = 0.04, 8, (1, 2, 3, 4, 5, 6)
MAX_RUNS = 6
RULES = ("before", "now")


def studies(
    random: np.random.Generator,
    entries: int,
    seeds: int,
    groups: int,
    size: int,
    ratio: float,
    skewed: bool,
    draws: int = DRAWS,
) -> tuple[Floats, Floats]:
    """Values (draws, entries, seeds, groups) and weights of equal entries, whose seeds have the variance 1. The rows of
    the first differ from those of others, by a gamma distribution of skew 1 if ``skewed``, and in each seed anew."""
    shape = (draws, 1, 1, groups)

    def effect(*shape: int) -> Floats:
        return (random.gamma(4.0, size=shape) - 4) / 2 if skewed else random.normal(size=shape)

    of_group = INTRACLASS**0.5 * effect(*shape)
    of_rows = (1 - INTRACLASS) ** 0.5 * effect(*shape, size).mean(axis=-1)
    scale = (2 * ratio * groups / (INTRACLASS + (1 - INTRACLASS) / size)) ** 0.5
    values = random.normal(size=(draws, entries, seeds, 1)) + np.zeros(groups)
    values[:, :1] += scale * (of_group + of_rows)
    values += (ratio * groups) ** 0.5 / 2 * random.normal(size=values.shape)
    return values * size, np.full(groups, float(size))


def missed(found: Estimate) -> dict[str, float]:
    """How often the bounds of a true 0 miss it, of a nominal 5 %: on two sides, and on the worse of both alone."""
    low, high = (found.upper(0.05) < 0).mean(), (found.lower(0.05) > 0).mean()
    two = (found.upper(0.025) < 0) | (found.lower(0.025) > 0)
    return {"two": float(two.mean()), "one": float(max(low, high))}


def of_rows(groups: int, skewed: bool) -> dict[str, float]:
    """The worst of all sizes of groups, variances, numbers of seeds and entries; ``few``, on both sides, of two seeds
    of two entries."""
    random, worst, few = np.random.default_rng(groups), {"two": 0.0, "one": 0.0}, 0.0
    for size, ratio, seeds, entries in product(SIZES, RATIOS, SEEDS, ENTRIES):
        values, weights = studies(random, entries, seeds, groups, size, ratio, skewed)
        found = missed(contrast(values, np.zeros((1, groups)), weights, 0, 1, 1.0))
        if (seeds, entries) == (2, 2):
            few = max(few, found["two"])
        else:
            worst = {side: max(share, found[side]) for side, share in worst.items()}
    return worst | {"few": few}


def of_uneven_groups(groups: int) -> dict[str, float]:
    """The worst of groups of very different sizes (the k-th has a k-th of the first's rows, or one has as many as all
    others together), variances and numbers of seeds."""
    random, worst = np.random.default_rng(groups), {"two": 0.0, "one": 0.0}
    of_ranks, with_a_heavy_one = np.maximum(1, np.round(groups / np.arange(1.0, groups + 1))), np.ones(groups)
    with_a_heavy_one[0] = groups - 1
    for sizes in (of_ranks, with_a_heavy_one):
        errs = INTRACLASS * sizes**2 + (1 - INTRACLASS) * sizes
        for ratio, seeds in product(RATIOS, SEEDS):
            values = (random.normal(size=(DRAWS, 2, seeds, 1)) + np.zeros(groups)) * sizes
            scale = (2 * ratio * errs) ** 0.5 * sizes.sum() / errs.sum() ** 0.5
            values[:, :1] += scale * random.normal(size=(DRAWS, 1, 1, groups))
            found = missed(contrast(values, np.zeros((1, groups)), sizes, 0, 1, 1.0))
            worst = {side: max(share, found[side]) for side, share in worst.items()}
    return worst


def of_answers(groups: int) -> dict[str, float]:
    """The worst of all sizes of groups and shares of right answers, three seeds: a row is as hard for each entry in all
    seeds, by chance harder for one."""
    random, worst = np.random.default_rng(groups), {"two": 0.0, "one": 0.0}
    for size, share in product(SIZES, RIGHT):
        hard = [random.normal(size=(DRAWS, *own, groups, 1)) for own in ((1, 1), (2, 1))]
        rows = [random.normal(size=(DRAWS, *own, groups, size)) for own in ((1, 1), (2, 1), (2, 3))]
        both = INTRACLASS**0.5 * sum(hard) / 2**0.5 + (1 - INTRACLASS) ** 0.5 * sum(rows) / 3**0.5
        wrong = (both > ndtri(share)).sum(axis=-1).astype(float)
        found = missed(contrast(wrong, np.zeros((1, groups)), np.full(groups, float(size)), 0, 1, 1.0, True))
        worst = {side: max(most, found[side]) for side, most in worst.items()}
    return worst


def of_a_wild_entry(seeds: int, entries: int) -> dict[str, float]:
    """Of the pair with an entry that differs WILD times as much between seeds as the others."""
    random = np.random.default_rng(seeds)
    values, weights = studies(random, entries, seeds, 2, 1, 0.0, False)
    values[:, 0] *= WILD
    return missed(contrast(values, np.zeros((1, 2)), weights, 0, 1, 1.0))


def passing_draws(
    values: Floats, untouched: Floats, of: int, draws: NDArray[np.int_], level: float, is_share: bool
) -> NDArray[np.int_]:
    """Those of the ``draws`` in which an entry suffices, at a pair's ``level``."""
    entries, weights = values.shape[1], np.ones(values.shape[-1])
    others = [entry for entry in range(entries - 1, -1, -1) if entry != of]  # the best is the hardest to match
    for other in [*others, None]:
        if len(draws):
            kept = 1.0 if other is None else 1 - TOLERANCE
            found = contrast(values[draws], untouched[draws], weights, of, other, kept, is_share)
            draws = draws[found.upper(level) < 0]
    return draws


def wrong_takes(values: Floats, untouched: Floats, is_share: bool = False) -> float:
    """In which share of studies another than the last entry is taken: the others are cheaper."""
    draws, entries, rounds, _ = values.shape
    is_wrong, pairs = np.zeros(draws, bool), max(1, entries - 1)
    asked = [(number, level / pairs) for number, level in looks(entries, rounds, rounds)]
    for place, (number, level) in enumerate(asked):
        for of in range(entries - 1):
            found = passing_draws(values[:, :, :number], untouched, of, np.flatnonzero(~is_wrong), level, is_share)
            for earlier, at in asked[:place]:  # the last was not taken before, which would have ended the study
                ended = passing_draws(values[:, :, :earlier], untouched, entries - 1, found, at, is_share)
                found = np.setdiff1d(found, ended)
            is_wrong[found] = True
    return float(is_wrong.sum())


def of_losses(random: np.random.Generator, entries: int, rounds: int, groups: int, ratio: float, wild: float) -> float:
    """The last entry gains :data:`GAIN`, the others by the tolerance less; the first is ``wild`` times as wild."""
    values, _ = studies(random, entries, rounds, groups, 1, ratio, False, WHOLE_AT_ONCE)
    values[:, 0] *= wild
    values -= GAIN * (1 - TOLERANCE * (np.arange(entries) < entries - 1))[:, None, None]
    return wrong_takes(values, np.zeros((WHOLE_AT_ONCE, 1, groups)))


def of_right_answers(
    random: np.random.Generator, entries: int, rounds: int, groups: int, shares: tuple[float, float], shift: float
) -> float:
    """The same of right answers: how hard a row is has a part for all, one for an entry and one for a run, in equal
    parts, and what a seed shifts."""
    base, best = shares
    reached = np.array([base, *[best - TOLERANCE * (best - base)] * (entries - 1), best])
    hard = random.normal(size=(WHOLE_AT_ONCE, 1, 1, groups)) + random.normal(
        size=(WHOLE_AT_ONCE, entries + 1, 1, groups)
    )
    hard = (hard + random.normal(size=(WHOLE_AT_ONCE, entries + 1, rounds, groups))) / 3**0.5
    hard += shift * random.normal(size=(WHOLE_AT_ONCE, entries + 1, rounds, 1))
    wrong = (hard > ndtri(reached)[:, None, None] * (1 + shift**2) ** 0.5).astype(float)
    return wrong_takes(wrong[:, 1:], wrong[:, 0, :1], is_share=True)


def of_harm(random: np.random.Generator, entries: int, rounds: int, groups: int, ratio: float) -> float:
    """In how many studies any entry is taken, of which all are worse than the base model, by a seed's deviation."""
    values, _ = studies(random, entries, rounds, groups, 1, ratio, False, WHOLE_AT_ONCE)
    values, untouched, found = values + 1, np.zeros((WHOLE_AT_ONCE, 1, groups)), set[int]()
    for number, level in looks(entries, rounds, rounds):
        for of in range(entries):
            draws, pair = np.arange(WHOLE_AT_ONCE), level / max(1, entries - 1)
            found |= {*passing_draws(values[:, :, :number], untouched, of, draws, pair, False).tolist()}
    return float(len(found))


def of_studies(entries: int, rounds: int) -> dict[str, float]:
    """How often the whole takes an entry that keeps just too little, by its loss or by its right answers, one of these
    that is wild too, or one of those that are all worse than the base model: the worst of all groups and variances."""
    worst = dict[str, float]()
    for groups in WHOLE_GROUPS:
        cells: dict[str, list[Any]] = {
            "wrong": [partial(of_losses, ratio=ratio, wild=1.0) for ratio in RATIOS],
            "wild": [partial(of_losses, ratio=ratio, wild=WILD) for ratio in RATIOS],
            "right": [partial(of_right_answers, shares=each, shift=by) for each, by in product(SHARES, SHIFTS)],
            "harmful": [partial(of_harm, ratio=ratio) for ratio in RATIOS],
        }
        for (name, own), number in product(cells.items(), range(len(RATIOS))):
            random = np.random.default_rng((entries, rounds, groups, number))
            errs = sum(own[number](random, entries, rounds, groups) for _ in range(WHOLE_DRAWS // WHOLE_AT_ONCE))
            worst[name] = max(worst.get(name, 0.0), errs / WHOLE_DRAWS)
    return worst


def width(entries: int, seeds: int) -> float:
    """A bound at 5 % in the half intervals of the rule before, for all pairs by Bonferroni, where seeds alone err."""
    freedom, level = entries * (seeds - 1), 0.05 / (entries - 1)
    return float(stdtrit(freedom, 1 - level) / stdtrit(freedom, 1 - level / 2))


def smallest(random: np.random.Generator, entries: int, ratio: float) -> Floats:
    """(draws, looks): the least level of a pair at which one of the others passes against the last, which is as good,
    at this look or before."""
    groups = 50
    values = random.normal(size=(DRAWS, entries, MOST_ROUNDS, 1))
    values = values + random.normal(size=(DRAWS, entries, 1, groups)) * (ratio * groups) ** 0.5
    least, found = np.ones(DRAWS), list[Floats]()
    for seeds in range(2, MOST_ROUNDS + 1):
        for of in range(max(1, entries - 1)):
            other = entries - 1 if entries > 1 else None
            pair = contrast(values[:, :, :seeds], np.zeros((1, groups)), np.ones(groups), of, other, 1.0)
            least = np.minimum(least, passing(pair))
        found.append(least)
    return np.array(found)


def passing(found: Estimate) -> Floats:
    """The least level at which the upper bound is below 0."""
    if not np.any(found.is_few):
        errs = np.sqrt(found.of_rows + found.of_seeds)
        return np.asarray(stdtr(np.minimum(found.freedom, 1e9), found.mean / errs))
    low, high = np.zeros(DRAWS), np.ones(DRAWS)
    for _ in range(40):
        middle = (low + high) / 2
        passes = found.upper(middle) < 0
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    return high


def levels() -> dict[int, list[float]]:
    """By the number of entries, the constant level of a look that spends SPENT over so many planned rounds, at the
    worst of all variances of rows; between few and many of them t falls where seeds agree by chance."""
    found = {}
    for entries in LEVEL_ENTRIES:
        random = np.random.default_rng(entries)
        draws = [np.concatenate([smallest(random, entries, ratio) for _ in range(5)], axis=1) for ratio in RATIOS]
        least = np.min([np.quantile(each, SPENT, axis=1) for each in draws], axis=0)
        found[entries] = [float(f"{value * max(1, entries - 1):.3g}") for value in least]
    return found


@dataclass(frozen=True)
class Curve:
    """The losses of a stored search by the logarithm of the rate, the rate that it started from, and the seeds'
    standard deviation in its study."""

    start: float
    rates: Floats
    losses: Floats
    spread: float

    def loss(self, learning_rate: float) -> float:
        """By cubics between the rates that were tried, whose lowest is one of these, and by a line beyond. A slope is
        the harmonic mean of those beside it, 0 where these differ in sign."""
        widths, rises = np.diff(self.rates), np.diff(self.losses) / np.diff(self.rates)
        with np.errstate(divide="ignore", invalid="ignore"):
            inner = np.where(rises[:-1] * rises[1:] > 0, 2 / (1 / rises[:-1] + 1 / rises[1:]), 0.0)
        slopes, x = np.concatenate([rises[:1], inner, rises[-1:]]), np.log10(learning_rate)
        if not self.rates[0] <= x <= self.rates[-1]:
            end = 0 if x < self.rates[0] else -1
            return float(self.losses[end] + slopes[end] * (x - self.rates[end]))
        left = min(int(np.searchsorted(self.rates, x, side="right")), len(widths)) - 1
        t = (x - self.rates[left]) / widths[left]
        of_ends = (1 + 2 * t) * (1 - t) ** 2 * self.losses[left] + t**2 * (3 - 2 * t) * self.losses[left + 1]
        of_slopes = t * (1 - t) ** 2 * slopes[left] - t**2 * (1 - t) * slopes[left + 1]
        return float(of_ends + widths[left] * of_slopes)


def curves() -> Iterator[Curve]:
    """The stored searches of five rates or more that did not diverge, where it is known how much seeds differ."""
    for one in (one for study in searches().values() for one in study.values()):
        known = sorted((float(tried), loss) for tried, loss in one["losses"].items() if loss is not None)
        if len(known) == len(one["losses"]) >= 5 and "spread" in one:
            rates, losses = np.array(known).T
            yield Curve(one["start"], np.log10(rates), losses, one["spread"])


def indices_before(losses: Mapping[int, float | None], max_runs: int) -> list[int]:
    """What the search needed next up to d0353ac6: half decades until the best is inside, then the quarters beside."""
    halves = {index: loss for index, loss in losses.items() if index % 2 == 0}
    if not (needed := [index for index in (0, -2, 2) if index not in halves]):
        best = best_of(halves)
        beyond = [index for index in (best - 2, best + 2) if index not in halves]
        needed = beyond or [index for index in (best - 1, best + 1) if index not in losses]
    return needed[: max(0, max_runs - len(losses))]


def of_searches() -> dict[str, dict[str, float]]:
    """Runs of a search, and by how much the loss at the rate that it chooses exceeds the curve's lowest, in nats and in
    the seeds' standard deviations: means over curves, each searched with the noise of seeds."""
    found: dict[str, list[tuple[float, float, float]]] = {rule: [] for rule in RULES}
    for number, curve in enumerate(curves()):
        lowest = min(curve.loss(float(10**x)) for x in np.linspace(curve.rates[0], curve.rates[-1], 400))
        random = np.random.default_rng(number)
        for _ in range(SEARCHED):
            noise = random.normal(0, curve.spread, 99)  # by index, also below 0
            for rule in RULES:
                losses: dict[int, float | None] = {}
                while needed := (indices_before if rule == "before" else next_indices)(losses, MAX_RUNS):
                    losses |= {index: curve.loss(rate(curve.start, index)) + float(noise[index]) for index in needed}
                chosen = Chosen.of(curve.start, losses)
                taken = chosen.tried if rule == "before" else chosen.learning_rate
                regret = curve.loss(taken) - lowest
                found[rule].append((len(losses), regret, regret / curve.spread))
    names = ("runs", "regret", "regret_in_spreads")
    return {rule: dict(zip(names, map(float, np.mean(each, axis=0)), strict=True)) for rule, each in found.items()}


def of_whole_studies() -> dict[str, dict[str, float]]:
    found = {}
    for entries, rounds in product(WHOLE_ENTRIES, WHOLE_ROUNDS):
        found[f"{entries}, {rounds}"] = of_studies(entries, rounds)
        print(entries, rounds, found[f"{entries}, {rounds}"], flush=True)
    return found


def main(what: str) -> None:
    if what == "levels":
        for entries, own in levels().items():
            print(f"    {entries}: ({', '.join(map(str, own))}),")
        return
    if what == "whole":
        found = json.loads(FILE.read_text(encoding="utf-8")) | {"whole": of_whole_studies()}
        write_whole(FILE, json_text(found) + "\n")
        return
    rows = [
        {
            "groups": groups,
            "even": of_rows(groups, False),
            "skewed": of_rows(groups, True),
            "uneven": of_uneven_groups(groups),
            "right": of_answers(groups),
        }
        for groups in GROUPS
    ]
    wild = {str(seeds): {str(entries): of_a_wild_entry(seeds, entries) for entries in ENTRIES} for seeds in SEEDS}
    widths = {f"{entries}, {seeds}": width(entries, seeds) for entries, seeds in product(ENTRIES, (2, 3, 4))}
    found = {"rows": rows, "wild": wild, "whole": of_whole_studies(), "widths": widths}
    write_whole(FILE, json_text(found | {"curves": len(list(curves())), "searches": of_searches()}) + "\n")


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
