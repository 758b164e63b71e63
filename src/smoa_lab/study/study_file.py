"""The YAML file of a study: what all runs share, and the entries that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.section import Section, Seed
from smoa_lab.config.run import ConfigText, DataSection
from smoa_lab.config.validation import block_problems
from smoa_lab.study.classification import ClassificationRunner
from smoa_lab.study.entry import Entry, Sweep
from smoa_lab.study.runner import AnswerRunner, Runner
from smoa_lab.study.sequence import Between, First, SequenceRunner
from smoa_lab.study.tuning import sweep_indices

BENCHES: dict[str, type[Runner]] = {"answers": AnswerRunner, "classification": ClassificationRunner}


class Tuning(Section):
    """The search for a learning rate, the same for each entry: half decades around the start, and on in the better
    direction until the best of them has neighbors on both sides or ``max_runs`` are spent; with ``refine`` the quarter
    decades beside the best as well. Judged by the gold answers' loss on the validation part after a run with ``seed``.
    ``max_runs: 0`` takes the start as it is. ``sweep: [lowest, highest]`` runs every quarter decade of a range
    instead, the same for all entries, to draw the whole curve; with ``per_decade: 2`` every half decade."""

    seed: Seed = 100
    max_runs: Literal[0] | Annotated[int, Field(ge=3)] = 6
    refine: bool = False
    sweep: Sweep | None = None
    per_decade: Literal[2, 4] = 4


class Study(Section):
    """A whole study. ``shared`` is a run's config but for method, adapter and learning rate.

    ``references`` are the entries to which the others of their budget are compared, by default the first one of each
    budget. ``elsewhere`` is a data block of another domain: the loss on its test part shows what was forgotten.

    In a study of kind ``sequence`` every entry starts from the model that ``first`` trained, trains the tasks
    ``between`` one after the other, and then that of ``shared``, with every seed at every rate of ``tuning.sweep``.
    ``replay`` is how many rows of the first task are mixed into the training rows of the last.
    """

    kind: Literal["answers", "classification", "sequence"] = "answers"
    folder: Path
    first: First | None = None
    between: list[Between] = Field(default=[])
    replay: int = Field(default=0, ge=0)
    shared: dict[str, Any]
    elsewhere: DataSection | None = None
    entries: dict[str, Entry] = Field(min_length=1)
    references: list[str] = Field(default=[])
    tuning: Tuning = Tuning()
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)

    @field_validator("shared")
    @classmethod
    def _one_dtype_on_all_machines(cls, shared: dict[str, Any]) -> dict[str, Any]:
        """float32 unless the study names another: with a machine's own dtype, two machines would not share results."""
        model = shared.get("model")
        return {**shared, "model": {"dtype": "float32", **model}} if isinstance(model, dict) else shared

    def bench(self) -> Runner:
        """What trains and scores one entry."""
        if self.first is not None:
            return SequenceRunner(self.shared, self.elsewhere, self.first, self.folder, self.between, self.replay)
        return BENCHES[self.kind](self.shared, self.elsewhere)

    def chosen(self, only: Sequence[str]) -> list[str]:
        """The entries of these names or budgets, all where none is given; raises ConfigError for unknown ones."""
        budgets = {entry.budget for entry in self.entries.values()}
        unknown = [name for name in only if name not in self.entries and name not in budgets]
        if unknown:
            raise ConfigError(
                f"--only: {', '.join(unknown)} is neither an entry ({', '.join(self.entries)}) nor a budget "
                f"({', '.join(sorted(budgets))}) of this study"
            )
        return [name for name, entry in self.entries.items() if not only or name in only or entry.budget in only]

    def rates(self, name: str) -> range:
        """The grid indices of an entry's sweep; none without one."""
        sweep = self.entries[name].sweep or self.tuning.sweep
        return range(0) if sweep is None else sweep_indices(*sweep, self.tuning.per_decade)

    def reference(self, budget: str) -> str:
        """The entry to which those of ``budget`` are compared."""
        names = [name for name, entry in self.entries.items() if entry.budget == budget]
        return next((name for name in self.references if name in names), names[0])


def load_study(path: str | Path, overrides: list[str] | None = None, trust_remote_code: bool = False) -> Study:
    """Read a study, lay ``key.key=value`` overrides over it and check every entry's run.

    Raises:
        ConfigError: lists the problems of the study, and of each entry's run, before any work starts.
    """
    text = ConfigText.read(path, overrides, trust_remote_code)
    file = Path(path)
    values = {"folder": f"studies/{file.stem}", **text.values}
    text.refuse(block_problems(Study, values))
    study = Study.model_validate(values)
    _check_names(study, file)
    _check_kind(study, file)
    _check_shared(study, file)
    _check_runs(study, file)
    return study


def _check_names(study: Study, file: Path) -> None:
    """Raise ConfigError unless entries are named like folders and not like budgets, and references are entries."""
    bad = [name for name in study.entries if name in ("", ".", "..") or "/" in name or "\\" in name]
    if bad:
        raise ConfigError(f"{file}: entries: {bad[0]!r} can't name a folder; leave out slashes")
    unknown = [name for name in study.references if name not in study.entries]
    if unknown:
        raise ConfigError(
            f"{file}: references: {', '.join(unknown)} is not an entry; entries: {', '.join(study.entries)}"
        )
    both = sorted({entry.budget for entry in study.entries.values()} & study.entries.keys())
    if both:
        raise ConfigError(
            f"{file}: entries: {both[0]} is both an entry and a budget, so --only is ambiguous; rename one"
        )


def _check_shared(study: Study, file: Path) -> None:
    """Raise ConfigError unless the entries share a model, and the tasks elsewhere exist."""
    if not isinstance(study.shared.get("model"), dict):
        raise ConfigError(f"{file}: shared.model: is missing; an entry's own model block only changes parts of it")
    if study.elsewhere is not None:
        try:
            study.elsewhere.chosen()
        except DataError as error:
            raise ConfigError(f"{file}: elsewhere: {error}") from error


def _check_runs(study: Study, file: Path) -> None:
    """Raise ConfigError unless the config of each entry's run, and those of a sequence's earlier tasks, are good."""
    bench = study.bench()
    for name, entry in study.entries.items():
        place = f"{file}: entries.{name}"
        config = bench.config(entry, entry.learning_rate, seed=0, place=place)
        if isinstance(bench, SequenceRunner):
            bench.between_configs(config, place)
    if isinstance(bench, SequenceRunner):
        bench.first_config(place=f"{file}: first")


def _check_kind(study: Study, file: Path) -> None:
    """Raise ConfigError unless exactly the studies of kind ``sequence`` have a first task, and they a sweep."""
    is_sequence = study.kind == "sequence"
    if is_sequence and study.first is None:
        raise ConfigError(f"{file}: first: is missing; a study of kind sequence trains its first task by it")
    given = [key for key in ("first", "between", "replay") if getattr(study, key)]
    if given and not is_sequence:
        raise ConfigError(
            f"{file}: {given[0]}: only studies of kind sequence have it, got kind {study.kind}; leave it out"
        )
    sweeping = [name for name, entry in study.entries.items() if entry.sweep is not None]
    if study.tuning.sweep is None and (is_sequence or sweeping):
        reason = "a study of kind sequence runs every rate of it" if is_sequence else f"entries.{sweeping[0]} has one"
        raise ConfigError(f"{file}: tuning.sweep: is missing; {reason}; give [lowest, highest]")
