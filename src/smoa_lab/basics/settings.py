"""The base class of every block of a config, and what no config may say: whose code may run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A block of a config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass
class Trust:
    """What the command lets run: the code of models' repositories (``--trust-remote-code``), and a function of the
    user's, FILE:NAME (``--metric``). The command sets it, and hands it to the workers of a study. A config can't: its
    file may come from a stranger."""

    trust_remote_code: bool = False
    metric: str | None = None


TRUSTED = Trust()
"""What this process lets run."""
