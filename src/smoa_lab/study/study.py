"""What a study's file says: what all runs share, and the entries that are compared, each one method at one setting."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from smoa.errors import ConfigError
from smoa_lab.basics.folders import read_stored
from smoa_lab.basics.section import Section, Seed
from smoa_lab.config.methods import MethodName, find_method
from smoa_lab.config.run import ConfigText, RunConfig, check_config
from smoa_lab.config.validation import Problem, block_problems
from smoa_lab.study.search import rate_text

FORMAT = 3
"""Of plan.json. A study goes on by the rules of the format that it was planned in."""
SEEDS = ("random_seed", "random_loc_seed", "projection_prng_key", "projection_seed", "proj_seed", "generator_seed")
"""Keys of PEFT's methods by which they draw what is not trained; without one, all seeds of a run draw the same."""
ALL_SIZES = "all sizes"
"""The family of all entries with a size."""
OLDER_DATA = {"group": False, "answer_tokens": 128, "recall": False}
"""What stands for keys of ``data`` that stored plans lack."""
logger = logging.getLogger(__name__)

STUDY = "study.yaml"
"""The file of a study, in its folder."""
OR_REMOVE = "put back a copy, or remove it"
"""What to do where a file of a study is damaged."""
Stage = Literal["timing", "untouched", "untouched-validation", "search", "final"]
DECIDED = {
    "method": "is what an entry has",
    "adapter": "is what an entry has",
    "scoring": "is the study's: searches score the validation part, final runs the test part",
    "training.learning_rate": "is what an entry has, and where its search starts",
    "training.seed": "is the study's: set seeds and tuning.seed",
    "training.output_dir": "is the study's: set folder",
    "training.auto_find_batch_size": "would give one entry other batches than another",
}
"""Keys of a run that no block of a study may have, and why."""
SHARED = {
    **dict.fromkeys(("max_steps", "num_train_epochs"), "all entries take the same steps"),
    **dict.fromkeys(("loss_type", "label_smoothing"), "all entries are compared by the same loss"),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "packing"), "all entries learn the same tokens"),
}
"""Keys of training that only the shared block may have, and why."""


class Entry(Section):
    """One method at one setting. ``learning_rate`` is where its search starts, ``budget`` the table it belongs to.

    ``parameters``, if given, is the number it must train, to within 2 %. ``training``
    and ``model`` are laid over the shared blocks. Entries named NAME-rSIZE, with that ``size``, a rank of LoRA, are one
    method at several sizes: each search but the first starts at the rate that was chosen at the nearest size before it.
    """

    method: MethodName
    adapter: dict[str, Any] = Field(default={})
    learning_rate: float = Field(gt=0)
    budget: str = "all"
    size: int | None = Field(default=None, gt=0)
    parameters: int | None = Field(default=None, gt=0)
    training: dict[str, Any] = Field(default={})
    model: dict[str, Any] = Field(default={})


class Tuning(Section):
    """The search for a learning rate, the same for each entry, with at most ``max_runs``: quarter decades from the
    entry's rate until the best has neighbors on both sides, then the vertex of the parabola through these. Judged by
    the loss on the validation part after a run with ``seed``. ``max_runs: 0`` takes the entry's rate as it is."""

    seed: Seed = 100
    max_runs: Literal[0] | Annotated[int, Field(ge=3)] = 6


@dataclass(frozen=True, order=True)
class Job:
    """A run of an entry: a ``search`` is scored on the validation part, a ``final`` one on the test part. ``timing`` is
    the first steps of a search's, thrown away. The ``untouched`` ones score the model as it is, in any entry's
    config."""

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
        if self.stage == "timing":
            return f"timing/{self.entry}"
        return f"{self.entry}/lr-{rate_text(self.learning_rate)}-seed-{self.seed}"


class Study(Section):
    """A whole study. ``shared`` is a run's config but for method, adapter, learning rate and seed.

    ``keep`` says whose adapters stay: those of each entry's best seed, of all final runs, or none. The first in order
    of cost is taken that keeps 1 − ``tolerance`` of what each other gained by training. Without ``seeds`` rates are
    searched and there are no final runs. ``gaps`` says why a method can't have a size. ``references``, of older files,
    is ignored.
    """

    folder: Path
    shared: dict[str, Any]
    entries: dict[str, Entry] = Field(min_length=1)
    gaps: dict[str, str] = Field(default={})
    references: list[str] = Field(default=[])
    tuning: Tuning = Tuning()
    seeds: list[Seed] = Field(default=[0, 1, 2])
    keep: Literal["best", "all", "none"] = "best"
    tolerance: float = Field(default=0.1, gt=0, le=1)

    @field_validator("folder")
    @classmethod
    def _at_home(cls, folder: Path) -> Path:
        return folder.expanduser()

    @field_validator("shared")
    @classmethod
    def _one_dtype_on_all_machines(cls, shared: dict[str, Any]) -> dict[str, Any]:
        """float32 unless the study names another: with a machine's own dtype, two machines would not share results."""
        model = shared.get("model")
        return {**shared, "model": {"dtype": "float32", **model}} if isinstance(model, dict) else shared

    @model_validator(mode="after")
    def _as_a_whole(self) -> Study:
        """What no block knows by itself."""
        entries = self.entries
        for name in entries:
            if name in ("", ".", "..", *get_args(Stage)) or "/" in name or "\\" in name:
                raise ValueError(f"entries: {name!r} can't name a folder of runs; choose another name, without slashes")
        both = sorted({entry.budget for entry in entries.values()} & entries.keys())
        if both:
            raise ValueError(f"entries: {both[0]} is both an entry and a budget, so --only is ambiguous; rename one")
        for name, entry in entries.items():
            if entry.size is not None and not name.endswith(f"-r{entry.size}"):
                raise ValueError(f"entries: {name} has size {entry.size}; call it {name}-r{entry.size}, as its others")
            if entry.budget == ALL_SIZES:
                raise ValueError(f"entries: {name}: budget {ALL_SIZES!r} is that of all sizes together; rename it")
        if not isinstance(self.shared.get("model"), dict):
            raise ValueError("shared.model: is missing; an entry's own model block only changes parts of it")
        if twice := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds: {twice[0]} is named twice; name each once")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"seeds: {self.tuning.seed} is the seed of the search; final runs take fresh ones")
        return self

    def key_problems(self) -> Iterator[Problem]:
        """The keys of a run that a block of the study may not have."""
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

    def chosen(self, only: Sequence[str]) -> list[str]:
        """The entries of these names or budgets, all where none is given; raises ConfigError for unknown ones."""
        budgets = {entry.budget for entry in self.entries.values()}
        unknown = [name for name in only if name not in self.entries and name not in budgets]
        if unknown:
            known = f"an entry ({', '.join(self.entries)}) nor a budget ({', '.join(sorted(budgets))}) of this study"
            raise ConfigError(f"--only: {', '.join(unknown)} is neither {known}")
        return [name for name, entry in self.entries.items() if not only or name in only or entry.budget in only]

    def families(self) -> dict[str, list[str]]:
        """The entries that are compared with each other: of each budget, and those of all sizes, if there are any."""
        found: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            found.setdefault(entry.budget, []).append(name)
        sized = [name for name, entry in self.entries.items() if entry.size is not None]
        return found | ({ALL_SIZES: sized} if len({self.entries[name].size for name in sized}) > 1 else {})

    def at_other_sizes(self, name: str) -> list[str]:
        """The entries before this one that are its method at other sizes, the nearest size first."""
        size, series = self.entries[name].size, series_of(name, self.entries[name].size)
        if size is None:
            return []
        before = list(self.entries)[: list(self.entries).index(name)]
        sizes = {other: self.entries[other].size for other in before}
        found = {other: own for other, own in sizes.items() if own and series_of(other, own) == series}
        return sorted(found, key=lambda other: abs(math.log(found[other] / size)))

    def untouched(self, stage: Stage) -> Job:
        """The model as it is, in the config of an entry that has no model block of its own, if there is one."""
        first = next((name for name, entry in self.entries.items() if not entry.model), next(iter(self.entries)))
        return Job(stage, first, self.entries[first].learning_rate, 0)

    @property
    def file(self) -> Path:
        """The study as a file, in its folder."""
        return self.folder / STUDY

    @property
    def format(self) -> int:
        """The format in which it was planned, or now would be."""
        file = self.folder / "plan.json"
        return int(read_stored(file, remedy=OR_REMOVE).get("format", 1)) if file.is_file() else FORMAT

    def config(self, name: str, place: str = "study") -> RunConfig:
        """The run of an entry at its own rate, scored on the test part; raises ConfigError with all problems of it."""
        entry, shared = self.entries[name], self.shared
        own = {"learning_rate": entry.learning_rate, "seed": 0, "output_dir": str(self.folder / name)}
        older = OLDER_DATA if self.format < FORMAT else {}
        values = {
            **shared,
            **({"data": {**older, **shared["data"]}} if isinstance(shared.get("data"), dict) else {}),
            "method": entry.method,
            "adapter": entry.adapter,
            "model": {**shared["model"], **entry.model},
            "training": {**(shared.get("training") or {}), **entry.training, **own},
            "scoring": {"part": "test", "before": False},
        }
        return check_config(values, place)

    def job_config(self, config: RunConfig, job: Job, steps: int | None = None) -> RunConfig:
        """``config``, an entry's, as the job runs it, for so many steps. What is scored on the validation part has
        neither sample answers nor a measure of what is forgotten."""
        own = {"learning_rate": job.learning_rate, "seed": job.seed, "output_dir": str(self.folder / job.name)}
        training = {**config.training, **own, **({} if steps is None else {"max_steps": steps})}
        if self.format == FORMAT and (chosen := find_method(config.method).config_class) is not None:
            fields = {field.name for field in dataclasses.fields(chosen)} - config.adapter.keys()
            drawn = {key: job.seed for key in SEEDS if key in fields}
            config = config.model_copy(update={"adapter": {**config.adapter, **drawn}})
        if job.stage not in ("search", "timing", "untouched-validation"):
            return config.model_copy(update={"training": training})
        quiet = {"data": {"samples": 0, "metric": None}, "forgetting": {"tokens": 0}, "scoring": {"part": "validation"}}
        sections = {key: getattr(config, key).model_copy(update=values) for key, values in quiet.items()}
        return config.model_copy(update={"training": training, **sections})


def series_of(name: str, size: int | None) -> str:
    """What an entry's name has in common with those of its method at other sizes."""
    return name if size is None else name.removesuffix(f"-r{size}")


def load_study(path: str | Path, overrides: list[str] | None = None) -> Study:
    """Read a study, lay ``key.key=value`` overrides over it and check every entry's run."""
    file, is_named = Path(path), any(word.startswith("folder=") for word in overrides or [])
    study = checked_study(ConfigText.read(path, overrides), file)
    is_elsewhere = file.parent.resolve() != study.folder.resolve()
    was_moved = file.with_name("plan.json").is_file() and is_elsewhere
    if file.name == STUDY and is_elsewhere and not (was_moved or is_named) and study.file.is_file():
        told = f"goes on with the study in its folder, {study.folder}; for a study of its own"
        logger.warning("%s: %s write folder: %s into it", file, told, file.parent)
    return study.model_copy(update={"folder": file.parent}) if was_moved and not is_named else study


def _usual_folder(file: Path) -> Path:
    """The folder of a study whose file names none: its own, where nothing else lies in that, else studies/NAME."""
    usual = Path("studies", file.stem)
    is_alone = file.name == STUDY and [each.name for each in file.parent.glob("[!.]*")] == [STUDY]
    return file.parent if is_alone and not (usual / "plan.json").is_file() else usual


def checked_study(text: ConfigText, file: Path) -> Study:
    """The study of a file's values, with every entry's run checked."""
    values = text.values if "folder" in text.values else {"folder": str(_usual_folder(file)), **text.values}
    text.refuse(block_problems(Study, values))
    study = Study.model_validate(values)
    text.refuse(study.key_problems())
    for name in study.entries:
        study.config(name, place=f"{file}: entries.{name}")
    return study
