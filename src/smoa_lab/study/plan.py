"""The plan of a study: how many steps its runs take, how many seeds there is time for, and how much time was used.

Steps are fixed once, after a few of each entry that are thrown away, and no resume changes them.
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
from statistics import fmean
from typing import Any, Literal

from filelock import FileLock
from pydantic import Field

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.base_models import empty_model
from smoa_lab.basics.files import check_place
from smoa_lab.basics.plain import json_text
from smoa_lab.basics.section import Section
from smoa_lab.config.methods import check_adapter
from smoa_lab.config.run import RunConfig
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.data.answers import ANSWERED, OWN
from smoa_lab.data.own_metric import own_metric
from smoa_lab.pages.tables import Table, counted
from smoa_lab.study.search import rate_text
from smoa_lab.study.study import Job, Stage, Study, load_study
from smoa_lab.training.loaded_run import inputs

logger = logging.getLogger(__name__)

FORMAT = 2
TIMED, TIMED_SECONDS = 5, 30.0
"""Steps of each entry that are timed, at most for so many seconds and all for a twentieth of --minutes."""
FEWEST = 30
"""Steps below which a plan takes fewer seeds instead: fewer hardly tell one rate from another."""
FIRST_SEEDS = 3
"""Seeds that come before more steps than these."""
LEAST_SEARCH, LEAST_SEEDS = 3, 2
"""Runs of an entry's search, and of its final ones, of FEWEST steps, without which there is no comparison."""
MARGIN = 1.1
"""What a plan is taken to last, of what it lasts by what was timed."""
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
Execute = Callable[..., Metrics]
"""Runs a job, with its config, and gives its metrics."""
UNTOUCHED: tuple[Stage, Stage] = ("untouched", "untouched-validation")


class Timing(Section):
    """What is known of an entry's runs: its trainable parameters, seconds of a step, and of a search's run ``beside``
    its steps."""

    parameters: int
    step: float
    beside: float


class Plan(Section):
    """``study`` is the file that was planned, ``digests`` and ``rows`` what its runs start from. ``seeds`` are those
    that are run, for ``steps`` each; ``final`` is how many seconds a final run takes more than a search's.

    With ``minutes`` nothing starts once ``used``, the seconds that all commands took, reaches ``limit``, and time that
    is left buys seeds of ``listed``. Entries or seeds that somebody asks for later lift the limit. ``looks`` are the
    numbers of final runs of a budget at which a verdict was shown.
    """

    format: Literal[1, 2] = 1
    study: dict[str, Any]
    digests: dict[str, str]
    rows: dict[str, int]
    minutes: float | None
    steps: int
    seeds: list[int]
    final: float
    entries: dict[str, Timing] = Field(default={})
    listed: list[int] = Field(default=[])
    limit: float | None = None
    used: float = 0.0
    looks: dict[str, list[int]] = Field(default={})

    def seconds(self, stage: Stage, entry: str) -> float:
        """About how long a job of that stage takes."""
        timing, steps = self.entries[entry], 0 if stage.startswith("untouched") else self.steps
        return timing.beside + steps * timing.step + (self.final if stage in ("untouched", "final") else 0.0)

    def longest(self, max_runs: int) -> float:
        """Seconds of all searches and final runs, one after the other, each search at its longest."""
        searches = max_runs * sum(self.seconds("search", name) for name in self.entries)
        return searches + len(self.seeds) * sum(self.seconds("final", name) for name in self.entries)

    def table(self, study: Study, workers: int = 1) -> Table:
        """A line for each entry, and what they share as caption."""
        lines = []
        for name, one in self.entries.items():
            seconds = [duration(self.seconds(stage, name)) for stage in ("search", "final")]
            rate = rate_text(study.entries[name].learning_rate)
            lines.append([name, f"{one.parameters:,}", rate, f"{one.step:.3g}", *seconds])
        each_run = f"{counted(self.steps, 'step')} a run on {counted(self.rows['train'], 'row')}"
        held_out = f"{self.rows['validation']} choose the rates, {self.rows['test']} decide"
        most = duration(self.longest(study.tuning.max_runs) / workers)
        lasts = f"{counted(len(self.seeds), 'seed')} in {most} at most"
        caption = f"{each_run}; {held_out}; {lasts}."
        if self.limit is not None and len(self.listed) > len(self.seeds):
            caption += f" What is left of {self.minutes:g} minutes goes to up to {len(self.listed)} seeds."
        return Table(["entry", "trained", "from rate", "s a step", "a run", "a final run"], lines, caption)


def read_plan(study: Study) -> Plan | None:
    """The plan in a study's folder, if there is one."""
    file = study.folder / "plan.json"
    return Plan.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def changed_plan(study: Study, change: Callable[[Plan], dict[str, Any]]) -> Plan:
    """The plan as its file has it now, with the changes that are made of it; other processes may change it too."""
    with FileLock(study.folder / ".lock"):
        plan = read_plan(study)
        assert plan is not None
        if changes := change(plan):
            plan = _written(study, plan.model_copy(update=changes))
        return plan


def _written(study: Study, plan: Plan) -> Plan:
    plan = plan.model_copy(update={"format": FORMAT})
    write_whole(study.folder / "plan.json", json_text(plan.model_dump(mode="json")) + "\n")
    return plan


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def prepare(
    study: Study,
    execute: Execute | None,
    minutes: float | None = None,
    workers: int = 1,
    number: int | None = None,
    began: float | None = None,
) -> Plan:
    """The plan of a study in its folder, made if there is none, and completed for entries and seeds that were added.

    It is for so many ``minutes`` of ``workers`` since ``began``. ``number`` is that of all seeds that are run, those
    first that were left out. Without ``execute``, which runs jobs, the plan is what it is.
    """
    began = time.monotonic() if began is None else began
    configs = {name: study.config(name) for name in study.entries}
    first, plan = next(iter(configs.values())), read_plan(study)
    told = plan.digests.get("metric") if plan else None
    scored_by = {"metric": own_metric(told).name} if execute is not None and first.data.metric == OWN else {}
    found = inputs(first, trains=execute is not None)
    found["digests"] |= scored_by
    seeds = [*study.seeds, *sorted({*range(number + 1 if number else 0)} - {*study.seeds, study.tuning.seed})]
    for part, use in {"validation": "rates", **({"test": "entries"} if seeds else {})}.items():
        if not found["rows"][part]:
            raise ConfigError(f"shared.data: leaves no {part} rows, by which {use} are compared; give more rows")
    if seeds and found["rows"]["test"] < FEW_ROWS:
        logger.warning(few_rows(found["rows"]["test"]))
    study.folder.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        """Seconds of one worker."""
        return math.inf if minutes is None else (60 * minutes - (time.monotonic() - began)) * workers

    with FileLock(study.folder / ".lock"):  # another process may make it now
        plan = read_plan(study)
        if plan is not None:
            changed = changes(plan.study, study, (*plan.seeds, *plan.listed))
            changed += [f"{what} changed" for what in other_inputs(plan.digests, found["digests"])]
            changed += [] if minutes in (None, plan.minutes) else [f"--minutes: {plan.minutes}, now {minutes}"]
            refuse(f"{study.folder}: contains a study that was planned otherwise", changed)
            known = (*plan.seeds, *plan.study["seeds"])
            asked = [*plan.seeds, *(seed for seed in study.seeds if seed not in known)]
            if minutes is not None and len(seeds[: number or 0]) > (most := max(len(asked), len(plan.listed))):
                raise ConfigError(f"--seeds: {number}, planned with --minutes: {most}; for more, omit --minutes")
        if execute is None:
            if plan is None:
                raise DataError(f"{study.folder}: nothing has run yet; run smoa compare on this study first")
            return plan
        new = {name: config for name, config in configs.items() if plan is None or name not in plan.entries}
        for config in new.values():
            if (wanted := config.peft_config()) is not None:
                check_adapter(empty_model(config.model), wanted)
        try:
            if plan is None:
                beside, final = scored(study, configs, execute, seeds)
                timings, steps = timed(study, new, execute, left, beside)
                facts = {"study": as_planned(study), "minutes": minutes, "entries": timings, **found}
                seeds = seeds[:number]
                plan = Plan(steps=steps, seeds=seeds, listed=seeds, final=final, **facts)
                if minutes is not None:
                    plan = fitted(plan, study.tuning.max_runs, left()).model_copy(update={"limit": 60 * minutes})
            else:
                final = plan.final
                if seeds and not (plan.seeds or plan.study["seeds"]):  # as of smoa tune
                    _, final = scored(study, configs, execute, seeds)
                beside = fmean(one.beside for one in plan.entries.values())
                timings = {**plan.entries, **(timed(study, new, execute, left, beside)[0] if new else {})}
                goes_on = number is not None and minutes is None
                if goes_on:
                    asked += [seed for seed in seeds if seed not in asked][: max(0, len(seeds[:number]) - len(asked))]
                limit = None if goes_on or new or asked != plan.seeds else plan.limit
                more = {"study": as_planned(study), "seeds": asked, "entries": timings, "final": final, "limit": limit}
                plan = plan.model_copy(update=more)
        except SmoaError:
            if plan is None:  # the next study here may be another
                for stage in UNTOUCHED:
                    shutil.rmtree(study.folder / stage, ignore_errors=True)
            raise
        return _written(study, plan.model_copy(update={"used": plan.used + time.monotonic() - began}))


def scored(study: Study, configs: dict[str, RunConfig], execute: Execute, seeds: Sequence[int]) -> tuple[float, float]:
    """Score the untouched model, which counts. Seconds that a search's run takes to score, and that a final one takes
    more, to answer and to score general text before and after too."""
    entry, config = next(iter(configs.items()))
    took, of_token = [0.0, 0.0], 0.0
    for place, wanted in enumerate((seeds, study.tuning.max_runs)):
        if wanted:
            job = Job(UNTOUCHED[place], entry, study.entries[entry].learning_rate, 0)
            metrics = execute(job, study.job_config(config, job))
            took[place] = metrics["training"]["seconds"]
            of_token = took[place] / max(1, metrics["evaluation"]["before"]["tokens"])
    test, validation = took
    return validation, (test + 2 * config.forgetting.tokens * of_token - validation) if seeds else 0.0


def timed(
    study: Study, configs: dict[str, RunConfig], execute: Execute, left: Callable[[], float], beside: float
) -> tuple[dict[str, Timing], int]:
    """What a few steps of each entry take, and how many a whole run has. No folder is left. Raises ConfigError as soon
    as the least comparison can't end in time at the quickest step so far, or where an entry trains another number of
    parameters than it declares."""
    logger.info("%d steps of each entry are timed, and thrown away", TIMED)
    folder, timings, quickest = study.folder / "timing", dict[str, Timing](), list[float]()
    seconds = min(TIMED_SECONDS, left() / 20 / len(configs))
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        for name, config in configs.items():
            job = Job("timing", name, study.entries[name].learning_rate, study.tuning.seed)
            metrics = execute(job, study.job_config(config, job), seconds)
            trained, declared = metrics["parameters"]["trainable"], study.entries[name].parameters
            if declared is not None and abs(trained - declared) > PARAMETER_TOLERANCE * declared:
                raise ConfigError(
                    f"entries.{name}: trains {trained:,} parameters, not {declared:,} to within "
                    f"{PARAMETER_TOLERANCE:.0%}; change its size (smoa budget --method) or what it declares"
                )
            took = metrics["seconds"]
            timings[name] = Timing(parameters=trained, step=fmean(took[1:] or took), beside=metrics["loading"] + beside)
            quickest.append(min(took))
            runs, fewest = LEAST_SEARCH * bool(study.tuning.max_runs) + LEAST_SEEDS, min(FEWEST, metrics["steps"])
            least = runs * fewest * (sum(quickest) + (len(configs) - len(quickest)) * min(quickest))
            if least > (now := left()):
                raise ConfigError(
                    f"--minutes: {counted(runs, 'run')} of {counted(fewest, 'step')} for each entry, the smallest "
                    f"comparison, take {duration(least)} or more, and {duration(max(0.0, now))} are left; give more, "
                    "or fewer --methods or shorter rows"
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return timings, metrics["steps"]


def fitted(plan: Plan, max_runs: int, seconds: float) -> Plan:
    """The plan with the most of its first seeds, and then steps, that ``seconds`` of one worker are enough for. It may
    have no seed yet: searches seldom are at their longest, and what they leave buys seeds."""
    seeds, fewest = plan.seeds[:FIRST_SEEDS], min(FEWEST, plan.steps)

    def lasts(number: int, steps: int) -> float:
        return MARGIN * plan.model_copy(update={"seeds": seeds[:number], "steps": steps}).longest(max_runs)

    number = next((each for each in range(len(seeds), 0, -1) if lasts(each, fewest) <= seconds), 0)
    steps = fewest
    if number == len(seeds):
        of_step = max(lasts(number, fewest + 1) - lasts(number, fewest), 1e-9)
        steps = min(plan.steps, fewest + int((seconds - lasts(number, fewest)) / of_step))
    return plan.model_copy(update={"seeds": seeds[:number], "steps": steps})


def other_inputs(planned: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is another than planned; an older plan knows nothing of ``forgetting.text``."""
    return [what for key, what in INPUTS.items() if key in planned and planned[key] != found.get(key)]


def check_folder(study: Study) -> None:
    """Raise ConfigError if the study's folder has another study, or something else."""
    file = study.folder / "study.yaml"
    check_place(file)
    if file.is_file():
        refuse(f"{file}: says otherwise", changes(as_planned(load_study(file)), study))
    elif not (study.folder / "plan.json").is_file() and (others := [path.name for path in study.folder.glob("[!.]*")]):
        raise ConfigError(f"{study.folder}: contains {min(others)} and no study; choose another folder")


@contextmanager
def study_file(study: Study, given: Path | None = None) -> Iterator[None]:
    """Write a study into its folder, unless the file there is the one that was ``given``, and plan it in the block. A
    start that fails leaves the file that was there; an interrupted first one leaves its own to be edited, a refused
    one none, by which the next would be refused."""
    file = study.folder / "study.yaml"
    if given is not None and given.resolve() == file.resolve():
        yield
        return
    before = file.read_bytes() if file.exists() else None
    write_whole(file, to_yaml(study.model_dump(mode="json", exclude_unset=True)))
    try:
        yield
    except BaseException as error:
        if before is not None:
            write_whole(file, before)
        elif isinstance(error, SmoaError):
            file.unlink()
        raise


def few_rows(number: int) -> str:
    """The warning that a comparison on so few rows has."""
    held_out = "row is held out, which shows" if number == 1 else "rows are held out, which show"
    return f"Only {number} {held_out} large differences only; {FEW_ROWS} or more are better."


def as_planned(study: Study) -> dict[str, Any]:
    """What a plan keeps of a study's file."""
    return study.model_dump(mode="json", exclude={"folder"})


def changes(before: dict[str, Any], study: Study, planned: Sequence[int] = ()) -> list[str]:
    """What differs in a study from what was kept of it before, where an absent key is its default; entries and seeds
    may have been added, ``planned`` seeds left out, ``max_runs`` raised, and another metric scores the same answers."""
    before, now = as_planned(Study.model_validate({"folder": study.folder, **before})), as_planned(study)
    now["entries"] = {name: entry for name, entry in now["entries"].items() if name in before["entries"]}
    if 0 < before["tuning"]["max_runs"] < now["tuning"]["max_runs"]:
        now["tuning"]["max_runs"] = before["tuning"]["max_runs"]
    now["seeds"] = [seed for seed in before["seeds"] if seed in (*now["seeds"], *planned)]
    blocks = [values["shared"].get("data", {}) for values in (before, now)]
    if all(data.get("metric") in ANSWERED for data in blocks):
        blocks[0]["metric"] = blocks[1]["metric"]
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
