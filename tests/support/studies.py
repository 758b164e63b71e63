"""Studies whose runs are written and not trained, and `StudyLife`: what a user does with one."""

import copy
import gzip
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.basics.files import write_whole
from smoa_lab.basics.values import portable
from smoa_lab.config.run import RunConfig
from smoa_lab.data.answers import ANSWERED
from smoa_lab.study import run_study, written
from smoa_lab.study.finished import Run, chosen, read_finished
from smoa_lab.study.report import SUMMARY, Report, report
from smoa_lab.study.run_study import work
from smoa_lab.study.search import Chosen
from smoa_lab.study.study import STUDY, Study, edit, load_study
from smoa_lab.study.verdict import Verdict, verdict
from smoa_lab.study.written import ask
from smoa_lab.training.run_folder import RunFolder

ROWS = 60
BEST = {"smoa": 0.01, "lora": 0.002, "full": 0.0003, "hira": 0.002}
"""Each method's best learning rate in a study that is written."""
REACHED = {"smoa": 2.0, "lora": 2.1, "full": 2.2, "hira": 2.3}
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
        self.untouched_loss: float | None = 4.0
        self.kind = "messages"
        """Of the rows: messages or choices."""
        self.loss: Callable[[RunConfig], float | None] = self.usual_loss
        self.step_seconds = {"smoa": 0.108, "lora": 0.1, "full": 0.2, "hira": 0.1}
        self.parameters = 1000
        self.digests = {"data": "d", "base": "b", "encoder": "e", "forgetting": "f"}
        self.rows = {"train": 400, "validation": 40, "test": ROWS}
        self.fails: str | None = None
        """The method whose runs end in an error."""
        self.lives = math.inf
        """After so many more runs the process is killed in the middle of one."""

    def usual_loss(self, config: RunConfig) -> float | None:
        """The lower the nearer the rate is to the best of the method."""
        distance = abs(math.log10(config.training["learning_rate"] / BEST[config.method]))
        return REACHED[config.method] + distance

    def inputs(self, config: RunConfig) -> dict[str, Any]:
        """The data's digests and sizes."""
        return {"digests": dict(self.digests), "rows": dict(self.rows)}

    def run(self, config: RunConfig, may_diverge: bool = True) -> dict[str, Any]:
        """A run, unless the folder is another process's or has one."""
        folder = RunFolder(config.folder)
        with folder.alone():
            if folder.finished:
                raise ConfigError(f"{folder.path}: contains a finished run")
            if self.fails == config.method:
                raise RuntimeError("no memory.")
            if self.lives <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.lives -= 1
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

    def time_steps(self, config: RunConfig, most: int, seconds: float) -> float:
        """The seconds of a step, of which the first one takes twice as many."""
        self.timed.append(config.folder.as_posix())
        took = self.step_seconds[config.method]
        self.now += 1.0 + took * (most + 1)
        return took

    def _metrics(self, config: RunConfig) -> dict[str, Any]:
        self.ran.append(config.folder.as_posix())
        return {
            "config": portable(config.model_dump(mode="json")),
            "provenance": {"device": "a CPU", "threads": 1, "commit": "c" * 40},
            "digests": dict(self.digests),
            "data": {"tokens": {"total": 6 * ROWS}},
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
    patch.setattr(run_study, "report", lambda *_: None)  # which takes longer than all else, after each run
    patch.setattr(run_study, "time_steps", runs.time_steps)
    patch.setattr(written, "inputs", runs.inputs)
    patch.setattr(written, "empty_model", lambda model: None)
    patch.setattr(written, "check_adapter", lambda model, wanted: None)
    return runs


def fake_time(patch: pytest.MonkeyPatch, runs: WrittenRuns) -> None:
    """Time passes by runs alone, as long as they would take."""
    clock = SimpleNamespace(sleep=time.sleep, **dict.fromkeys(("monotonic", "perf_counter", "time"), lambda: runs.now))
    patch.setattr(run_study, "time", clock)


class StudyLife:
    """A user's calls on a study whose runs are written and not trained. After each, `check` holds what they left
    against what was asked for; `alone` is the same study as if nobody had ever stopped or changed it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **values: Any) -> None:
        self.runs = write_runs(patch)
        self.file = tiny_study(folder, **values)
        self.failed: dict[str, str] = {}

    # what a user does

    def start(self, *only: str, deadline: float = math.inf) -> Report:
        """`smoa compare FOLDER`, also to go on after whatever ended the last one; ``only`` entries or budgets."""
        self.failed = work(self.file, only, deadline)
        made, study = self.check(), self.study
        most = {"none": 0, "best": 1}.get(study.keep, len(self.runs.ran))
        for name in study.chosen(only):
            assert len(self.named(f"{name}/*/adapter")) <= max(most, not study.seeds), "more adapters than are kept"
        return made

    def kill(self, after: int, *only: str) -> None:
        """A start that is killed in the middle of a run, after so many others."""
        if (process := os.fork()) == 0:
            self.runs.lives = after
            try:
                work(self.file, only)
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        self.runs.ran += [place for place in self.places() if place not in self.runs.ran]
        self.check()

    def add(self, name: str, method: str = "lora", budget: str = "small", learning_rate: float = 0.002) -> None:
        """One entry more, in an editor, and the command again."""
        entry = {"method": method, "learning_rate": learning_rate, "budget": budget}
        edit(self.file, [f"entries.{name}={json.dumps(entry)}"])
        self.ask()

    def ask(self, *changes: str, seeds: int | None = None) -> Study:
        """`smoa compare FOLDER KEY=VALUE --seeds N`, up to where runs begin."""
        study = ask(self.file, changes, seeds)
        self.check()
        return study

    def edit(self, *changes: str) -> None:
        """In an editor."""
        edit(self.file, changes)

    def fail(self, method: str | None) -> None:
        """From now on runs of this method end in an error; None where it is mended."""
        self.runs.fails = method

    def replay(self) -> Report:
        """`smoa compare FOLDER --report-only`."""
        return report(self.study, self.failed)

    def alone(self) -> "StudyLife":
        """The same file in a folder of its own, run by one start."""
        twin = copy.copy(self)
        twin.file = self.file.parent.with_name("alone") / STUDY
        twin.file.parent.mkdir()
        twin.file.write_bytes(self.file.read_bytes())
        twin.start()
        return twin

    # what is there

    @property
    def study(self) -> Study:
        return load_study(self.file)

    @property
    def finished(self) -> Mapping[str, Run]:
        return read_finished(self.study)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return verdict(self.study, self.finished, self.failed)

    @property
    def page(self) -> str:
        return self.file.with_name("README.md").read_text()

    def said(self) -> dict[str, Any]:
        """What is reported of each budget, but for how many runs there are."""
        keys = ("take", "round", "level", "added", "measure", "pairs", "gains")
        found = self.replay().summary["budgets"]
        return {name: {key: one.get(key) for key in keys} for name, one in found.items()}

    def places(self) -> list[str]:
        """The folders of finished runs."""
        return sorted(file.parent.as_posix() for file in self.file.parent.rglob("metrics.json"))

    def named(self, pattern: str) -> list[str]:
        """What fits a pattern in the study's folder."""
        return sorted(path.relative_to(self.file.parent).as_posix() for path in self.file.parent.glob(pattern))

    def chosen(self, name: str) -> Chosen:
        """The rate of an entry whose search is over."""
        found = chosen(self.study, self.finished, name)
        assert found is not None
        return found

    def look_again(self) -> None:
        """Files of runs were changed: they are read anew."""
        for metrics in self.file.parent.rglob("metrics.json"):
            metrics.touch()

    # what must hold

    def check(self) -> Report:
        """Each job ran once; looks are of whole rounds, at the level that they have; what is reported is written."""
        ran = [place for place in self.runs.ran if Path(place).is_relative_to(self.file.parent)]
        assert sorted(ran) == self.places(), "a job was run twice, or its run is lost"
        made, study = self.replay(), self.study
        assert json.loads(self.file.with_name(SUMMARY).read_text()) == made.summary
        assert all(f"**{sentence}**" in self.page for sentence in made.verdict)
        for name, one in self.verdicts.items():
            assert one.round == 0 or dict(one.looks(len(study.seeds)))[one.round] == one.level, "a level of its own"
            assert all([*own] == study.seeds[: one.round] for own in one.runs.values() if one.round), "half a round"
            assert one.take is None or one.take in study.budgets()[name]
        return made
