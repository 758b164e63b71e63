"""Plans a study: scores the untouched model, times a few steps of each entry that are thrown away, and fits what is
run into the time. A study that has a plan goes on with it."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.base_models import empty_model
from smoa_lab.basics.folders import check_place
from smoa_lab.config.methods import check_adapter
from smoa_lab.config.run import RunConfig
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.data.answers import OWN, RULES
from smoa_lab.data.own_metric import own_metric
from smoa_lab.data.row import PARTS
from smoa_lab.pages.tables import counted
from smoa_lab.scoring.bounds import expected_width, spread_of
from smoa_lab.scoring.calibrated import NOISE
from smoa_lab.study.executor import TIMED, TIMED_SECONDS
from smoa_lab.study.plan import (
    FEW_ROWS,
    FIRST_SEEDS,
    LEAST_SEARCH,
    LEAST_SEEDS,
    MARGIN,
    Metrics,
    Plan,
    Timing,
    as_planned,
    changes,
    duration,
    error_text,
    few_rows,
    is_looked_at,
    other_config,
    other_inputs,
    other_metric,
    read_chosen,
    read_plan,
    refuse,
    write_chosen,
    write_plan,
)
from smoa_lab.study.study import ALL_SIZES, FORMAT, Job, Stage, Study, load_study, read_stored
from smoa_lab.training.loaded_run import inputs

logger = logging.getLogger(__name__)

FEWEST = 30
"""Steps below which a plan takes fewer seeds instead: fewer hardly tell one rate from another."""
FEW_TO_CHOOSE = 10
"""Validation rows below which chance chooses the rates."""
PARAMETER_TOLERANCE = 0.02
"""How far the trainable parameters of an entry may differ from what it declares."""
Execute = Callable[..., Metrics]
"""Runs a job, with its config, and gives its metrics."""
UNTOUCHED: tuple[Stage, Stage] = ("untouched", "untouched-validation")


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
    first that were left out. Without ``execute``, which runs jobs, the plan is what it is, and no rows are read.
    """
    began = time.monotonic() if began is None else began
    first, plan = study.config(next(iter(study.entries))), read_plan(study)
    if execute is None:
        if plan is None:
            raise DataError(f"{study.folder}: nothing has run yet; run smoa compare on this study first")
        refuse(f"{study.folder}: contains a study that was planned otherwise", changes(plan.study, study, plan.known))
        if other_metric(plan, study) and is_looked_at(plan, study):
            again: dict[str, Any] = {"study": {**plan.study, "shared": as_planned(study)["shared"]}}
            again |= plan.scored_again()
            plan = write_plan(study, plan.model_copy(update=again))
        return plan
    told = plan.digests.get("metric") if plan else None
    scored_by = {"metric": own_metric(told).name} if first.data.metric == OWN else {}
    found = inputs(first)
    found["digests"] |= scored_by
    seeds = [*study.seeds, *sorted({*range(number + 1 if number else 0)} - {*study.seeds, study.tuning.seed})]
    for part, use in {"validation": "rates", **({"test": "entries"} if seeds else {})}.items():
        if not found["rows"][part]:
            raise ConfigError(f"shared.data: leaves no {part} rows, by which {use} are compared; give more rows")
    if (rows := found["rows"]["validation"]) < FEW_TO_CHOOSE and study.tuning.max_runs:
        logger.warning("Only %s chooses the rates, much by chance; give more", counted(rows, "validation row"))
    if seeds and found["rows"]["test"] < FEW_ROWS:
        logger.warning(few_rows(found["rows"]["test"]))
    study.folder.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        """Seconds."""
        return math.inf if minutes is None else 60 * minutes - (time.monotonic() - began)

    with _alone(study):
        plan = read_plan(study)  # another process may have made it
        configs = {name: study.config(name) for name in study.entries}
        if plan is not None:
            changed = changes(plan.study, study, plan.known)
            changed += [f"{what} changed" for what in other_inputs(plan.digests, found["digests"])]
            refuse(f"{study.folder}: contains a study that was planned otherwise", changed)
        new = {name: config for name, config in configs.items() if plan is None or name not in plan.entries}
        for config in new.values():
            if (wanted := config.peft_config()) is not None:
                check_adapter(empty_model(config.model), wanted)
        try:
            if plan is None:
                beside, final = scored(study, configs, execute, seeds)
                timings, steps, failed = timed(study, new, execute, left, beside, workers)
                facts: dict[str, Any] = {"study": as_planned(study), "minutes": minutes, "entries": timings, **found}
                facts["failed"] = failed
                seeds = seeds[:number]
                rounds: dict[str, Any] = {"format": FORMAT, "seeds": seeds, "listed": seeds, "planned": len(seeds)}
                plan = Plan(steps=steps, final=final, **rounds, **facts)
                if minutes is not None:
                    plan = fitted(plan, study.tuning.max_runs, left(), workers)
                    plan = plan.model_copy(update={"limit": 60 * minutes})
            else:
                plan = _continued(study, plan, configs, new, execute, left, minutes, seeds, number)
        except SmoaError:
            if plan is None:  # the next study here may be another
                for stage in UNTOUCHED:
                    shutil.rmtree(study.folder / stage, ignore_errors=True)
            raise
        now = time.time()
        used = plan.used + min(time.monotonic() - began, now - plan.counted)
        return write_plan(study, plan.model_copy(update={"used": used, "counted": now}))


def outlook(
    study: Study, execute: Execute, minutes: float | None, workers: int, number: int | None, began: float
) -> tuple[Plan, str]:
    """The plan that a study would get, by a few timed steps, and about which difference it will tell. Nothing is
    scored, but for right answers 20 rows of the untouched model, and nothing is kept."""
    configs, had = {name: study.config(name) for name in study.entries}, study.folder.exists()
    (name, first), found = next(iter(configs.items())), inputs(next(iter(configs.values())))

    def left() -> float:
        return math.inf if minutes is None else 60 * minutes - (time.monotonic() - began)

    try:
        timings, steps, failed = timed(study, configs, execute, left, 0.0, workers)
        batch = 3 * int(first.training.get("per_device_train_batch_size", 8))  # a step takes three times a scoring
        of_rows = {part: found["rows"][part] / batch * max(one.step for one in timings.values()) for part in PARTS}
        timings = {
            n: one.model_copy(update={"beside": one.beside + of_rows["validation"]}) for n, one in timings.items()
        }
        noise = NOISE["loss"]
        if (metric := first.data.metric) in RULES:
            few = first.data.model_copy(update={"test_examples": 20})
            training = {**first.training, "output_dir": str(study.folder / "timing" / "untouched")}
            job = Job("untouched", name, study.entries[name].learning_rate, 0)
            scores = execute(job, first.model_copy(update={"data": few, "training": training}))["evaluation"]["before"]
            scale = spread_of([scores[str(metric)]] * 20)
            noise = NOISE["scored"][0] * scale, NOISE["scored"][1] * scale
    finally:
        shutil.rmtree(study.folder / "timing", ignore_errors=True)
        if not had:
            shutil.rmtree(study.folder, ignore_errors=True)
    facts = {"study": as_planned(study), "minutes": minutes, "entries": timings, "failed": failed, **found}
    seeds = study.seeds[:number]
    plan = Plan(format=3, steps=steps, seeds=seeds, listed=seeds, planned=len(seeds), final=of_rows["test"], **facts)
    if minutes is not None:
        plan = fitted(plan, study.tuning.max_runs, left(), workers).model_copy(update={"limit": 60 * minutes})
    if len(plan.seeds) < 2 or metric not in (None, *RULES):
        return plan, "Which difference it will tell is not known beforehand."
    together = max(len(own) for name, own in study.families().items() if name != ALL_SIZES)
    width = expected_width(together, len(plan.seeds), found["rows"]["test"], noise)
    told = f"{100 * width:.1f} points" if metric in RULES else f"{width:.3f} nats per token"
    return plan, f"By {counted(len(plan.seeds), 'round')} it will tell differences of about {told}."


def _continued(
    study: Study,
    plan: Plan,
    configs: dict[str, RunConfig],
    new: dict[str, RunConfig],
    execute: Execute,
    left: Callable[[], float],
    minutes: float | None,
    seeds: Sequence[int],
    number: int | None,
) -> Plan:
    """A plan for what was added to its study since. Entries, another metric and seeds beyond the planned rounds take
    one more look."""
    final, before = plan.final, Study.model_validate({"folder": study.folder, **plan.study})
    asked = [*plan.seeds, *(seed for seed in study.seeds if seed not in plan.known)]
    if number is not None and (minutes is None or number > len(plan.listed)):
        asked += [seed for seed in seeds if seed not in asked][: max(0, number - len(asked))]
    if seeds and not (plan.seeds or plan.study["seeds"]):  # as of smoa tune
        _, final = scored(study, configs, execute, seeds)
    beside = fmean(one.beside for one in plan.entries.values())
    timings, _, failed = timed(study, new, execute, left, beside) if new else ({}, 0, {})
    added = new.keys() - before.entries.keys()
    dropped = plan.dropped | {n: entry.budget for n, entry in before.entries.items() if n not in study.entries}
    back = [name for name in dropped if name in study.entries]
    is_another = bool(added or back) or other_metric(plan, study)
    goes_on = len(asked) > plan.rounds > 0 or (is_another and is_looked_at(plan, study))
    is_lifted = asked != plan.seeds or added or study.tuning.max_runs > before.tuning.max_runs
    kept = {name: told for name, told in plan.failed.items() if name not in new}
    more: dict[str, Any] = {"study": as_planned(study), "seeds": asked, "entries": plan.entries | timings}
    more |= {"final": final, "failed": kept | failed}
    if plan.rounds == 0:
        more |= {"planned": len(asked), "listed": asked}
    elif other_metric(plan, study) and goes_on and asked == plan.seeds and not (added or back):
        more |= plan.scored_again()
    elif goes_on and (len(asked), bool(added or back)) not in {(each, False) for each in plan.extensions[-1:]}:
        more |= {"planned": plan.rounds, "extensions": [*plan.extensions, len(asked)], "takes": {}}
    if minutes is not None and minutes != plan.minutes:
        more |= {"minutes": minutes, "limit": plan.used + left()}
    elif is_lifted:
        more["limit"] = None
    if "limit" in more:  # searches that the time ended go on
        write_chosen(study, {name: one for name, one in read_chosen(study).items() if one.place != "cut"})
    more["takes"] = {n: t for n, t in more.get("takes", plan.takes).items() if t.tolerance == study.tolerance}
    return plan.model_copy(update=more | {"dropped": {n: b for n, b in dropped.items() if n not in back}})


@contextmanager
def _alone(study: Study) -> Iterator[None]:
    """Plan while no other process does."""
    lock = FileLock(study.folder / ".lock")
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        logger.info("%s: another process plans this study; waiting for it", study.folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def scored(study: Study, configs: dict[str, RunConfig], execute: Execute, seeds: Sequence[int]) -> tuple[float, float]:
    """Score the untouched model, which counts. Seconds that a search's run takes to score, and that a final one takes
    more, to answer and to score general text before and after too."""
    entry, config = next(iter(configs.items()))
    took, of_token = [0.0, 0.0], 0.0
    for place, wanted in enumerate((seeds, study.tuning.max_runs)):
        if wanted:
            job = Job(UNTOUCHED[place], entry, study.entries[entry].learning_rate, 0)
            wanted_config, folder = study.job_config(config, job), study.folder / job.name
            if (
                folder / "metrics.json"
            ).is_file():  # of a start that was interrupted, perhaps before the file was edited
                stored = read_stored(folder / "metrics.json")
                if other_config(stored["config"], wanted_config, True):
                    shutil.rmtree(folder)
            metrics = execute(job, wanted_config)
            loss = metrics["evaluation"]["before"]["loss"]
            if (loss is None or not math.isfinite(loss)) and (place or config.data.metric is None):
                raise ConfigError(
                    f"shared.model: the base model's loss on {('test', 'validation')[place]} rows is not finite, and "
                    "nothing can be compared with it; set model.dtype: float32, or leave out the rows that cause it"
                )
            took[place] = metrics["training"]["seconds"]
            of_token = took[place] / max(1, metrics["evaluation"]["before"]["tokens"])
    test, validation = took
    return validation, (test + 2 * config.forgetting.tokens * of_token - validation) if seeds else 0.0


def timed(
    study: Study,
    configs: dict[str, RunConfig],
    execute: Execute,
    left: Callable[[], float],
    beside: float,
    workers: int = 1,
) -> tuple[dict[str, Timing], int, dict[str, str]]:
    """What a few steps of each entry take, how many a whole run has, and what ended those that failed. No folder is
    left. Raises ConfigError as soon as the least comparison can't end in time at the quickest step so far, or where an
    entry trains another number of parameters than it declares; and what ended the last one if all failed."""
    logger.info("%d steps of each entry are timed, and thrown away", TIMED)
    folder, timings, quickest, steps = study.folder / "timing", dict[str, Timing](), list[float](), list[int]()
    failed: dict[str, str] = {}
    seconds = min(TIMED_SECONDS, left() / 20 / len(configs))
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        for name, config in configs.items():
            job = Job("timing", name, study.entries[name].learning_rate, study.tuning.seed)
            try:
                metrics = execute(job, study.job_config(config, job), seconds)
            except Exception as error:
                failed[name] = error_text(error)
                logger.error("%s: %s", name, failed[name])
                if len(failed) == len(configs):
                    raise
                continue
            trained, declared = metrics["parameters"]["trainable"], study.entries[name].parameters
            if declared is not None and abs(trained - declared) > PARAMETER_TOLERANCE * declared:
                raise ConfigError(
                    f"entries.{name}: trains {trained:,} parameters, not {declared:,} to within "
                    f"{PARAMETER_TOLERANCE:.0%}; change its size (smoa budget --method) or what it declares"
                )
            took = metrics["seconds"]
            known = {"beside": metrics["loading"] + beside, "machine": metrics.get("machine", "")}
            timings[name] = Timing(parameters=trained, step=fmean(took[1:] or took), **known)
            quickest.append(min(took))
            steps.append(metrics["steps"])  # other batches make other numbers of an epoch; all take the fewest
            runs, fewest = LEAST_SEARCH * bool(study.tuning.max_runs) + LEAST_SEEDS, min(FEWEST, metrics["steps"])
            work = sum(quickest) + (len(configs) - len(failed) - len(quickest)) * min(quickest)
            least = fewest * max(runs * work / workers, 2 * max(quickest))
            if least > (now := left()):
                raise ConfigError(
                    f"--minutes: {counted(runs, 'run')} of {counted(fewest, 'step')} for each entry, the smallest "
                    f"comparison, take {duration(least)} or more, and {duration(max(0.0, now))} are left; give more, "
                    "or fewer --methods or shorter rows"
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return timings, min(steps), failed


def fitted(plan: Plan, max_runs: int, seconds: float, workers: int = 1) -> Plan:
    """The plan with the most of its first seeds, two at least, and then steps, that ``seconds`` are enough for.
    Searches end before they take the time of two seeds; what they leave buys others."""
    seeds, fewest = plan.seeds[:FIRST_SEEDS], min(FEWEST, plan.steps)

    def lasts(number: int, steps: int) -> float:
        return MARGIN * plan.model_copy(update={"seeds": seeds[:number], "steps": steps}).longest(max_runs, workers)

    least = min(LEAST_SEEDS, len(seeds))
    number = next((each for each in range(len(seeds), least, -1) if lasts(each, fewest) <= seconds), least)
    steps = fewest
    if number == len(seeds):
        of_step = max(lasts(number, fewest + 1) - lasts(number, fewest), 1e-9)
        steps = min(plan.steps, fewest + max(0, int((seconds - lasts(number, fewest)) / of_step)))
    return plan.model_copy(update={"seeds": seeds[:number], "steps": steps})


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
