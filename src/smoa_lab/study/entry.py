"""One method at one setting."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A block of the study: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Section):
    """One method at one setting. ``learning_rate`` is where its search starts, ``budget`` the table it belongs to.

    ``parameters``, where given, is what it must train besides a task head, to within 2 %. ``training``
    and ``model`` are laid over the shared blocks.
    """

    method: str
    adapter: dict[str, Any] = {}
    learning_rate: float = Field(gt=0)
    budget: str = "all"
    parameters: int | None = Field(default=None, gt=0)
    training: dict[str, Any] = {}
    model: dict[str, Any] = {}
