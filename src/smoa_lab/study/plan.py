"""The plan of a study: how many steps its runs take, which seeds are run and looked at, how much time was used, and
what was decided. Steps are fixed once, and no resume changes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any, Literal, TypeVar

from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.basics.folders import check_place, read_stored
from smoa_lab.basics.plain import json_text, portable
from smoa_lab.basics.section import Section
from smoa_lab.config.run import RunConfig
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.data.answers import ANSWERED, OWN
from smoa_lab.pages.tables import Table, counted
from smoa_lab.study.bounds import level_of
from smoa_lab.study.search import STARTS, Chosen, rate_text
from smoa_lab.study.study import FORMAT, OLDER_DATA, OR_REMOVE, Stage, Study, load_study, series_of

FEWEST = 30
"""Steps below which a plan takes fewer seeds instead: fewer hardly tell one rate from another."""
FIRST_SEEDS = 3
"""Seeds that come before more steps than these."""
LEAST_SEARCH, LEAST_SEEDS = 3, 2
"""Runs of an entry's search, and of its final ones, of FEWEST steps, without which there is no comparison."""
MARGIN = 1.1
"""What a plan is taken to last, of what it lasts by what was timed."""
INPUTS = {
    "data": "the rows",
    "base": "the base model",
    "encoder": "what makes tokens of rows (tokenizer, template or max_length)",
    "forgetting": "the text of forgetting.text",
    "own": "what --metric may read of the held-out rows",
}
Metrics = dict[str, Any]
Read = TypeVar("Read")


class Timing(Section):
    """What is known of an entry's runs: its trainable parameters, seconds of a step, of a search's run ``beside`` its
    steps, and the machine on which steps were timed."""

    parameters: int
    step: float
    beside: float
    machine: str = ""


class Take(Section):
    """What a budget's look decided: the ``entry`` to take, or none, at which round, level and tolerance, by which
    ``entries`` with their rates. An older plan doesn't say those."""

    entry: str | None
    round: int
    level: float
    tolerance: float
    entries: dict[str, float] = Field(default={})

    def stands(self, rates: Mapping[str, float]) -> bool:
        """Whether all of its entries still have their rates."""
        return self.entries.items() <= rates.items()


class Plan(Section):
    """``study`` is the file that was planned, ``digests`` and ``rows`` what its runs start from. ``seeds`` are those
    that are run, for ``steps`` each; ``final`` is how many seconds a final run takes more than a search's.

    ``planned`` rounds, a seed of all entries each, are looked at one after the other; ``extensions`` are the numbers of
    rounds of one look each, beyond them. ``starts`` are the rates from which searches of entries with a size start,
    fixed when that of the size before has chosen. ``takes`` are what families' looks decided, ``failed`` entries have
    their errors, ``dropped`` ones their budgets and sizes. With ``minutes`` nothing starts once ``used``, the seconds
    until the time ``counted`` in which a command ran, reaches ``limit``, and time that is left buys seeds of
    ``listed``. Entries or seeds that somebody asks for later without minutes lift the limit. A plan of format 1 or 2 is
    looked at once, when all its seeds are in; ``looks`` are its own.
    """

    format: Literal[1, 2, 3] = 1
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
    counted: float = 0.0
    planned: int = 0
    extensions: list[int] = Field(default=[])
    starts: dict[str, float] = Field(default={})
    takes: dict[str, Take] = Field(default={})
    failed: dict[str, str] = Field(default={})
    dropped: dict[str, str] = Field(default={})
    dropped_sizes: dict[str, int] = Field(default={})
    looks: dict[str, list[int]] = Field(default={})

    @property
    def known(self) -> tuple[int, ...]:
        """All seeds that it lists."""
        return (*self.seeds, *self.listed, *self.study["seeds"])

    @property
    def rounds(self) -> int:
        """How many were planned."""
        return self.planned or max(len(self.seeds), len(self.listed) if self.format == FORMAT else 0)

    def looked_at(self) -> list[int]:
        """The numbers of rounds after which it is asked whether an entry can be taken."""
        if self.extensions:
            return self.extensions[-1:]
        return list(range(2, self.rounds + 1)) if self.format == FORMAT else [self.rounds]

    def start(self, study: Study, name: str) -> float:
        """The rate from which an entry's search starts; the entry's own as long as none is fixed."""
        return self.starts.get(name, study.entries[name].learning_rate)

    def scored_again(self) -> dict[str, Any]:
        """The changes for one more look at the rounds that there are, by another metric."""
        number = min((take.round for take in self.takes.values()), default=len(self.seeds))
        more = {"seeds": self.seeds[:number], "extensions": [*self.extensions, number]}
        return {"planned": self.rounds, "takes": {}, **more}

    def one_more_look(self, changed: Collection[str], rounds: int) -> dict[str, Any]:
        """The changes for a look at so many rounds that was not planned, since the entries of ``changed`` families are
        other ones."""
        takes = {family: take for family, take in self.takes.items() if family not in changed}
        return {"planned": self.rounds, "extensions": [*self.extensions, rounds], "takes": takes}

    def changed(self, study: Study, fresh: Collection[str]) -> set[str]:
        """The families that lost an entry by which they were decided, and undecided ones with ``fresh`` entries. Others
        stay decided until a fresh one has as many rounds."""
        found = {family for family, own in study.families().items() if {*own} & {*fresh} and family not in self.takes}
        decided_by = {family: {*take.entries, take.entry} - {None} for family, take in self.takes.items()}
        return found | {family for family, names in decided_by.items() if names - study.entries.keys()}

    def without(self, before: Study, study: Study) -> dict[str, Any]:
        """The changes for entries of the study ``before`` that it has no more."""
        ran = {name: entry for name, entry in before.entries.items() if name in self.entries}
        dropped = self.dropped | {name: entry.budget for name, entry in ran.items()}
        dropped = {name: budget for name, budget in dropped.items() if name not in study.entries}
        sizes = self.dropped_sizes | {name: entry.size for name, entry in ran.items() if entry.size is not None}
        sizes = {name: size for name, size in sizes.items() if name in dropped}
        failed = {name: told for name, told in self.failed.items() if name in study.entries}
        return {"dropped": dropped, "dropped_sizes": sizes, "failed": failed}

    def level(self, entries: int) -> float:
        """Of a look at so many entries."""
        return level_of(entries, self.rounds, len(self.extensions))

    def seconds(self, stage: Stage, entry: str) -> float:
        """About how long a job of that stage takes."""
        timing, steps = self.entries[entry], 0 if stage.startswith("untouched") else self.steps
        return timing.beside + steps * timing.step + (self.final if stage in ("untouched", "final") else 0.0)

    def longest(self, max_runs: int, workers: int = 1) -> float:
        """Seconds of all searches, each at its longest, and then of all final runs: of the work that workers share, or
        of the longest chain, since a search takes its runs after the first three one after the other, and a method's
        sizes are searched one after the other."""
        names = [name for name in self.entries if name not in self.dropped]
        searches, finals = ({name: self.seconds(stage, name) for name in names} for stage in ("search", "final"))
        of_chains: dict[str, float] = {}
        for name, seconds in searches.items():
            series = series_of(name, self.study.get("entries", {}).get(name, {}).get("size"))
            of_chains[series] = of_chains.get(series, 0.0) + seconds
        chain = min(max_runs, 1 + max(0, max_runs - STARTS)) * max(of_chains.values())
        of_finals = max(len(self.seeds) * sum(finals.values()) / workers, max(finals.values())) if self.seeds else 0.0
        return max(max_runs * sum(searches.values()) / workers, chain) + of_finals

    def table(self, study: Study, workers: int = 1) -> Table:
        """A line for each entry, and what they share as caption."""
        lines = []
        for name, one in ((name, one) for name, one in self.entries.items() if name in study.entries):
            seconds = [duration(self.seconds(stage, name)) for stage in ("search", "final")]
            before = study.at_other_sizes(name)[:1] if study.tuning.max_runs and name not in self.starts else []
            rate = rate_text(self.start(study, name))
            lines.append([name, f"{one.parameters:,}", *(before or [rate]), f"{one.step:.3g}", *seconds])
        each_run = f"{counted(self.steps, 'step')} a run on {counted(self.rows['train'], 'row')}"
        held_out = f"{self.rows['validation']} choose the rates, {self.rows['test']} decide"
        most = duration(self.longest(study.tuning.max_runs, workers))
        lasts = f"{counted(len(self.seeds), 'seed')} in {most} at most"
        caption = f"{each_run}; {held_out}; {lasts}."
        if self.limit is not None and len(self.listed) > len(self.seeds):
            caption += f" What is left of {self.minutes:g} minutes goes to up to {len(self.listed)} seeds."
        return Table(["entry", "trained", "from rate", "s a step", "a run", "a final run"], lines, caption)


def read_plan(study: Study) -> Plan | None:
    """The plan in a study's folder, if there is one."""
    file = study.folder / "plan.json"
    return _validated(file, Plan, "put back a copy of it, or use a new folder") if file.is_file() else None


def _validated(file: Path, kind: type[Read], remedy: str) -> Read:
    """What the file has, of this kind; raises DataError with the first key that isn't."""
    try:
        return TypeAdapter(kind).validate_python(read_stored(file, remedy=OR_REMOVE))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{file}: is damaged, or of another smoa ({first['msg']} at {first['loc']}); {remedy}"
        ) from error


def changed_plan(study: Study, change: Callable[[Plan], dict[str, Any]]) -> Plan:
    """The plan as its file has it now, with the changes that are made of it; other processes may change it too."""
    with FileLock(study.folder / ".lock"):
        plan = read_plan(study)
        assert plan is not None
        if changes := change(plan):
            plan = write_plan(study, plan.model_copy(update=changes))
        return plan


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


def write_plan(study: Study, plan: Plan) -> Plan:
    """Write it whole."""
    write_whole(study.folder / "plan.json", json_text(plan.model_dump(mode="json")) + "\n")
    return plan


def read_chosen(study: Study) -> dict[str, Chosen]:
    """The rates that were chosen, by entry of the study, but those at the edge of a search that may go on."""
    most = study.tuning.max_runs
    return {
        name: one
        for name, one in stored_chosen(study).items()
        if name in study.entries and not (one.place == "edge" and len(one.losses) < most)
    }


def stored_chosen(study: Study) -> dict[str, Chosen]:
    """All rates that are written, also of entries that only the file of another process has."""
    file, remedy = study.folder / "chosen.json", "remove it, and rates are chosen again by the runs"
    return _validated(file, dict[str, Chosen], remedy) if file.is_file() else {}


def write_chosen(study: Study, chosen: Mapping[str, Chosen]) -> None:
    """Write the rates that were chosen."""
    values = {name: asdict(one) for name, one in chosen.items()}
    write_whole(study.folder / "chosen.json", json_text(values) + "\n")


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def error_text(error: Exception) -> str:
    """What ended an entry: the message of an error of ours, of others with their kind."""
    return str(error) if isinstance(error, SmoaError) else f"{type(error).__name__}: {error}"


def other_config(known: dict[str, Any], config: RunConfig, is_untouched: bool) -> list[str]:
    """The keys by which a stored run's config, where an absent key is its default, is another than ``config``. Any
    metric scores the same answers; the base model is the same whatever adapter is trained."""
    known = {**known, "data": {**OLDER_DATA, **known["data"]}}
    old, new = (portable(each.model_dump(mode="json")) for each in (RunConfig.model_validate(known), config))
    for values in (old, new):
        values["training"] |= {"output_dir": None}
        values["data"]["metric"] = None
    ignored = ("method", "adapter", "training") if is_untouched else ()
    return [key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key)]


def other_inputs(study: Study, planned: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is another than planned; an older plan knows less, and only a metric of the user's
    reads all fields of a row."""
    read = [key for key in planned if key != "own" or study.shared.get("data", {}).get("metric") == OWN]
    return [what for key, what in INPUTS.items() if key in read and planned[key] != found.get(key)]


def other_metric(plan: Plan, study: Study) -> bool:
    """Whether another metric decides than was planned."""
    before, now = (shared.get("data", {}).get("metric") for shared in (plan.study["shared"], study.shared))
    return bool(before != now)


def is_looked_at(plan: Plan, study: Study) -> bool:
    """Whether there may have been a look: runs of the round of the first one."""
    seeds = plan.seeds[1:2] if plan.format == FORMAT else plan.seeds[-1:]
    return any(any(study.folder.glob(f"*/lr-*-seed-{seed}/metrics.json")) for seed in seeds)


FREE = ("tolerance", "keep", "references", "gaps")
"""Keys of a study's file that decide nothing of its runs."""


def as_planned(study: Study) -> dict[str, Any]:
    """What a plan keeps of a study's file."""
    return study.model_dump(mode="json", exclude={"folder"})


def changes(before: dict[str, Any], study: Study, planned: Sequence[int] = ()) -> list[str]:
    """What differs in a study from what was kept of it before, where an absent key is its default; entries and seeds
    may have been added, entries dropped, ``planned`` seeds left out, ``max_runs`` raised, and another metric scores the
    same answers."""
    before, now = as_planned(Study.model_validate({"folder": study.folder, **before})), as_planned(study)
    for key in FREE:
        before.pop(key, None)
        now.pop(key, None)
    both = before["entries"].keys() & now["entries"].keys()
    if before["entries"] and not both:  # no study that goes on: another one
        return [f"entries: {', '.join(before['entries'])}, now {', '.join(now['entries'])}"]
    before["entries"], now["entries"] = (
        {name: entry for name, entry in values["entries"].items() if name in both} for values in (before, now)
    )
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
        new = "use a new folder (folder=studies/NAME), or for smoa tune another training.output_dir"
        raise ConfigError(f"{lines}\n  put that back, or {new}")


def _differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    elif old != new:
        yield f"{place}: {json.dumps(old)}, now {json.dumps(new)}"


def check_folder(study: Study, given: Path | None = None) -> None:
    """Raise ConfigError if the study's folder has another study, or something else; or if its file has entries, which a
    user may have added, that a study without a file ``given`` lacks."""
    file = study.file
    check_place(file)
    if file.is_file():
        stored = load_study(file)
        refuse(f"{file}: says otherwise", changes(as_planned(stored), study))
        is_another = given is None or given.resolve() != file.resolve()
        if is_another and (added := [name for name in stored.entries if name not in study.entries]):
            told = f"has {', '.join(added)} too, which this command would take out"
            raise ConfigError(
                f"{file}: {told}; run smoa compare {quote(study.folder.as_posix())}, or take them out of the file first"
            )
    elif not (study.folder / "plan.json").is_file() and (others := [path.name for path in study.folder.glob("[!.]*")]):
        raise ConfigError(f"{study.folder}: contains {min(others)} and no study; choose another folder")


@contextmanager
def study_file(study: Study, given: Path | None = None) -> Iterator[None]:
    """Write a study into its folder, unless the file there is the one that was ``given`` or says the same, and plan it
    in the block. A start that fails leaves the file that was there; an interrupted first one leaves its own to be
    edited, a refused one none, by which the next would be refused."""
    file = study.file
    is_given = given is not None and given.resolve() == file.resolve()
    if is_given or (file.is_file() and as_planned(load_study(file)) == as_planned(study)):
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
