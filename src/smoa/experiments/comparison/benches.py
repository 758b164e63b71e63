"""The kinds of study."""

from __future__ import annotations

from smoa.experiments.comparison.answers import AnswerBench
from smoa.experiments.comparison.bench import Bench
from smoa.experiments.comparison.classification import ClassificationBench

BENCHES: dict[str, type[Bench]] = {"answers": AnswerBench, "classification": ClassificationBench}
