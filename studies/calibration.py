"""Measures on the stored studies how often intervals miss, and what searches of a rate cost: python
studies/calibration.py.

It writes studies/calibration.json, of which results_page.py makes a table. *before* is the rule of `smoa compare` up to
commit d0353ac6, *now* the one of today; their figures are of the same draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from stored import STUDIES, folders, runs_of, summary_of

from smoa.atomic import write_whole
from smoa_lab.basics.plain import json_text
from smoa_lab.scoring import differences
from smoa_lab.scoring.differences import Floats, SeedError, row_errors, seed_error, students_t, variances_of
from smoa_lab.study.search import Chosen, best_of, next_indices, rate

FILE = STUDIES / "calibration.json"
SEEDS = (2, 3, 4)
LEFT_OUT = 3
"""The truth is the mean of at least so many other seeds."""
TABLE = 4
"""Entries of a table, fewer where a set has fewer."""
WILD = 5.0
"""How many times the seeds' standard deviation of the other entries a simulated one has."""
DRAWS, ROW_DRAWS, SIMULATED, SEARCHED = 2000, 300, 8000, 200
"""Tables of a set drawn for seeds, for rows; simulated ones; searches of a curve."""
RESAMPLES = 1000
MAX_RUNS = 6
RULES = ("before", "now")


@dataclass(frozen=True)
class Set:
    """Entries of one study with the same seeds: the loss of each row (entries, seeds, rows), and its tokens."""

    name: str
    losses: Floats
    weights: Floats

    @property
    def means(self) -> Floats:
        """(entries, seeds)."""
        return np.asarray(self.losses.sum(axis=2) / self.weights.sum())


def sets() -> Iterator[Set]:
    """Of all studies, where enough seeds ran at one rate."""
    for folder in folders():
        runs: dict[str, dict[int, Any]] = {}
        for name, run in runs_of(folder).items():
            if name.startswith("final/") and None not in run["questions"]["nll"]:
                entry, _, seed = name.rpartition("-seed-")
                runs.setdefault(entry, {})[int(seed)] = run["questions"]
        for seeds in sorted({tuple(own) for own in runs.values()}):
            alike = [own for own in runs.values() if tuple(own) == seeds]
            if len(seeds) >= min(SEEDS) + LEFT_OUT and len(alike) > 1:
                losses = np.array([[own[seed]["nll"] for seed in seeds] for own in alike], np.float64)
                weights = np.array(alike[0][seeds[0]]["tokens"], np.float64)
                yield Set(f"{folder.name}, {len(alike)} entries, {len(seeds)} seeds", losses, weights)


def errors(means: Floats, pair: tuple[int, int]) -> dict[str, SeedError]:
    """What each rule makes of the seeds of a table, (entries, seeds): the standard error and its degrees of freedom."""
    seeds = means.shape[1]
    own = float((means[pair[0]] - means[pair[1]]).std(ddof=1) / seeds**0.5)
    known = variances_of({str(entry): of_entry for entry, of_entry in enumerate(means)})
    return {"before": (own, seeds - 1), "now": seed_error(known, [str(entry) for entry in pair], seeds)}


def half_width(error: SeedError) -> float:
    """Of the interval that seeds alone give."""
    return error[0] * float(np.quantile(students_t(error[1], 4000), 0.975))


def drawn(own: Set, seeds: int, entries: int, draws: int) -> Iterator[tuple[Any, Any, Any]]:
    """Tables of random entries, the seeds that were run and those that are left out."""
    random = np.random.default_rng(seeds)
    for _ in range(draws):
        order = random.permutation(own.losses.shape[1])
        yield random.choice(len(own.losses), entries, replace=False), order[:seeds], order[seeds:]


def of_seeds(own: Set, seeds: int, entries: int) -> dict[str, float]:
    """How often seeds alone miss the mean of the seeds that were left out, on the same rows."""
    missed, tests, means = dict.fromkeys(RULES, 0), 0, own.means
    for table, ran, left in drawn(own, seeds, entries, DRAWS):
        wider = (1 + seeds / len(left)) ** 0.5
        for a, b in combinations(range(entries), 2):
            gaps = means[table[a]] - means[table[b]]
            off = abs(gaps[ran].mean() - gaps[left].mean())
            for rule, error in errors(means[np.ix_(table, ran)], (a, b)).items():
                missed[rule] += off > wider * half_width(error)
            tests += 1
    return {rule: missed[rule] / tests for rule in RULES}


def of_rows(own: Set, seeds: int, entries: int) -> dict[str, dict[str, float]]:
    """How often the ``whole`` interval, of half the rows, misses what the seeds that were left out reach on the other
    half; and ``half`` the width of intervals of all rows."""
    random, missed, widths = np.random.default_rng(0), dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0.0)
    for table, ran, left in drawn(own, seeds, entries, ROW_DRAWS):
        order, gaps = random.permutation(len(own.weights)), own.losses[table[0]] - own.losses[table[1]]
        others = order[1::2]
        truth = gaps[np.ix_(left, others)].sum() / len(left) / own.weights[others].sum()
        for rows, scales in ((order[::2], (2**0.5, (1 + seeds / len(left)) ** 0.5)), (order, (1.0, 1.0))):
            weights, seen = own.weights[rows], gaps[np.ix_(ran, rows)]
            means = own.losses[np.ix_(table, ran, rows)].sum(axis=2) / weights.sum()
            for rule, (stderr, freedom) in errors(means, (0, 1)).items():
                kept = seen if rule == "now" else seen.mean(axis=0, keepdims=True)  # of one seed nothing is taken out
                of_seeds = stderr * random.permutation(students_t(freedom, RESAMPLES))
                samples = scales[0] * row_errors(kept, weights, random) + scales[1] * of_seeds
                low, high = np.quantile(samples, [0.025, 0.975])
                if rows is order:
                    widths[rule] += float(high - low) / 2
                else:
                    missed[rule] += not low <= truth - seen.sum() / seeds / weights.sum() <= high
    shares = {rule: missed[rule] / ROW_DRAWS for rule in RULES}
    return {"whole": shares, "half": {rule: widths[rule] / ROW_DRAWS for rule in RULES}}


def of_a_wild_entry(seeds: int) -> dict[str, float]:
    """How often seeds alone miss 0 in tables of four equal entries, of which the first differs WILD times as much
    between seeds as the others: of the pairs with it."""
    random, missed = np.random.default_rng(seeds), dict.fromkeys(RULES, 0)
    for _ in range(SIMULATED):
        means = random.normal(size=(TABLE, seeds)) * np.array([WILD] + [1.0] * (TABLE - 1))[:, None]
        for rule, error in errors(means, (0, 1)).items():
            missed[rule] += abs(means[0].mean() - means[1].mean()) > half_width(error)
    return {rule: missed[rule] / SIMULATED for rule in RULES}


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
    """The stored searches of five rates or more that did not diverge."""
    for folder in (*folders(), STUDIES / "chats"):
        if folder.name == "chats":
            chosen = json.loads((folder / "chosen.json").read_text(encoding="utf-8"))
            searches, spreads = {name: one["losses"] for name, one in chosen.items()}, [0.015]
        else:
            rows = summary_of(folder)
            rows = rows if isinstance(rows, list) else []
            searches = {row["entry"]: row["search"]["losses"] for row in rows if row["search"]}
            spreads = [row["loss_spread"] for row in rows if row["loss_spread"]]
        starts = starts_of(folder)
        for entry, losses in searches.items():
            known = sorted((float(tried), loss) for tried, loss in losses.items())
            if len(known) >= 5 and None not in losses.values() and spreads:
                rates, values = np.array(known).T
                yield Curve(starts[entry], np.log10(rates), values, float(np.sqrt(np.mean(np.square(spreads)))))


def starts_of(folder: Path) -> dict[str, float]:
    """The rates that the entries of a study, or of the one that it is a part of, name."""
    near = [other for other in STUDIES.iterdir() if folder.name.startswith(other.name)]
    files = [file for other in sorted(near, key=lambda other: len(other.name)) for file in other.glob("*.yaml")]
    entries: dict[str, Any] = {}
    for file in files:
        entries |= YAML(typ="safe").load(file.read_text(encoding="utf-8"))["entries"]
    return {name: float(one["learning_rate"]) for name, one in entries.items()}


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


def main() -> None:
    differences.RESAMPLES = RESAMPLES
    known, tables = list(sets()), []
    for entries, seeds in product((TABLE, 2), SEEDS):
        own = [each for each in known if len(each.losses) >= entries and each.losses.shape[1] >= seeds + LEFT_OUT]
        measured = [
            {"set": each.name, "seeds": of_seeds(each, seeds, entries), **of_rows(each, seeds, entries)} for each in own
        ]
        tables.append({"entries": entries, "seeds": seeds, "sets": measured})
    wild = {str(seeds): of_a_wild_entry(seeds) for seeds in SEEDS}
    found = {"tables": tables, "wild": wild, "curves": len(list(curves())), "searches": of_searches()}
    write_whole(FILE, json_text(found) + "\n")


if __name__ == "__main__":
    main()
