"""Studies whose runs are written and not trained, and the pieces of small ones that are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoa_lab.data.rows import question
from smoa_lab.study.comparison import runner_of
from smoa_lab.study.results import Row
from smoa_lab.study.statistics import Difference, Interval
from smoa_lab.study.study import Entry, Study
from smoa_lab.study.trials import Trial, TrialStore
from tests.support import lab

ENCODER_ADAPTER = {"r": 4, "num_blocks": 2, "target_modules": ["query", "value"]}


def entry(method: str = "smoa", **values: Any) -> Entry:
    """An entry of a study of tiny encoders."""
    return Entry(method=method, learning_rate=0.01, **{"adapter": ENCODER_ADAPTER} | values)


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
    runner = runner_of(study)
    result = {
        "config": runner.stored_config(runner.config(study.entries[trial.entry], trial.learning_rate, trial.seed)),
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
        "elsewhere": None,
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
    runner = runner_of(study)
    config = runner.stored_config(runner.untouched_config(next(iter(study.entries.values()))))
    study.folder.mkdir(parents=True, exist_ok=True)
    (study.folder / "untouched.json").write_text(json.dumps({"config": config, **values}))


def tiny_sequence(room: Path) -> dict[str, Any]:
    """The values of a study that learns questions of one task after those of another, on a tiny model in ``room``."""
    for task in ("arc_easy", "piqa"):
        parts = (lab.questions(number, f"{task} {part}", task) for part, number in (("train", 12), ("test", 3)))
        lab.fill_cache(room / "cache", *parts, task)
    prose = [question("prose", str(i), f"Title {i}", "Some words of a text. " * (i + 1)) for i in range(3)]
    lab.fill_cache(room / "cache", prose, prose[:2], "prose")
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
    adapter = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}
    return {
        "kind": "sequence",
        "folder": str(room / "study"),
        "first": {"data": {"tasks": ["arc_easy"], "validation_examples": 0}, "learning_rate": 1e-3},
        "shared": {
            "model": {"name": str(lab.tiny_base(room / "base"))},
            "data": {"tasks": ["piqa"], "validation_examples": 0},
            "training": training,
        },
        "other_domain": {"tasks": ["prose"]},
        "tuning": {"sweep": [0.003, 0.01], "per_decade": 2},
        "seeds": [0],
        "entries": {
            "ours": {"method": "smoa", "adapter": adapter, "learning_rate": 0.01},
            "full": {"method": "full", "learning_rate": 0.001, "sweep": [0.001, 0.001]},
        },
    }


def finish_in_turn(study: Study, trial: Trial, second: float | None, first: float, **values: Any) -> None:
    """Store the result of a sequence's trial, with these losses on every question; None is a run that diverged."""
    nll = [first + i / QUESTIONS for i in range(QUESTIONS)]
    scores = {"all": {"gold_loss": sum(nll) / QUESTIONS, "accuracy": 0.5}}
    figures = ("relative_norm", "relative_spectral_norm", "stable_rank", "intruders")
    of_first = {
        "first": {
            "scores": scores,
            "questions": {
                "task": ["csqa"] * QUESTIONS,
                "nll": nll,
                "tokens": [1] * QUESTIONS,
                "right": [1] * QUESTIONS,
            },
        },
        "forgot": {"first": {"mean": first, "stderr": 0.1}, "elsewhere": {"mean": 0.1 * first, "stderr": 0.01}},
        "change": {figure: {"mean": first, "max": 2 * first} for figure in figures},
    }
    finish(study, trial, second, **of_first | values)
