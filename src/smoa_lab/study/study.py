"""What a study's file says: what all runs share, and the entries that are compared, each one method at one setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from smoa.errors import ConfigError
from smoa_lab.basics.section import Section, Seed
from smoa_lab.config.methods import MethodName


class Entry(Section):
    """One method at one setting. ``learning_rate`` is where its search starts, ``budget`` the table it belongs to.

    ``parameters``, if given, is the number it must train, to within 2 %. ``training``
    and ``model`` are laid over the shared blocks.
    """

    method: MethodName
    adapter: dict[str, Any] = Field(default={})
    learning_rate: float = Field(gt=0)
    budget: str = "all"
    parameters: int | None = Field(default=None, gt=0)
    training: dict[str, Any] = Field(default={})
    model: dict[str, Any] = Field(default={})


class Tuning(Section):
    """The search for a learning rate, the same for each entry: half decades around the start, and on in the better
    direction until the best of them has neighbors on both sides or ``max_runs`` are spent; with ``refine`` the quarter
    decades beside the best as well, which count too. Judged by the gold answers' loss on the validation part after a
    run with ``seed``. ``max_runs: 0`` takes the start as it is."""

    seed: Seed = 100
    max_runs: Literal[0] | Annotated[int, Field(ge=3)] = 6
    refine: bool = False


class Study(Section):
    """A whole study. ``shared`` is a run's config but for method, adapter and learning rate.

    ``references`` are the entries to which the others of their budget are compared, by default the first one of each
    budget.
    """

    folder: Path
    shared: dict[str, Any]
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

    @model_validator(mode="after")
    def _as_a_whole(self) -> Study:
        """What no block knows by itself."""
        entries = self.entries
        bad = [name for name in entries if name in ("", ".", "..") or "/" in name or "\\" in name]
        if bad:
            raise ValueError(f"entries: {bad[0]!r} can't name a folder; leave out slashes")
        unknown = [name for name in self.references if name not in entries]
        if unknown:
            raise ValueError(f"references: {', '.join(unknown)} is not an entry; entries: {', '.join(entries)}")
        both = sorted({entry.budget for entry in entries.values()} & entries.keys())
        if both:
            raise ValueError(f"entries: {both[0]} is both an entry and a budget, so --only is ambiguous; rename one")
        if not isinstance(self.shared.get("model"), dict):
            raise ValueError("shared.model: is missing; an entry's own model block only changes parts of it")
        return self

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

    def reference(self, name: str) -> str:
        """The entry to which that of this name is compared: a reference of its budget, or the budget's first."""
        budget = self.entries[name].budget
        names = [other for other, entry in self.entries.items() if entry.budget == budget]
        return next((other for other in self.references if other in names), names[0])
