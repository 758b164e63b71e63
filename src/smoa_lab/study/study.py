"""What a study's file says: what all runs share, and the entries that are compared, each one method at one setting.

A study is this file and the finished runs beside it. What has to be fixed before results are seen is in the file: the
steps of a run, the seeds of the rounds, and how many of these were planned.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from ruamel.yaml import YAML

from smoa.errors import ConfigError
from smoa_lab.basics.files import write_whole
from smoa_lab.basics.settings import Section, Seed
from smoa_lab.config.methods import MethodName, find_method
from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.config.validation import Problem, block_problems, refuse
from smoa_lab.config.yaml_text import apply_overrides, read_yaml
from smoa_lab.study.search import rate_text

STUDY = "study.yaml"
"""The file of a study, in its folder."""
SEEDS = ("random_seed", "random_loc_seed", "projection_prng_key", "projection_seed", "proj_seed", "generator_seed")
"""Keys of PEFT's methods that seed the numbers they draw and don't train. Where a study leaves them out they get the
run's seed; PEFT's default would draw the same in every run."""
Stage = Literal["untouched", "untouched-validation", "search", "final"]
DECIDED = {
    **dict.fromkeys(("method", "adapter", "training.learning_rate"), "belongs to an entry"),
    **dict.fromkeys(("scoring", "training.seed", "training.output_dir"), "is set by the study"),
    "training.auto_find_batch_size": "would give one entry other batches than another",
}
"""Keys of a run that no block of a study may have, and why."""
SHARED = {
    **dict.fromkeys(("max_steps", "num_train_epochs"), "all entries take the same steps"),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "packing"), "all entries learn the same tokens"),
}
"""Keys of training that only the shared block may have, and why."""
QUIET = {"data": {"samples": 0, "metric": None}, "forgetting": {"tokens": 0}, "scoring": {"part": "validation"}}
"""What a run of a search has instead: the loss on the validation part is all that it needs."""


class Entry(Section):
    """One method at one setting. Its search starts at ``learning_rate``; it is compared with the entries of the same
    ``budget``. ``training`` and ``model`` override keys of the shared blocks.

    ``added`` is 0 for an entry that was there before results were looked at. An entry that came later is compared at a
    further look, which wasn't planned: ``added`` counts these looks, and each is at a stricter level.
    """

    method: MethodName
    adapter: dict[str, Any] = Field(default={})
    learning_rate: float = Field(gt=0)
    budget: str = "all"
    training: dict[str, Any] = Field(default={})
    model: dict[str, Any] = Field(default={})
    added: int = Field(default=0, ge=0)


class Tuning(Section):
    """The search for a learning rate, the same for each entry, with at most ``max_runs``. It goes in quarter decades
    from the entry's rate until the best one has neighbors on both sides, and takes the vertex of the parabola through
    these three. Rates are judged by the loss on the validation part after a run with ``seed``. ``max_runs: 0`` takes
    the entry's rate without a search."""

    seed: Seed = 100
    max_runs: Literal[0] | Annotated[int, Field(ge=3)] = 6


@dataclass(frozen=True)
class Job:
    """A run of an entry: one of its ``search`` is scored on the validation part, a ``final`` one on the test part. The
    ``untouched`` jobs train nothing: they score the base model on the test part or the validation part."""

    stage: Stage
    entry: str
    learning_rate: float
    seed: int

    @property
    def is_untouched(self) -> bool:
        return self.stage.startswith("untouched")

    @property
    def name(self) -> str:
        """Its folder within the study's."""
        if self.is_untouched:
            return self.stage
        return f"{self.entry}/lr-{rate_text(self.learning_rate)}-seed-{self.seed}"


class Study(Section):
    """A whole study. ``shared`` is a run's config without method, adapter, learning rate and seed.

    A round is one final run of each entry with the same of the ``seeds``. ``rounds`` says how many were planned, by
    default all. Without ``seeds``, rates are searched and there are no final runs. The verdict takes the cheapest entry
    that keeps at least 1 − ``tolerance`` of what each other entry gained by training. ``keep`` says which adapters stay
    on disk: that of each entry's best seed, those of all final runs, or none.
    """

    folder: Path = Field(exclude=True)
    shared: dict[str, Any]
    entries: dict[str, Entry] = Field(min_length=1)
    tuning: Tuning = Tuning()
    seeds: list[Seed] = Field(default=[0, 1, 2])
    rounds: int | None = Field(default=None, ge=1)
    keep: Literal["best", "all", "none"] = "best"
    tolerance: float = Field(default=0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _as_a_whole(self) -> Study:
        """Rules that concern more than one block."""
        for name in self.entries:
            if not re.fullmatch(r"\w[\w+-]*", name) or name.startswith("untouched"):
                raise ValueError(f"entries: {name!r} can't name a folder of runs; choose letters, digits, - and +")
        if not isinstance(self.shared.get("model"), dict):
            raise ValueError("shared.model: is missing; an entry's own model block only changes parts of it")
        if len({*self.seeds, self.tuning.seed}) <= len(self.seeds):
            raise ValueError("seeds: name each once, and not the search's (tuning.seed): final runs take fresh ones")
        return self

    def key_problems(self) -> Iterator[Problem]:
        """Keys of a run in blocks of the study that may not have them."""
        blocks: dict[tuple[str, ...], dict[str, Any]] = {("shared",): self.shared}
        blocks |= {("entries", name): {"training": entry.training} for name, entry in self.entries.items()}
        for place, block in blocks.items():
            given = [(key,) for key in block] + [("training", key) for key in block.get("training") or {}]
            for path in given:
                if (reason := DECIDED.get(".".join(path))) is not None:
                    yield (*place, *path), f"{reason}; leave it out"
                if place != ("shared",) and path[-1] in SHARED:
                    yield (*place, *path), f"{SHARED[path[-1]]}; set it under shared"
        for name in (name for name, entry in self.entries.items() if "name" in entry.model):
            yield ("entries", name, "model", "name"), "all entries adapt the same base; make another study for it"

    @property
    def planned(self) -> int:
        """How many rounds were planned."""
        return len(self.seeds) if self.rounds is None else self.rounds

    def budgets(self) -> dict[str, list[str]]:
        """The entries that are compared with each other, by budget."""
        found: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            found.setdefault(entry.budget, []).append(name)
        return found

    def chosen(self, only: Sequence[str]) -> list[str]:
        """The entries of these names or budgets, all where none is given; raises ConfigError for unknown ones."""
        budgets = self.budgets()
        if unknown := [name for name in only if name not in self.entries and name not in budgets]:
            known = f"an entry ({', '.join(self.entries)}) nor a budget ({', '.join(budgets)}) of this study"
            raise ConfigError(f"--only: {', '.join(unknown)} is neither {known}")
        return [name for name, entry in self.entries.items() if not only or name in only or entry.budget in only]

    def untouched(self, stage: Stage) -> Job:
        """The model as it is, in the config of an entry that has no model block of its own, if there is one."""
        first = next((name for name, entry in self.entries.items() if not entry.model), next(iter(self.entries)))
        return Job(stage, first, self.entries[first].learning_rate, 0)

    @cached_property
    def configs(self) -> dict[str, RunConfig]:
        """The run of each entry at its own rate, scored on the test part; raises ConfigError with all problems of
        one."""
        found = {}
        for name, entry in self.entries.items():
            own = {"learning_rate": entry.learning_rate, "seed": 0, "output_dir": str(self.folder / name)}
            values = {
                **self.shared,
                "method": entry.method,
                "adapter": entry.adapter,
                # float32 unless the study names another: by a machine's own dtype, two would not share results
                "model": {"dtype": "float32", **self.shared["model"], **entry.model},
                "training": {**(self.shared.get("training") or {}), **entry.training, **own},
                "scoring": {"part": "test", "before": False},
            }
            found[name] = check_config(values, f"{self.folder / STUDY}: entries.{name}")
        return found

    @property
    def any_config(self) -> RunConfig:
        """An entry's, for what all share."""
        return next(iter(self.configs.values()))

    def config(self, job: Job) -> RunConfig:
        """The run that a job is."""
        config = self.configs[job.entry]
        own = {"learning_rate": job.learning_rate, "seed": job.seed, "output_dir": str(self.folder / job.name)}
        changes: dict[str, Any] = {"training": {**config.training, **own}}
        if (method := find_method(config.method).config_class) is not None:
            left = {field.name for field in dataclasses.fields(method)} - config.adapter.keys()
            changes["adapter"] = {**config.adapter, **{key: job.seed for key in SEEDS if key in left}}
        if job.stage in ("search", "untouched-validation"):
            changes |= {key: getattr(config, key).model_copy(update=values) for key, values in QUIET.items()}
        return config.model_copy(update=changes)


def load_study(file: Path) -> Study:
    """The study of a file, whose runs lie beside it, with every entry's run checked."""
    return check_study(read_yaml(file), file)


def check_study(values: Mapping[str, Any], file: Path) -> Study:
    """The study of plain values that are, or will be, in a file; raises ConfigError with all problems."""
    values = {**values, "folder": file.parent}
    refuse(str(file), block_problems(Study, values))
    study = Study.model_validate(values)
    refuse(str(file), study.key_problems())
    assert study.configs
    return study


def edit(file: Path, changes: Sequence[str]) -> None:
    """Write ``key.key=value`` into a study's file, whose comments stay; raises ConfigError for what it can't have."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 10_000
    values = yaml.load(file.read_text(encoding="utf-8"))
    apply_overrides(values, changes)
    check_study(values, file)
    yaml.dump(values, text)
    write_whole(file, text.getvalue())
