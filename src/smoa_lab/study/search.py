"""What of a study can be run next, and the search for a learning rate.

A search goes downhill on a grid of half decades until the best has neighbors on both sides; with ``refine`` it also
tries the quarter decades beside the best. An index counts quarter decades; the even ones are half decades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from smoa_lab.study.study import Study
from smoa_lab.study.trials import Trial


def rate(index: int) -> float:
    """1, 2, 3, 6, 10, …: the grid's value at ``index``, 10^(index / 4) to one digit."""
    return float(f"{10 ** (index / 4):.0e}")


def nearest_index(learning_rate: float) -> int:
    """Where on the grid a learning rate lies."""
    return round(4 * math.log10(learning_rate))


def first_index(learning_rate: float) -> int:
    """The half decade at which a search from this learning rate starts."""
    return 2 * round(2 * math.log10(learning_rate))


def sweep_indices(lowest: float, highest: float, per_decade: Literal[2, 4] = 4) -> range:
    """Every quarter or half decade from ``lowest`` to ``highest``."""
    if per_decade == 2:
        return range(first_index(lowest), first_index(highest) + 1, 2)
    return range(nearest_index(lowest), nearest_index(highest) + 1)


def sweep_of(study: Study, name: str) -> range:
    """The grid indices of an entry's sweep; none without one."""
    sweep = study.entries[name].sweep or study.tuning.sweep
    return range(0) if sweep is None else sweep_indices(*sweep, study.tuning.per_decade)


def next_indices(start: int, losses: Mapping[int, float | None], max_runs: int, refine: bool = False) -> list[int]:
    """The grid indices that the search needs next, whatever comes out at any of them; none when it is over.

    ``losses`` by index; None is a run that diverged. First come the start and its neighbors, then whatever lies
    beyond the best, until that is interior or ``max_runs`` are spent; with ``refine`` two more, on both sides of it.
    """
    halves = {index: loss for index, loss in losses.items() if index % 2 == 0}
    around = [index for index in (start, start - 2, start + 2) if index not in halves]
    if around:
        return around
    best = best_index(halves)
    beyond = [index for index in (best - 2, best + 2) if index not in halves]
    if beyond and len(halves) < max_runs:
        return beyond
    return [index for index in (best - 1, best + 1) if refine and index not in losses]


def best_index(losses: Mapping[int, float | None]) -> int:
    """The index of the lowest loss; a diverged run is never the best, the lower of two equals is."""
    return min(losses, key=lambda index: (losses[index] is None, losses[index] or 0.0, index))


@dataclass(frozen=True)
class Tuned:
    """An entry's search: losses by learning rate, the chosen one, and whether something was tried on both sides of
    it."""

    losses: dict[float, float | None]
    learning_rate: float
    interior: bool

    @classmethod
    def of(cls, losses: Mapping[int, float | None]) -> Tuned:
        """What a search over these grid indices chooses."""
        best = best_index(losses)
        by_rate = {rate(index): losses[index] for index in sorted(losses)}
        return cls(by_rate, rate(best), min(losses) < best < max(losses))


@dataclass(frozen=True)
class Untouched:
    """The model as it is, scored on the test part."""

    name: str = "untouched"


Job = Trial | Untouched
Result = dict[str, Any]
"""The JSON of a finished job."""


@dataclass
class Plan:
    """The jobs of the entries ``names`` of a study, given what is finished; the searches alone if ``searches_only``.

    Results choose jobs, and the order in which they come does not: many workers run the very trials that one runs. In
    a sequence every rate is scored on the test part: nothing is chosen, so nothing is searched.
    """

    study: Study
    names: Sequence[str]
    searches_only: bool = False
    finished: set[Job] = field(default_factory=set)
    _losses: dict[str, dict[int, float | None]] = field(default_factory=dict)

    def ready(self) -> list[Job]:
        """What can be run now: the untouched model, searches, then final runs, one seed of all entries at a time."""
        searches = [trial for name in self.names for trial in self.search(name)]
        jobs: list[Job] = list(searches)
        if not self.searches_only:
            rates = {name: self._final_rates(name) for name in self.names}
            seeds = self.study.seeds
            finals = [Trial("final", name, value, seed) for seed in seeds for name in rates for value in rates[name]]
            jobs = [Untouched(), *searches, *finals]
        return [job for job in jobs if job not in self.finished]

    def finish(self, job: Job, result: Result) -> None:
        """Note the JSON of a finished job."""
        self.finished.add(job)
        if isinstance(job, Trial) and job.stage == "tuning":
            diverged = any(nll is None for nll in result["questions"]["nll"])
            loss = None if diverged else result["scores"]["all"]["gold_loss"]
            self._losses.setdefault(job.entry, {})[nearest_index(job.learning_rate)] = loss

    def search(self, name: str) -> list[Trial]:
        """The trials that an entry's search needs next; none when it is over."""
        tuning, losses = self.study.tuning, self._losses.get(name, {})
        if self.study.kind == "sequence" or tuning.max_runs == 0:
            return []
        if tuning.sweep is None:
            start = first_index(self.study.entries[name].learning_rate)
            indices = next_indices(start, losses, tuning.max_runs, tuning.refine)
        else:
            indices = [index for index in sweep_of(self.study, name) if index not in losses]
        return [Trial("tuning", name, rate(index), tuning.seed) for index in indices]

    def tuned(self, name: str) -> Tuned:
        """The outcome of an entry's search that is over."""
        if self.study.tuning.max_runs == 0:
            return Tuned({}, self.study.entries[name].learning_rate, interior=False)
        return Tuned.of(self._losses[name])

    def at_least_left(self) -> int:
        """Jobs that are not finished; of a search only those that it is sure to need."""
        searching = [name for name in self.names if self.search(name)]
        final = 0 if self.searches_only else len(self.study.seeds)
        return len(self.ready()) + len(searching) * final

    def _final_rates(self, name: str) -> list[float]:
        if self.study.kind == "sequence":
            return [rate(index) for index in sweep_of(self.study, name)]
        return [] if self.search(name) else [self.tuned(name).learning_rate]
