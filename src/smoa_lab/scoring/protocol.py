"""The ways to score answers, by name. Imports nothing heavy, so that ``smoa eval --help`` is quick."""

from __future__ import annotations

from typing import Literal

Protocol = Literal["likelihood", "lm-eval", "generation"]
