"""Studies whose runs are written and not trained, and the pieces of small ones that are."""

import gzip
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.basics.atomic import write_whole
from smoa_lab.basics.folders import portable
from smoa_lab.config.run import RunConfig
from smoa_lab.data.answers import ANSWERED
from smoa_lab.study import asked, fit, run_study
from smoa_lab.study.finished import read_finished
from smoa_lab.study.report import Report, report
from smoa_lab.study.run_study import work
from smoa_lab.study.study import STUDY, Study, load_study
from smoa_lab.study.verdict import Verdict, verdict
from smoa_lab.training.run_folder import RunFolder

ROWS = 60
BEST = {"smoa": 0.01, "lora": 0.002, "full": 0.0003}
"""Each method's best learning rate in a study that is written."""
REACHED = {"smoa": 2.0, "lora": 2.1, "full": 2.2}
"""Its loss there."""


def tiny_study(folder: Path, **values: Any) -> Path:
    """The file of a study of two entries of one budget and a third of another; nothing is run yet."""
    entries = {
        "ours": {"method": "smoa", "learning_rate": 0.01, "budget": "small"},
        "lora": {"method": "lora", "learning_rate": 0.002, "budget": "small"},
        "full": {"method": "full", "learning_rate": 0.001, "budget": "large"},
    }
    shared = {
        "model": {"name": "base"},
        "data": {"train": "chats.jsonl"},
        "training": {"use_cpu": True, "max_steps": 100},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STUDY
    file.write_text(yaml.safe_dump({"shared": shared, "entries": entries} | values, sort_keys=False))
    return file


class WrittenRuns:
    """What stands in for ``run``, ``score_untouched`` and ``inputs``: it writes a run's folder, and trains nothing."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        """The folders of the runs."""
        self.timed: list[str] = []
        """And those of steps that were timed."""
        self.now = 0.0
        """What clocks show, where a test sets them by ``fake_time``: seconds of runs at their entries' speed."""
        self.slower = 1.0
        self.untouched_loss = 4.0
        self.kind = "messages"
        """Of the rows: messages or choices."""
        self.loss: Callable[[RunConfig], float | None] = self.usual_loss
        self.step_seconds = {"smoa": 0.108, "lora": 0.1, "full": 0.2}
        self.parameters = 1000
        self.digests = {"data": "d", "base": "b", "encoder": "e", "forgetting": "f"}
        self.rows = {"train": 400, "validation": 40, "test": ROWS}
        self.length = 6
        """Of a row with its prompt, in tokens."""
        self.groups = 0
        """Of rows of the test part that belong together; 0 where each counts by itself."""

    def usual_loss(self, config: RunConfig) -> float | None:
        """The lower the nearer the rate is to the best of the method."""
        distance = abs(math.log10(config.training["learning_rate"] / BEST[config.method]))
        return REACHED[config.method] + distance

    def inputs(self, config: RunConfig, trains: bool = True) -> dict[str, Any]:
        """The data's digests and sizes."""
        groups = self.groups or self.rows["test"]
        return {"digests": dict(self.digests), "rows": dict(self.rows), "groups": groups, "length": self.length}

    def run(self, config: RunConfig) -> dict[str, Any]:
        """A run, unless the folder is another process's or has one."""
        folder = RunFolder(config.folder)
        with folder.alone():
            if folder.finished:
                raise ConfigError(f"{folder.path}: contains a finished run")
            return self.write(config)

    def write(self, config: RunConfig) -> dict[str, Any]:
        """Write a run's files."""
        folder, loss = RunFolder(config.folder), self.loss(config)
        steps = int(config.training["max_steps"])
        per_step = self.step_seconds[config.method]
        self.now += self.slower * (per_step * steps + (2.0 if config.scoring.part == "validation" else 5.0))
        rows = [self._row(number, loss, config) for number in range(ROWS)]
        history = [{"step": step, "loss": 4 - step / steps, "epoch": step / 50} for step in range(10, steps + 1, 10)]
        samples = [{"question": f"Why {i}?", "reference": "So.", "after": f"{config.method} {i}"} for i in range(2)]
        metrics = self._metrics(config) | {
            "training": {"seconds": per_step * steps, "steps": steps, "resumed": False},
            "evaluation": {"after": self._scores(rows, loss)},
            "forgetting": {"change": 0.02 if config.method == "smoa" else 0.05} if config.forgetting.tokens else None,
            "samples": samples,
            "history": history,
        }
        folder.adapter.mkdir(parents=True, exist_ok=True)
        (folder.adapter / "adapter_model.safetensors").write_bytes(b"x")
        self._save(folder, metrics, rows)
        return metrics

    def untouched(self, config: RunConfig) -> dict[str, Any]:
        """The model as it is."""
        folder = RunFolder(config.folder)
        if folder.finished:
            raise ConfigError(f"{folder.path}: contains a finished run")
        samples = [{"question": f"Why {i}?", "reference": "So.", "before": "untouched"} for i in range(2)]
        scores = {"rows": ROWS, "loss": self.untouched_loss, "tokens": 360} | (
            {"accuracy": 0.25, "majority": 0.6} if self.kind == "choices" else {}
        )
        metrics = self._metrics(config) | {"evaluation": {"before": scores}, "samples": samples}
        seconds = 1.0 if config.scoring.part == "validation" else 4.0
        self.now += 1.0 + seconds
        metrics["training"] = {"seconds": seconds, "steps": 0}
        rows = [self._row(number, self.untouched_loss, config) for number in range(ROWS)]
        self._save(
            folder,
            metrics,
            [
                {**row, "before": row["after"], "right_before": number % 4 == 0, "answer_before": "5"}
                for number, row in enumerate(rows)
            ],
        )
        return metrics

    def time_steps(self, config: RunConfig, most: int, seconds: float) -> dict[str, Any]:
        """The first steps of a run."""
        self.timed.append(config.folder.as_posix())
        took = [2 * self.step_seconds[config.method]] + [self.step_seconds[config.method]] * (most - 1)
        self.now += 1.0 + sum(took)
        return {
            "parameters": {"trainable": self.parameters},
            "loading": 1.0,
            "seconds": took,
            "steps": int(config.training["max_steps"]),
        }

    def _metrics(self, config: RunConfig) -> dict[str, Any]:
        self.ran.append(config.folder.as_posix())
        return {
            "format": 2,
            "config": portable(config.model_dump(mode="json")),
            "provenance": {"device": "a CPU", "threads": 1, "commit": "c" * 40},
            "digests": dict(self.digests),
            "data": {"tokens": {"total": ROWS * self.length, "histogram": [[32, ROWS]]}},
            "parameters": {"trainable": self.parameters},
        }

    def _save(self, folder: RunFolder, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder.rows, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        write_whole(folder.metrics, json.dumps(metrics))

    def _row(self, number: int, loss: float | None, config: RunConfig) -> dict[str, Any]:
        chance = random.Random(f"{config.method} {config.training['seed']} {number}")
        tokens = 5 + number % 3
        value = None if loss is None else tokens * (loss + number / ROWS + chance.gauss(0, 0.02))
        row: dict[str, Any] = {"digest": f"{number:x}", "copy": 0, "part": config.scoring.part}
        row |= {"tokens": tokens, "after": value}
        if self.kind == "choices":
            row["right_after"] = int(number % 2 == 0 and config.method == "smoa")
        if config.data.metric in ANSWERED:  # half of the answers say too much
            answer = "4" if number % 2 else "It is 4"
            right = number % 4 < {"smoa": 4, "lora": 3}.get(config.method, 2)
            row |= {"reference": "4", "answer_after": answer if right else "5"}
            row |= {"own": json.dumps({"level": number % 3}), "where": f"rows.jsonl, row {number + 1}"}
        return row

    def _scores(self, rows: list[dict[str, Any]], loss: float | None) -> dict[str, Any]:
        return {"rows": len(rows), "loss": loss}


def write_runs(patch: pytest.MonkeyPatch) -> WrittenRuns:
    """Runs are written from now on."""
    runs = WrittenRuns()
    patch.setattr(run_study, "run", runs.run)
    patch.setattr(run_study, "score_untouched", runs.untouched)
    patch.setattr(run_study, "POLL_SECONDS", 0.005)
    patch.setattr(fit, "time_steps", runs.time_steps)
    patch.setattr(asked, "inputs", runs.inputs)
    patch.setattr(asked, "empty_model", lambda model: None)
    patch.setattr(asked, "check_adapter", lambda model, wanted: None)
    return runs


def fake_time(patch: pytest.MonkeyPatch, runs: WrittenRuns) -> None:
    """Time passes by runs alone, as long as they would take."""
    clock = SimpleNamespace(sleep=time.sleep, **dict.fromkeys(("monotonic", "perf_counter", "time"), lambda: runs.now))
    for module in (run_study, fit):
        patch.setattr(module, "time", clock)


def finished(file: Path) -> Report:
    """The report of a study after all its runs."""
    failed = work(file)
    return report(load_study(file), failed)


def verdicts(file: Path) -> dict[str, Verdict]:
    """What the finished runs say."""
    study: Study = load_study(file)
    return verdict(study, read_finished(study))


def page(file: Path) -> str:
    return file.with_name("README.md").read_text()
