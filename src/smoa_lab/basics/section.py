"""The base class of every block of a config: unknown keys are errors, values never change."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A block of a config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
