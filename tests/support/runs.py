"""Runs whose metrics are written and not trained."""

import json
from pathlib import Path
from typing import Any


def stored_metrics() -> dict[str, Any]:
    """What a finished run on rows with choices leaves in metrics.json."""
    before = {"rows": 40, "tokens": 80, "loss": 3.25, "accuracy": 0.5, "accuracy_stderr": 0.08, "majority": 0.25}
    after = {**before, "loss": 2.125, "accuracy": 0.625}
    return {
        "format": 2,
        "config": {"model": {"name": "org/base"}, "method": "smoa", "training": {"learning_rate": 0.01}},
        "provenance": {"versions": {"smoa": "0.2.0", "trl": None}, "device": "a CPU", "commit": None, "dirty": None},
        "parameters": {"trainable": 448, "total": 10_000, "percent": 4.48},
        "training": {"steps": 20, "seconds": 7.25},
        "evaluation": {"before": before, "after": after},
        "gain": {"loss": -1.125, "loss_stderr": 0.25, "accuracy": 0.125, "accuracy_stderr": 0.05},
        "forgetting": {"text": "A story", "tokens": 2048, "before": 3.0, "after": 3.25, "change": 0.25, "stderr": 0.02},
        "samples": [{"question": "2 < 3?", "reference": "yes", "before": "", "after": "yes"}],
        "history": [
            *({"step": step, "loss": 4 / step, "learning_rate": 0.01 / step} for step in (5, 10, 15)),
            {"step": 20, "eval_loss": 2.5},
        ],
    }


def stored_run(folder: Path, **changes: Any) -> Path:
    """The folder of a finished run, without its adapter; ``changes`` are laid over its metrics."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {name: org/base}\nmethod: smoa\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(stored_metrics() | changes), encoding="utf-8")
    return folder
