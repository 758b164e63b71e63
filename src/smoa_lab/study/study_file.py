"""The YAML file of a study: what all runs share, and the entries that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, ValidationError

from smoa.errors import ConfigError
from smoa_lab.basics.section import Section
from smoa_lab.config.problems import listed
from smoa_lab.config.yaml_text import apply_overrides, parse_yaml
from smoa_lab.study.benches.answers import AnswerBench
from smoa_lab.study.benches.bench import Bench
from smoa_lab.study.benches.classification import ClassificationBench
from smoa_lab.study.entry import Entry

BENCHES: dict[str, type[Bench]] = {"answers": AnswerBench, "classification": ClassificationBench}


class Tuning(Section):
    """The search for a learning rate, the same for each entry: half decades around the start, and on in the better
    direction until the best of them has neighbors on both sides or ``max_runs`` are spent; with ``refine`` the quarter
    decades beside the best as well. Judged by the gold answers' loss on the validation part after a run with ``seed``.
    ``max_runs: 0`` takes the start as it is. ``sweep: [lowest, highest]`` runs every quarter decade of a range
    instead, the same for all entries, to draw the whole curve."""

    seed: int = 100
    max_runs: Literal[0] | Annotated[int, Field(ge=3)] = 6
    refine: bool = False
    sweep: tuple[PositiveFloat, PositiveFloat] | None = None


class Study(Section):
    """A whole study. ``shared`` is a run's config but for method, adapter and learning rate.

    ``references`` are the entries to which the others of their budget are compared, by default the first one of each
    budget. ``elsewhere`` is a data block of another domain: the loss on its test part shows what was forgotten.
    """

    kind: Literal["answers", "classification"] = "answers"
    folder: Path
    shared: dict[str, Any]
    elsewhere: dict[str, Any] | None = None
    entries: dict[str, Entry] = Field(min_length=1)
    references: list[str] = Field(default=[])
    tuning: Tuning = Tuning()
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)

    def bench(self) -> Bench:
        """What trains and scores one entry."""
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

    def reference(self, budget: str) -> str:
        """The entry to which those of ``budget`` are compared."""
        names = [name for name, entry in self.entries.items() if entry.budget == budget]
        return next((name for name in self.references if name in names), names[0])


def load_study(path: str | Path, overrides: list[str] | None = None) -> Study:
    """Read a study, lay ``key.key=value`` overrides over it and check every entry's run.

    Raises:
        ConfigError: lists the problems of the study, and of each entry's run, before any work starts.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such file")
    values = parse_yaml(file.read_text(encoding="utf-8"), file)
    apply_overrides(values, overrides or [])
    try:
        study = Study.model_validate({"folder": f"studies/{file.stem}", **values})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}; got {one['input']!r}" for one in error.errors()]
        raise ConfigError(f"{file}: {listed(problems)}") from error
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
    bench = study.bench()
    for name, entry in study.entries.items():
        bench.config(entry, entry.learning_rate, seed=0, place=f"{file}: entries.{name}")
    return study
