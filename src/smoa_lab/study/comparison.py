"""Runs a study: searches each entry's learning rate in the same way, then runs it with fresh seeds on the test part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from smoa_lab.study.benches.bench import Bench, Part
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Stage, Trial, TrialStore
from smoa_lab.study.tuning import best_index, first_index, is_interior, nearest_index, next_index, rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """An entry's search: losses by learning rate, the chosen one, and whether it is inside the range that was tried."""

    losses: dict[float, float | None]
    learning_rate: float
    interior: bool


class Comparison:
    """Runs what is missing of a study; every finished run counts, and a killed one is run again or resumed."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.store = TrialStore(study.folder)
        self.bench: Bench = study.bench()

    def run(self, only: Sequence[str] = ()) -> None:
        """Tune all entries, or those that ``only`` names or whose budget it names, then the final runs, one seed
        of every entry before the next.

        Raises:
            ConfigError: ``only`` names nothing of the study.
            DataError: a package is missing.
        """
        chosen = self.study.chosen(only)
        for name in chosen:
            self.bench.check_needs(self.study.entries[name])
        self.untouched()
        if self.study.kind == "sequence":
            self._run_sweeps(chosen)
            return
        tuned = {name: self.tune(name) for name in chosen}
        for seed in self.study.seeds:
            for name, search in tuned.items():
                result = self._trial(Trial("final", name, search.learning_rate, seed))
                logger.info("%s seed %d: %s", name, seed, _summary(result))

    def _run_sweeps(self, chosen: Sequence[str]) -> None:
        """Every rate with every seed, scored on the test part: nothing is chosen, so nothing needs validation."""
        for seed in self.study.seeds:
            for name in chosen:
                for index in self.study.rates(name):
                    result = self._trial(Trial("final", name, rate(index), seed))
                    logger.info("%s at %g seed %d: %s", name, rate(index), seed, _summary(result))

    def tune(self, name: str) -> Tuned:
        """Search the learning rate of one entry on the validation part."""
        entry, tuning = self.study.entries[name], self.study.tuning
        if tuning.max_runs == 0:
            return Tuned({}, entry.learning_rate, interior=False)
        start = first_index(entry.learning_rate)
        losses: dict[int, float | None] = {}
        while (index := self._next(name, start, losses)) is not None:
            result = self._trial(Trial("tuning", name, rate(index), tuning.seed))
            losses[index] = validation_loss(result)
            logger.info("%s at %g: %s", name, rate(index), _summary(result))
        return _tuned(losses)

    def _next(self, name: str, start: int, losses: dict[int, float | None]) -> int | None:
        tuning = self.study.tuning
        if tuning.sweep is None:
            return next_index(start, losses, tuning.max_runs, tuning.refine)
        return next((index for index in self.study.rates(name) if index not in losses), None)

    def untouched(self) -> dict[str, Any]:
        """The model as it is, on the test part."""
        entries = list(self.study.entries.values())
        lender = next((entry for entry in entries if entry.method != "full"), entries[0])
        config = self.bench.untouched_config(lender)
        wanted = self.bench.stored_config(config)
        found = self.store.find("untouched")
        if found is not None:
            wanted["training"] = found["config"]["training"]  # none took place
        return self.store.get("untouched", wanted, lambda work: self.bench.untouched(config, "test"))

    def _trial(self, trial: Trial) -> dict[str, Any]:
        entry = self.study.entries[trial.entry]
        part: Part = "validation" if trial.stage == "tuning" else "test"
        run = partial(self.bench.run, entry, trial.learning_rate, trial.seed, part)
        config = self.bench.config(entry, trial.learning_rate, trial.seed)
        return self.store.get(trial.name, self.bench.stored_config(config), run)


def stored_search(study: Study, name: str) -> Tuned | None:
    """What of an entry's search is finished; None before the first run."""
    losses = {
        nearest_index(result["config"]["training"]["learning_rate"]): validation_loss(result)
        for result in stored(study, "tuning", name)
        if study.tuning.max_runs and result["config"]["training"]["seed"] == study.tuning.seed
    }
    return _tuned(losses) if losses else None


def stored(study: Study, stage: Stage, name: str) -> list[dict[str, Any]]:
    """The finished trials of an entry, by name."""
    store = TrialStore(study.folder)
    return [found for one in store.names(f"{stage}/{name}/") if (found := store.find(one)) is not None]


def validation_loss(result: dict[str, Any]) -> float | None:
    """The gold answers' loss over all questions; None where the run diverged."""
    if any(nll is None for nll in result["questions"]["nll"]):
        return None
    loss: float = result["scores"]["all"]["gold_loss"]
    return loss


def _tuned(losses: dict[int, float | None]) -> Tuned:
    by_rate = {rate(index): losses[index] for index in sorted(losses)}
    return Tuned(by_rate, rate(best_index(losses)), is_interior(losses))


def _summary(result: dict[str, Any]) -> str:
    scores = result["scores"]["all"]
    took = "resumed" if result["seconds"] is None else f"{result['seconds']} s"
    if scores["gold_loss"] is None:
        return f"diverged ({took})"
    return f"loss {scores['gold_loss']:.4f}, accuracy {scores['accuracy']:.4f} ({took})"
