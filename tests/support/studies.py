"""Studies whose runs are written and not trained, and the pieces of small ones that are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoa_lab.study.results import Row
from smoa_lab.study.runner import Runner
from smoa_lab.study.statistics import Difference, Interval
from smoa_lab.study.study import Entry, Study
from smoa_lab.study.trials import Trial, TrialStore

ADAPTER = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}


def entry(method: str = "smoa", **values: Any) -> Entry:
    """An entry of a study of tiny models."""
    return Entry(method=method, learning_rate=0.01, **{"adapter": ADAPTER} | values)


QUESTIONS = 40


def tiny_study(folder: Path) -> Study:
    """Two entries of one budget and a third of another; nothing is run yet."""
    return Study(
        folder=folder,
        shared={"model": {"name": "base"}, "data": {"tasks": ["arc_easy"]}, "training": {"use_cpu": True}},
        entries={
            "ours": {"method": "smoa", "learning_rate": 0.01, "budget": "small"},
            "lora": {"method": "lora", "learning_rate": 0.01, "budget": "small"},
            "full": {"method": "full", "learning_rate": 0.001, "budget": "large"},
        },
    )


def finish(study: Study, trial: Trial, loss: float | None, **values: Any) -> None:
    """Store the result of a trial, with the same loss on every question; None is a run that diverged."""
    config = Runner(study.shared).config(study.entries[trial.entry], trial.learning_rate, trial.seed)
    result = {
        "config": config.model_dump(mode="json"),
        "parameters": 1000,
        "seconds": 7.0,
        "scores": {"all": {"gold_loss": loss, "accuracy": 0.5, "majority": None}},
        "questions": {
            "task": ["arc_easy"] * QUESTIONS,
            "nll": [None if loss is None else loss + i / QUESTIONS for i in range(QUESTIONS)],
            "tokens": [1] * QUESTIONS,
            "right": [int(loss is not None and i % 2 == 0) for i in range(QUESTIONS)],
        },
    }
    file = TrialStore(study.folder).file(trial.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | values))


def row(entry: str = "lora", **values: Any) -> Row:
    """A row of a study's table; its reference is not there."""
    known: dict[str, Any] = {
        "entry": entry,
        "method": "lora",
        "budget": "all",
        "reference": "ours",
        "parameters": 1000,
        "learning_rate": 0.01,
        "search": None,
        "seeds": [3, 4],
        "loss": 2.5,
        "loss_spread": 0.1,
        "accuracy": 0.5,
        "accuracy_spread": 0.1,
        "accuracy_interval": Interval(0.5, 0.4, 0.6),
        "task_accuracy": {"csqa": 0.5},
        "seconds": 7.0,
        "accuracy_difference": None,
        "loss_difference": Difference(0.5, 0.25, 0.75, "worse"),
    }
    return Row(**known | values)


def page(study: Study) -> str:
    return (study.folder / "README.md").read_text()


def finish_a_study(study: Study) -> None:
    """Searches and final runs of two entries, one of them diverged at a rate, and the untouched model."""
    for name, rate, loss in (("ours", 0.003, 2.2), ("ours", 0.01, 2.1), ("ours", 0.03, None), ("lora", 0.01, 2.3)):
        finish(study, Trial("tuning", name, rate, 100), loss)
    for seed in (0, 1):
        finish(
            study, Trial("final", "ours", 0.01, seed), 2.0, steps=60, provenance={"device": "a CPU", "commit": "c" * 40}
        )
        finish(study, Trial("final", "lora", 0.01, seed), 2.5)
    scores = {"all": {"gold_loss": 4.0, "accuracy": 0.25, "majority": 0.6}}
    finish_untouched(study, scores=scores)


def finish_untouched(study: Study, **values: Any) -> None:
    """Store a result of the untouched model."""
    config = Runner(study.shared).untouched_config(next(iter(study.entries.values()))).model_dump(mode="json")
    study.folder.mkdir(parents=True, exist_ok=True)
    (study.folder / "untouched.json").write_text(json.dumps({"config": config, **values}))
