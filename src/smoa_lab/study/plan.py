"""The plan of a study: how many steps and seeds its runs take, and how long that is.

It is made once, by timing runs that are thrown away, and no resume changes it.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import Field

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.base_models import empty_model
from smoa_lab.basics.atomic import check_place
from smoa_lab.basics.plain import json_text
from smoa_lab.basics.section import Section
from smoa_lab.config.run import RunConfig
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.pages.tables import Table, counted
from smoa_lab.study.search import rate_text
from smoa_lab.study.study import Job, Stage, Study, load_study
from smoa_lab.training.adapting import check_adapter
from smoa_lab.training.loaded_run import inputs

logger = logging.getLogger(__name__)

TIMED = 20
"""Steps of a timing run."""
FEWEST = 30
"""Steps below which a plan takes fewer seeds instead: fewer hardly tell one rate from another."""
FEWEST_SEEDS = 2
TWO_SEEDS = "Two seeds: what they differ by makes intervals 3.6 times as wide as with three"
"""Half an interval over seeds is t · s / √n; Student's t is 12.7 for two seeds and 4.3 for three."""
MARGIN = 1.1
"""What a plan is taken to last, of what it lasts by its timing runs."""
FEW_ROWS = 50
"""Held-out rows below which a comparison shows large differences only."""
PARAMETER_TOLERANCE = 0.02
"""How far the trainable parameters of an entry may differ from what it declares."""
INPUTS = {
    "data": "the rows",
    "base": "the base model",
    "encoder": "what makes tokens of rows (tokenizer, template or max_length)",
    "forgetting": "the text of forgetting.text",
}
Metrics = dict[str, Any]


class Timing(Section):
    """What an entry's timing run says: its trainable parameters, seconds of a step, and of a search's run ``beside``
    its steps."""

    parameters: int
    step: float
    beside: float


class Plan(Section):
    """``study`` is the file that was planned, ``digests`` and ``rows`` what its runs start from. ``seeds`` are those of
    the file that are run, for ``steps`` each; ``final`` is how many seconds a final run takes more than a search's."""

    format: Literal[1] = 1
    study: dict[str, Any]
    digests: dict[str, str]
    rows: dict[str, int]
    minutes: float | None
    steps: int
    seeds: list[int]
    final: float
    entries: dict[str, Timing] = Field(default={})

    def seconds(self, stage: Stage, entry: str) -> float:
        """About how long a job of that stage takes."""
        timing = self.entries[entry]
        if stage.startswith("untouched"):
            return timing.beside + self.final
        return timing.beside + self.steps * timing.step + (self.final if stage == "final" else 0.0)

    def longest(self, max_runs: int) -> float:
        """Seconds of all, one after the other, each search at its longest."""
        untouched = sum(self.seconds("untouched", name) for name in [*self.entries][:1] if self.seeds)
        searches = max_runs * sum(self.seconds("search", name) for name in self.entries)
        return untouched + searches + len(self.seeds) * sum(self.seconds("final", name) for name in self.entries)

    def table(self, study: Study, workers: int = 1) -> Table:
        """A line for each entry, and what they share as caption."""
        lines = []
        for name, timing in self.entries.items():
            search, final = self.seconds("search", name), self.seconds("final", name)
            runs, rate = study.tuning.max_runs, rate_text(study.entries[name].learning_rate)
            parts = f"{runs} × {duration(search)}", f"{len(self.seeds)} × {duration(final)}"
            lines.append([name, f"{timing.parameters:,}", rate, f"{timing.step:.3g}", *parts])
        held_out = f"{self.rows['validation']} choose the rates, {self.rows['test']} decide"
        lasts = duration(self.longest(study.tuning.max_runs) / workers)
        each_run = f"{counted(self.steps, 'step')} a run on {counted(self.rows['train'], 'row')}"
        caption = f"{each_run}; {held_out}; {lasts} at most."
        if len(self.seeds) == 2:
            three = self.model_copy(update={"seeds": [0, 1, 2], "steps": min(FEWEST, self.steps)})
            time = duration(MARGIN * three.longest(study.tuning.max_runs) / workers)
            caption += f" {TWO_SEEDS}, which take {time} at {three.steps} steps."
        return Table(["entry", "trained", "from rate", "s a step", "longest search", "final runs"], lines, caption)


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


RunAll = Callable[[Sequence[tuple[Job, RunConfig]]], dict[Job, Metrics]]
"""Runs jobs; their metrics get ``wall_seconds``, which everything took."""


def prepare(study: Study, run_all: RunAll | None, minutes: float | None = None, workers: int = 1) -> Plan:
    """The plan of a study in its folder, made if there is none, and completed for entries and seeds that were added.
    With ``minutes`` it takes fewer steps, then fewer seeds, until so many workers need no longer from now on. Without
    ``run_all`` it is what it is."""
    started = time.monotonic()
    configs = {name: study.config(name) for name in study.entries}
    found = inputs(next(iter(configs.values())))
    for part, use in {"validation": "rates", **({"test": "entries"} if study.seeds else {})}.items():
        if not found["rows"][part]:
            raise ConfigError(f"shared.data: leaves no {part} rows, by which {use} are compared; give more rows")
    if study.seeds and found["rows"]["test"] < FEW_ROWS:
        logger.warning(few_rows(found["rows"]["test"]))
    study.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(study.folder / ".lock"):  # another process may make it now
        file = study.folder / "plan.json"
        plan = Plan.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
        if plan is not None:
            changed = changes(plan.study, study)
            changed += [f"{what} changed" for what in other_inputs(plan.digests, found["digests"])]
            changed += [] if minutes in (None, plan.minutes) else [f"--minutes: {plan.minutes}, now {minutes}"]
            refuse(f"{study.folder}: contains a study that was planned otherwise", changed)
        if run_all is None:
            if plan is None:
                raise DataError(f"{study.folder}: nothing has run yet; run smoa compare on this study first")
            return plan
        known = {} if plan is None else plan.entries
        rehearses = bool(study.seeds) and (plan is None or not plan.seeds)
        first = next(iter(configs)) if rehearses else None
        new = {name: config for name, config in configs.items() if name not in known or name == first}
        timed = timing_runs(study, new, run_all, rehearses) if new else {}
        timings = {job.entry: timing_of(study, job, run) for job, run in timed.items() if job.stage == "timing"}
        if plan is None:
            job, last = next(iter(timed.items()))
            steps = steps_of(configs[job.entry], last)
            plan = Plan(study=as_planned(study), steps=steps, seeds=study.seeds, minutes=minutes, final=0.0, **found)
        final = plan.final
        if rehearses:
            job, last = [*timed.items()][-1]
            final = max(0.0, timing_of(study, job, last).beside - min(one.beside for one in timings.values()))
        added = [seed for seed in study.seeds if seed not in plan.study["seeds"]]
        more = {"seeds": [*plan.seeds, *added], "entries": {**known, **timings}, "final": final}
        plan = plan.model_copy(update={"study": as_planned(study), **more})
        if minutes is not None and not known:
            left = 60 * minutes - (time.monotonic() - started)
            plan = fitted(plan, study.tuning.max_runs, left * workers)
        write_whole(file, json_text(plan.model_dump(mode="json")) + "\n")
    return plan


def other_inputs(planned: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is another than planned; an older plan knows nothing of ``forgetting.text``."""
    return [what for key, what in INPUTS.items() if key in planned and planned[key] != found.get(key)]


def check_folder(study: Study) -> None:
    """Raise ConfigError if the study's folder has another study, or something else."""
    file = study.folder / "study.yaml"
    check_place(file)
    if file.is_file():
        refuse(f"{file}: says otherwise", changes(as_planned(load_study(file)), study))
    elif study.folder.is_dir() and not (study.folder / "plan.json").is_file():
        others = [path.name for path in study.folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise ConfigError(f"{study.folder}: contains {min(others)} and no study; choose another folder")


@contextmanager
def study_file(study: Study, given: Path | None = None) -> Iterator[None]:
    """Write a study into its folder, unless the file there is the one that was ``given``, and plan it in the block: an
    interrupted start leaves the file to be edited, a study that is refused leaves none, by which the next would be
    refused."""
    file = study.folder / "study.yaml"
    is_new = not file.exists()
    if given is None or given.resolve() != file.resolve():
        write_whole(file, to_yaml(study.model_dump(mode="json", exclude_unset=True)))
    try:
        yield
    except SmoaError:
        if is_new:
            file.unlink()
        raise


def few_rows(number: int) -> str:
    """The warning that a comparison on so few rows has."""
    held_out = "row is held out, which shows" if number == 1 else "rows are held out, which show"
    return f"Only {number} {held_out} large differences only; {FEW_ROWS} or more are better."


def as_planned(study: Study) -> dict[str, Any]:
    """What a plan keeps of a study's file."""
    return study.model_dump(mode="json", exclude={"folder"})


def changes(before: dict[str, Any], study: Study) -> list[str]:
    """What differs in a study from what was kept of it before; entries and seeds may have been added."""
    now = as_planned(study)
    now["entries"] = {name: entry for name, entry in now["entries"].items() if name in before["entries"]}
    now["seeds"] = [seed for seed in now["seeds"] if seed in before["seeds"]]
    return list(_differences(before, now))


def refuse(title: str, changed: Sequence[str]) -> None:
    """Raise ConfigError with all that was changed, if anything was."""
    if changed:
        lines = "\n  ".join([title, *changed])
        raise ConfigError(f"{lines}\n  put that back, or use a new folder (folder=studies/NAME)")


def _differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    elif old != new:
        yield f"{place}: {json.dumps(old)}, now {json.dumps(new)}"


def timing_runs(study: Study, configs: dict[str, RunConfig], run_all: RunAll, rehearses: bool) -> dict[Job, Metrics]:
    """A few steps of each entry, as in a search, and last of the first one as in a final run. No folder is left."""
    for config in configs.values():
        if (wanted := config.peft_config()) is not None:
            check_adapter(empty_model(config.model), wanted)
    stages: list[tuple[Stage, str]] = [("timing", name) for name in configs]
    stages += [("rehearsal", name) for name in [*configs][:1] if rehearses]
    jobs = [Job(stage, name, study.entries[name].learning_rate, study.tuning.seed) for stage, name in stages]
    logger.info("%d timing runs of %d steps, which are thrown away", len(jobs), TIMED)
    folder = study.folder / "timing"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        steps = {name: min(TIMED, _max_steps(config) or TIMED) for name, config in configs.items()}
        return run_all([(job, study.job_config(configs[job.entry], job, steps[job.entry])) for job in jobs])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def timing_of(study: Study, job: Job, metrics: Metrics) -> Timing:
    """What a timing run says; raises ConfigError if it trained another number of parameters than its entry declares."""
    trained, wanted = int(metrics["parameters"]["trainable"]), study.entries[job.entry].parameters
    if wanted is not None and abs(trained - wanted) > PARAMETER_TOLERANCE * wanted:
        found = f"trains {trained:,} parameters, not {wanted:,} to within {PARAMETER_TOLERANCE:.0%}"
        raise ConfigError(f"entries.{job.entry}: {found}; change its size (smoa budget --method) or what it declares")
    seconds, steps = metrics["training"]["seconds"], metrics["training"]["steps"]
    beside = max(0.0, metrics["wall_seconds"] - seconds)
    return Timing(parameters=trained, step=seconds / max(1, steps), beside=beside)


def _max_steps(config: RunConfig) -> int:
    return max(0, int(config.training.get("max_steps", 0)))


def steps_of(config: RunConfig, metrics: Metrics) -> int:
    """The steps of a whole run: ``max_steps``, or the epochs, whose length the log of a timing run tells."""
    if steps := _max_steps(config):
        return steps
    last = next(entry for entry in reversed(metrics["history"]) if entry.get("epoch"))
    of_epoch = round(float(last["step"]) / float(last["epoch"]))
    return math.ceil(float(config.training.get("num_train_epochs", 3)) * of_epoch)


def fitted(plan: Plan, max_runs: int, seconds: float) -> Plan:
    """The plan with the most seeds, and then steps, that ``seconds`` of one worker are enough for."""
    fewest = min(FEWEST, plan.steps)
    for number in range(len(plan.seeds), min(len(plan.seeds), FEWEST_SEEDS) - 1, -1):
        smallest, longer = (
            plan.model_copy(update={"seeds": plan.seeds[:number], "steps": steps}) for steps in (fewest, fewest + 1)
        )
        least = MARGIN * smallest.longest(max_runs)
        if least <= seconds:
            of_step = max(MARGIN * longer.longest(max_runs) - least, 1e-9)
            return smallest.model_copy(update={"steps": min(plan.steps, fewest + int((seconds - least) / of_step))})
    comparison = f"the smallest comparison ({fewest} steps a run, {number} seeds and whole searches)"
    lasts, left = duration(least), duration(max(0.0, seconds))
    raise ConfigError(
        f"--minutes: {comparison} takes about {lasts}, and {left} are left; give more, or fewer --methods"
    )
