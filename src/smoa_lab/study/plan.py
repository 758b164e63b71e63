"""What of a study can be run next: a job waits for those whose results choose it, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial
from smoa_lab.study.tuning import best_index, first_index, is_interior, nearest_index, next_indices, rate


@dataclass(frozen=True)
class Untouched:
    """The model as it is, scored on the test part."""

    name: str = "untouched"


Job = Trial | Untouched


@dataclass(frozen=True)
class Tuned:
    """An entry's search: losses by learning rate, the chosen one, and whether it is inside the range that was tried."""

    losses: dict[float, float | None]
    learning_rate: float
    interior: bool


@dataclass
class Plan:
    """The jobs of the entries ``names`` of a study, given what is finished; the searches alone if ``searches_only``.

    Results choose jobs, and the order in which they come does not: many workers run the very trials that one runs.
    """

    study: Study
    names: Sequence[str]
    searches_only: bool = False
    finished: set[Job] = field(default_factory=set)
    _losses: dict[str, dict[int, float | None]] = field(default_factory=dict)

    def ready(self) -> list[Job]:
        """What can be run now: the untouched model, searches, then final runs, one seed of all entries at a time."""
        searches = [trial for name in self.names for trial in self.search(name)]
        jobs: list[Job] = [Untouched(), *searches, *self._final_runs()]
        return [job for job in (searches if self.searches_only else jobs) if job not in self.finished]

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        """Note the JSON of a finished job."""
        self.finished.add(job)
        if isinstance(job, Trial) and job.stage == "tuning":
            losses = self._losses.setdefault(job.entry, {})
            losses[nearest_index(job.learning_rate)] = validation_loss(result)

    def search(self, name: str) -> list[Trial]:
        """The trials that an entry's search needs next; none when it is over."""
        tuning, losses = self.study.tuning, self._losses.get(name, {})
        if self.study.kind == "sequence" or tuning.max_runs == 0:
            return []
        if tuning.sweep is None:
            start = first_index(self.study.entries[name].learning_rate)
            indices = next_indices(start, losses, tuning.max_runs, tuning.refine)
        else:
            indices = [index for index in self.study.rates(name) if index not in losses]
        return [Trial("tuning", name, rate(index), tuning.seed) for index in indices]

    def found(self, name: str) -> Tuned:
        """The outcome of an entry's search that is over."""
        if self.study.tuning.max_runs == 0:
            return Tuned({}, self.study.entries[name].learning_rate, interior=False)
        return tuned(self._losses[name])

    def at_least_left(self) -> int:
        """Jobs that are not finished; of a search only those that it is sure to need."""
        searching = [name for name in self.names if self.search(name)]
        final = 0 if self.searches_only else len(self.study.seeds)
        return len(self.ready()) + len(searching) * final

    def _final_runs(self) -> list[Trial]:
        rates = {name: self._final_rates(name) for name in self.names}
        return [Trial("final", name, one, seed) for seed in self.study.seeds for name in rates for one in rates[name]]

    def _final_rates(self, name: str) -> list[float]:
        """In a sequence every rate is scored on the test part: nothing is chosen, so nothing needs validation."""
        if self.study.kind == "sequence":
            return [rate(index) for index in self.study.rates(name)]
        return [] if self.search(name) else [self.found(name).learning_rate]


def tuned(losses: dict[int, float | None]) -> Tuned:
    """What a search over these grid indices found."""
    by_rate = {rate(index): losses[index] for index in sorted(losses)}
    return Tuned(by_rate, rate(best_index(losses)), is_interior(losses))


def validation_loss(result: dict[str, Any]) -> float | None:
    """The gold answers' loss over all questions; None where the run diverged."""
    if any(nll is None for nll in result["questions"]["nll"]):
        return None
    loss: float = result["scores"]["all"]["gold_loss"]
    return loss
