"""The table of the kinds of study."""

from __future__ import annotations

from smoa_lab.study.benches.answers import AnswerBench
from smoa_lab.study.benches.bench import Bench
from smoa_lab.study.benches.classification import ClassificationBench

BENCHES: dict[str, type[Bench]] = {"answers": AnswerBench, "classification": ClassificationBench}
