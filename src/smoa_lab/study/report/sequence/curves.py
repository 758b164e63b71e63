"""What the runs of a sequence kept and learned along the learning rate, from their stored trials alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smoa_lab.study.comparison import stored_finals
from smoa_lab.study.report.results.rows import check_paired
from smoa_lab.study.study_file import Study
from smoa_lab.study.tuning import nearest_index

EXPLANATIONS = {
    "relative_norm": "‖ΔW‖_F / ‖W‖_F",
    "relative_spectral_norm": "‖ΔW‖₂ / ‖W‖₂",
    "stable_rank": "stable rank",
    "intruders": "intruder dimensions",
}
"""The figures of ΔW by which forgetting may be explained, as pages name them; each is the mean over layers."""
Kept = Literal["first", "elsewhere"]
"""What is to be kept: the first task, or the text elsewhere."""
Runs = dict[str, list[dict[str, Any]]]
"""The JSON of an entry's final runs, by the entry's name."""


@dataclass(frozen=True)
class Losses:
    """The losses on one task or text, (rates, seeds, questions), and the tokens of each question, (questions,)."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]

    def mean(self) -> NDArray[np.float64]:
        """Nats per token at each rate, (rates,)."""
        return np.asarray(self.nll.mean(axis=1).sum(axis=-1) / self.tokens.sum())

    def resampled(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """The means, (resamples, rates), with each question counted as often as ``counts`` (resamples, questions)."""
        return np.asarray((counts @ self.nll.mean(axis=1).T) / (counts @ self.tokens)[:, None])


@dataclass(frozen=True)
class Curve:
    """An entry along its rates, ascending, at those of them where every seed has a run that did not diverge."""

    entry: str
    rates: list[float]
    seeds: list[int]
    kept: Losses
    learned: Losses
    diverged: list[float] = field(default_factory=list)
    """Rates at which a run did."""

    @property
    def best(self) -> int:
        """The place of the rate at which the most was learned."""
        return int(np.argmin(self.learned.mean()))

    def only(self, seeds: list[int]) -> Curve:
        """The curve of these seeds alone."""
        chosen = [self.seeds.index(seed) for seed in seeds]
        kept, learned = (Losses(one.nll[:, chosen], one.tokens) for one in (self.kept, self.learned))
        return replace(self, seeds=seeds, kept=kept, learned=learned)


def paired(one: Curve, other: Curve) -> tuple[Curve, Curve] | None:
    """Both curves by the seeds that they share; None without any."""
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    return (one.only(seeds), other.only(seeds)) if seeds else None


def final_runs(study: Study) -> Runs:
    """Every finished run at a rate and with a seed that the study names."""
    return {name: _finals(study, name) for name in study.entries}


def _finals(study: Study, name: str) -> list[dict[str, Any]]:
    rates = study.rates(name)
    return stored_finals(study, name, lambda rate: nearest_index(rate) in rates)


def curves_of(runs: Runs, kept: Kept = "first") -> list[Curve]:
    """The curves of all entries that have one; none without text elsewhere where that is asked for."""
    known = {name: [run for run in of_entry if kept == "first" or "texts" in run] for name, of_entry in runs.items()}
    return [found for name, of_entry in known.items() if (found := _curve(name, of_entry, kept)) is not None]


def _curve(name: str, runs: Sequence[dict[str, Any]], kept: Kept) -> Curve | None:
    """The curve of an entry by the seeds that all its rates have; None without one run that did not diverge."""
    by_rate: dict[float, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        training = run["config"]["training"]
        by_rate[training["learning_rate"]][training["seed"]] = run
    seeds = sorted(set.intersection(*(set(of_rate) for of_rate in by_rate.values()))) if by_rate else []
    rates = sorted(rate for rate, of_rate in by_rate.items() if all(_is_finite(of_rate[seed], kept) for seed in seeds))
    if not rates or not seeds:
        return None
    chosen = [[by_rate[rate][seed] for seed in seeds] for rate in rates]
    for run in (run for of_rate in chosen for run in of_rate):
        check_paired(run, chosen[0][0])
    of_kept = _losses([[_kept(run, kept) for run in of_rate] for of_rate in chosen])
    learned = _losses([[run["questions"] for run in of_rate] for of_rate in chosen])
    return Curve(name, rates, seeds, of_kept, learned, diverged=sorted(by_rate.keys() - rates))


def run_rows(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """The runs in plain values, by entry, rate and seed; None for what a diverged run lacks."""
    rows = [
        {"entry": name, "method": study.entries[name].method, **_row(run)}
        for name, of_entry in runs.items()
        for run in of_entry
    ]
    order = list(runs)
    return sorted(rows, key=lambda row: (order.index(row["entry"]), row["learning_rate"], row["seed"]))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    training, second, first = result["config"]["training"], result["scores"]["all"], result["first"]["scores"]["all"]
    nothing = {"mean": None, "stderr": None}
    return {
        "learning_rate": training["learning_rate"],
        "seed": training["seed"],
        "parameters": result["parameters"],
        "second_loss": second["gold_loss"],
        "second_accuracy": second["accuracy"],
        "first_loss": first["gold_loss"],
        "first_accuracy": first["accuracy"],
        "forgot": result["forgot"]["first"],
        "forgot_elsewhere": result["forgot"].get("elsewhere", nothing),
        **{figure: None if result["change"] is None else result["change"][figure]["mean"] for figure in EXPLANATIONS},
        "seconds": result["seconds"],
    }


def _kept(run: dict[str, Any], kept: Kept) -> dict[str, Any]:
    """The losses on what is to be kept."""
    found: dict[str, Any] = run["first"]["questions"] if kept == "first" else run["texts"]
    return found


def _is_finite(run: dict[str, Any], kept: Kept) -> bool:
    return None not in (*run["questions"]["nll"], *_kept(run, kept)["nll"])


def _losses(questions: list[list[dict[str, Any]]]) -> Losses:
    nll = [[one["nll"] for one in seeds] for seeds in questions]
    return Losses(np.array(nll, dtype=np.float64), np.array(questions[0][0]["tokens"], dtype=np.float64))
