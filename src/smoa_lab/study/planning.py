"""Plans a study: scores the base model, times a few steps of each entry that are thrown away, and fits what is
run into the time. A study that has a plan goes on with it."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.base_models import empty_model
from smoa_lab.config.methods import check_adapter
from smoa_lab.config.run import ROUNDS_AWAY, RunConfig
from smoa_lab.data.answers import OWN, RULES
from smoa_lab.data.own_metric import own_metric
from smoa_lab.data.prepared import mean_length
from smoa_lab.data.row import PARTS
from smoa_lab.pages.tables import counted
from smoa_lab.study.bounds import expected_width, spread_of
from smoa_lab.study.calibrated import NOISE
from smoa_lab.study.executor import TIMED, TIMED_SECONDS
from smoa_lab.study.metrics import read_metrics
from smoa_lab.study.plan import (
    FEWEST,
    LEAST_SEARCH,
    LEAST_SEEDS,
    Metrics,
    Plan,
    Timing,
    as_planned,
    changed_plan,
    changes,
    duration,
    error_text,
    fitted,
    is_looked_at,
    other_config,
    other_inputs,
    other_metric,
    read_plan,
    refuse,
    stored_chosen,
    write_chosen,
    write_plan,
)
from smoa_lab.study.score_again import score_again
from smoa_lab.study.study import ALL_SIZES, FORMAT, Job, Stage, Study
from smoa_lab.study.verdict import FEW_ROWS, few_rows
from smoa_lab.training.loaded_run import inputs
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

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
    first that were left out. Without ``execute``, which runs jobs, the plan is what it is, but for another metric and
    entries that were dropped, and no rows are read.
    """
    if execute is not None:
        return Planner(study, execute, minutes, workers, number, time.monotonic() if began is None else began).plan()
    plan = read_plan(study)
    if plan is None:
        raise DataError(f"{study.folder}: nothing has run yet; run smoa compare on this study first")
    _refuse_another(study, plan)
    is_counted = other_metric(plan, study) and is_looked_at(plan, study)
    if is_counted:
        plan = changed_plan(study, partial(_as_reported, study))
    elif plan.study["entries"].keys() - study.entries.keys():
        plan = plan.model_copy(update=_as_reported(study, plan))
    return score_again(study, plan, is_counted)


def _as_reported(study: Study, plan: Plan) -> dict[str, Any]:
    """The changes for a report by another metric, or without some entries. What was added waits until it is run."""
    before = Study.model_validate({"folder": study.folder, **plan.study})
    left = {name: study.entries[name] for name in before.entries if name in study.entries}
    known = study.model_copy(update={"entries": left, "seeds": before.seeds, "tuning": before.tuning})
    looks = _looks(known, plan, plan.seeds, plan.changed(known, ()))
    return {"study": as_planned(known), **plan.without(before, known), **looks}


def outlook(
    study: Study, execute: Execute, minutes: float | None, workers: int, number: int | None, began: float
) -> tuple[Plan, str]:
    """The plan that a study would get, by a few timed steps, and about which difference it will tell. Nothing is
    scored, but for right answers 20 rows of the base model, and nothing is kept."""
    above = study.folder.parent  # where a cluster's machines see it too; another process may run in the study's folder
    had = above.exists()
    above.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=f".{study.folder.name}-", dir=above, ignore_cleanup_errors=True) as folder:
            study = study.model_copy(update={"folder": Path(folder)})
            return Planner(study, execute, minutes, workers, number, began).outlook()
    finally:
        if not had:
            with suppress(OSError):  # another process may have begun a study there
                above.rmdir()


def _refuse_another(study: Study, plan: Plan, found: dict[str, str] | None = None) -> None:
    """Raise ConfigError if the plan is of another study, or of other inputs than were ``found``."""
    changed = changes(plan.study, study, plan.known)
    changed += [f"{what} changed" for what in (other_inputs(study, plan.digests, found) if found is not None else ())]
    refuse(f"{study.folder}: contains a study that was planned otherwise", changed)


@dataclass(frozen=True)
class Planner:
    """Plans what a command asks for, as :func:`prepare` explains."""

    study: Study
    execute: Execute
    minutes: float | None
    workers: int
    number: int | None
    began: float

    def plan(self) -> Plan:
        """Make the study's plan, or complete it, and write it."""
        study, found = self.study, self._inputs()
        study.folder.mkdir(parents=True, exist_ok=True)
        with _alone(study):
            before = read_plan(study)  # another process may have made it
            if before is not None:
                _refuse_another(study, before, found["digests"])
            known = set[str]() if before is None else before.entries.keys() - before.dropped.keys()
            new = {name: config for name, config in self._configs().items() if name not in known}
            for name, config in new.items():
                if config.rounds_away:
                    logger.warning("entries.%s: %s", name, ROUNDS_AWAY)
                if (wanted := config.peft_config()) is not None:
                    check_adapter(empty_model(config.model), wanted)
            plan = self._first(found) if before is None else self._continued(before, new)
            now = time.time()
            used = plan.used + max(0.0, min(time.monotonic() - self.began, now - plan.counted))  # clocks go back
            plan = write_plan(study, plan.model_copy(update={"used": used, "counted": now}))
        return score_again(study, plan, before is not None and other_metric(before, study))

    def _inputs(self) -> dict[str, Any]:
        """Digests and numbers of the study's rows; raises ConfigError where a part has none, and warns of few."""
        first = self._first_config()
        plan = read_plan(self.study)
        known = plan.digests.get("metric") if plan else None
        scored_by = {"metric": own_metric(known).name} if first.data.metric == OWN else {}
        found = inputs(first)
        for part, use in {"validation": "rates", **({"test": "entries"} if self.seeds else {})}.items():
            if not found["rows"][part]:
                raise ConfigError(
                    f"shared.data: leaves no {part} rows, by which {use} are compared; give more rows, or groups"
                )
        if (rows := found["rows"]["validation"]) < FEW_TO_CHOOSE and self.study.tuning.max_runs:
            chosen_by = f"{counted(rows, 'validation row')} choose{'s' * (rows == 1)}"
            logger.warning("Only %s the rates, much by chance; give more", chosen_by)
        if self.seeds and found["groups"] < FEW_ROWS:
            logger.warning(few_rows(found["groups"], found["rows"]["test"]))
        return {**found, "digests": found["digests"] | scored_by}

    @property
    def seeds(self) -> list[int]:
        """The study's, and those of further rounds that are asked for."""
        known = self.study.seeds
        return [*known, *sorted({*range(self.number + 1 if self.number else 0)} - {*known, self.study.tuning.seed})]

    def left(self) -> float:
        """Seconds."""
        return math.inf if self.minutes is None else 60 * self.minutes - (time.monotonic() - self.began)

    def _configs(self) -> dict[str, RunConfig]:
        return {name: self.study.config(name) for name in self.study.entries}

    def _first_config(self) -> RunConfig:
        return self.study.config(next(iter(self.study.entries)))

    def _first(self, found: dict[str, Any]) -> Plan:
        """A first plan. One that is refused leaves nothing: the next study here may be another."""
        try:
            timings, steps, failed = self._timed(self._configs())
            beside, final = self._scored(found["digests"])
            return self._made(found, _later(timings, beside), steps, failed, final)
        except SmoaError:
            for stage in UNTOUCHED:
                shutil.rmtree(self.study.folder / stage, ignore_errors=True)
            raise

    def _made(
        self, found: dict[str, Any], entries: dict[str, Timing], steps: int, failed: dict[str, str], final: float
    ) -> Plan:
        """The plan of a study that has none, with what fits into the time."""
        facts = {key: found[key] for key in ("digests", "rows")} | {"study": as_planned(self.study), "entries": entries}
        seeds = self.seeds[: self.number]
        rounds: dict[str, Any] = {"format": FORMAT, "seeds": seeds, "listed": seeds, "planned": len(seeds)}
        plan = Plan(steps=steps, final=final, minutes=self.minutes, failed=failed, **rounds, **facts)
        if self.minutes is None:
            return plan
        fits = fitted(plan, self.study.tuning.max_runs, self.left(), self.workers)
        return fits.model_copy(update={"limit": 60 * self.minutes})

    def outlook(self) -> tuple[Plan, str]:
        """As :func:`outlook`."""
        first, found = self._first_config(), self._inputs()
        timings, steps, failed = self._timed(self._configs())
        batch = 3 * int(first.training.get("per_device_train_batch_size", 8))  # a step takes three times a scoring
        of_rows = {part: found["rows"][part] / batch * max(one.step for one in timings.values()) for part in PARTS}
        timings = _later(timings, of_rows["validation"])
        of_text = 2 * first.forgetting.tokens / max(1, found["rows"]["test"] * found["length"])
        final = (1 + of_text) * of_rows["test"]
        plan, metric = self._made(found, timings, steps, failed, final), first.data.metric
        if len(plan.seeds) < 2 or metric not in (None, *RULES):
            return plan, "Which difference it will tell is not known beforehand."
        scale = 1.0 if metric is None else self._spread_of_answers(first, metric)
        together = max(len(own) for name, own in self.study.families().items() if name != ALL_SIZES)
        of_seeds, of_row = (scale * each for each in NOISE["loss" if metric is None else "scored"])
        width = expected_width(together, len(plan.seeds), found["groups"], (of_seeds, of_row), plan.level(together))
        told = f"{width:.3f} nats per token" if metric is None else f"{100 * width:.1f} points"
        return plan, f"By {counted(len(plan.seeds), 'round')} it will tell differences of about {told}."

    def _spread_of_answers(self, config: RunConfig, metric: str) -> float:
        """That of right ones, by 20 answers of the base model."""
        few = config.data.model_copy(update={"test_examples": 20})
        training = {**config.training, "output_dir": str(self.study.folder / "timing" / "untouched")}
        metrics = self.execute(
            self.study.untouched("untouched"), config.model_copy(update={"data": few, "training": training})
        )
        return spread_of([metrics["evaluation"]["before"][metric]] * 20)

    def _continued(self, plan: Plan, new: dict[str, RunConfig]) -> Plan:
        """A plan for what was added to its study since. Entries, another metric and seeds beyond the planned rounds
        take one more look. An entry that was dropped and comes back may be another one, and is planned anew."""
        study, before = self.study, Study.model_validate({"folder": self.study.folder, **plan.study})
        final = plan.final
        asked = [*plan.seeds, *(seed for seed in study.seeds if seed not in plan.known)]
        if self.number is not None and (self.minutes is None or self.number > len(plan.listed)):
            asked += [seed for seed in self.seeds if seed not in asked][: max(0, self.number - len(asked))]
        if {*plan.seeds} & {*before.seeds} - {*study.seeds} or (self.number or math.inf) < len(plan.seeds):
            logger.warning("Seeds that were planned run all the same: their number fixed the level of each look")
        if self.seeds and not (plan.seeds or plan.study["seeds"]):  # as of smoa tune
            _, final = self._scored(plan.digests)
        beside = fmean(one.beside for one in plan.entries.values())
        timings, _, failed = self._timed(new) if new else ({}, 0, {})
        fresh = new.keys() - before.entries.keys()
        changed = plan.changed(study, fresh - failed.keys())
        timings = {name: timing for name, timing in plan.entries.items() if name not in new} | _later(timings, beside)
        more: dict[str, Any] = {"study": as_planned(study), "seeds": asked, "entries": timings}
        more |= {"final": final, **plan.without(before, study)}
        more["failed"] = {name: told for name, told in more["failed"].items() if name not in new} | failed
        more |= _looks(study, plan, asked, changed)
        grew = asked != plan.seeds or fresh - failed.keys() or study.tuning.max_runs > before.tuning.max_runs
        if self.minutes is not None and (grew or plan.limit is None or self.minutes != plan.minutes):
            more |= {"minutes": self.minutes, "limit": plan.used + 60 * self.minutes}
        elif grew:
            more["limit"] = None
        if "limit" in more:  # searches that the time ended go on, and those of entries that came back begin again
            more["starts"] = {name: rate for name, rate in plan.starts.items() if name not in fresh}
            stored = stored_chosen(study).items()
            write_chosen(study, {name: one for name, one in stored if one.place != "cut" and name not in fresh})
        takes = more.get("takes", plan.takes)
        more["takes"] = {name: take for name, take in takes.items() if take.tolerance == study.tolerance}
        return plan.model_copy(update=more)

    def _scored(self, digests: dict[str, str]) -> tuple[float, float]:
        """Score the base model on rows of these digests, which counts. Seconds that a search's run takes to score, and
        that a final one takes more, to answer and to score general text before and after too."""
        logger.info("The base model is scored")
        study, config, took, of_text = self.study, self._first_config(), [0.0, 0.0], 0.0
        for place, wanted in enumerate((self.seeds, study.tuning.max_runs)):
            if not wanted:
                continue
            job = study.untouched(UNTOUCHED[place])
            job_config, run = study.job_config(config, job), RunFolder(study.folder / job.name)
            if run.finished and (
                other_config((known := read_metrics(run))["config"], job_config, True)
                or other_inputs(study, digests, known["digests"])
            ):
                shutil.rmtree(run.path)  # of a start that was interrupted, before the file or the rows were edited
            metrics = self.execute(job, job_config)
            scores = metrics["evaluation"]["before"]
            is_finite = scores["loss"] is not None and math.isfinite(scores["loss"])
            if not is_finite and (place or config.data.metric is None):
                raise ConfigError(
                    f"shared.model: the base model's loss on {('test', 'validation')[place]} rows is not finite, and "
                    "nothing can be compared with it; set model.dtype: float32, or leave out the rows that cause it"
                )
            took[place] = metrics["training"]["seconds"]
            of_text = 2 * config.forgetting.tokens * took[place] / max(1, scores["rows"] * mean_length(metrics["data"]))
        return took[1], took[0] + of_text - took[1] if self.seeds else 0.0

    def _timed(self, configs: dict[str, RunConfig]) -> tuple[dict[str, Timing], int, dict[str, str]]:
        """What a few steps of each entry take, how many a whole run has, and what ended those that failed. No folder
        is left. Raises what ended the last one if all failed."""
        logger.info("%d steps of each entry are timed, and thrown away", TIMED)
        study, folder = self.study, self.study.folder / "timing"
        timings, quickest, steps, failed = dict[str, Timing](), list[float](), list[int](), dict[str, str]()
        seconds = min(TIMED_SECONDS, self.left() / 20 / len(configs))
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        try:
            for name, config in configs.items():
                job = Job("timing", name, study.entries[name].learning_rate, study.tuning.seed)
                try:
                    metrics = self.execute(job, study.job_config(config, job), seconds)
                except Exception as error:
                    failed[name] = error_text(error)
                    logger.error("%s: %s", name, failed[name])
                    if len(failed) == len(study.entries):
                        raise
                    continue
                took, trained = metrics["seconds"], metrics["parameters"]["trainable"]
                _check_parameters(name, trained, study.entries[name].parameters)
                known = {"beside": metrics["loading"], "machine": metrics.get("machine", "")}
                timings[name] = Timing(parameters=trained, step=fmean(took[1:] or took), **known)
                quickest.append(min(took))
                steps.append(metrics["steps"])  # other batches make other numbers of an epoch; all take the fewest
                self._check_time(quickest, len(configs) - len(failed), metrics["steps"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return timings, min(steps, default=0), failed

    def _check_time(self, quickest: Sequence[float], entries: int, steps: int) -> None:
        """Raise ConfigError as soon as the least comparison can't end in time at the quickest steps so far."""
        runs, fewest = LEAST_SEARCH * bool(self.study.tuning.max_runs) + LEAST_SEEDS, min(FEWEST, steps)
        work = sum(quickest) + (entries - len(quickest)) * min(quickest)
        least = fewest * max(runs * work / self.workers, 2 * max(quickest))
        if least > (now := self.left()):
            raise ConfigError(
                f"--minutes: {counted(runs, 'run')} of {counted(fewest, 'step')} for each entry, the smallest "
                f"comparison, take {duration(least)} or more, and {duration(max(0.0, now))} are left; give more, or "
                "fewer --methods or shorter rows"
            )


def _later(timings: Mapping[str, Timing], seconds: float) -> dict[str, Timing]:
    """The times of runs that take so much longer beside their steps."""
    return {name: one.model_copy(update={"beside": one.beside + seconds}) for name, one in timings.items()}


def _looks(study: Study, plan: Plan, asked: Sequence[int], changed: Collection[str]) -> dict[str, Any]:
    """The changes for rounds beyond the planned ones, for families of ``changed`` entries and for another metric.
    Families that have their answer keep it, but where all have one and more rounds are asked for."""
    is_scored_again = other_metric(plan, study)
    goes_on = len(asked) > plan.rounds or ((changed or is_scored_again) and is_looked_at(plan, study))
    if plan.rounds < (2 if plan.format == FORMAT else 1):  # no look was planned
        return {"planned": len(asked), "listed": asked}
    if is_scored_again and goes_on and asked == plan.seeds and not changed:
        return plan.scored_again()
    if goes_on and (changed or plan.extensions[-1:] != [len(asked)]):
        keeps = not is_scored_again and (changed or study.families().keys() - plan.takes.keys())
        return plan.one_more_look(changed if keeps else plan.takes.keys(), len(asked))
    return {}


def _check_parameters(name: str, trained: int, declared: int | None) -> None:
    """Raise ConfigError where an entry trains another number of parameters than it declares."""
    if declared is not None and abs(trained - declared) > PARAMETER_TOLERANCE * declared:
        raise ConfigError(
            f"entries.{name}: trains {trained:,} parameters, not {declared:,} to within {PARAMETER_TOLERANCE:.0%}; "
            "change its size (smoa budget --method) or what it declares"
        )


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
