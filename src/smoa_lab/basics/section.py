"""The base class of every block of a config, and the type of its seeds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A block of a config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
