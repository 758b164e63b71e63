"""An entry of a study: one method at one setting."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveFloat

from smoa_lab.basics.section import Section


def _ascending(sweep: tuple[float, float]) -> tuple[float, float]:
    if sweep[0] > sweep[1]:
        raise ValueError("must be [lowest, highest]")
    return sweep


Sweep = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
"""The lowest and the highest learning rate of a range."""


class Entry(Section):
    """One method at one setting. ``learning_rate`` is where its search starts, ``budget`` the table it belongs to.

    ``parameters``, if given, is the number it must train, a task head aside, to within 2 %. ``training``
    and ``model`` are laid over the shared blocks. ``sweep`` replaces the study's, for methods that need other rates.
    """

    method: str
    adapter: dict[str, Any] = Field(default={})
    learning_rate: float = Field(gt=0)
    budget: str = "all"
    parameters: int | None = Field(default=None, gt=0)
    training: dict[str, Any] = Field(default={})
    model: dict[str, Any] = Field(default={})
    sweep: Sweep | None = None
