"""Shared by the benchmarks that run a study with a bench of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from smoa_lab.study.comparison import Comparison
from smoa_lab.study.packing import pack
from smoa_lab.study.report.study_report import report
from smoa_lab.study.runner import Runner
from smoa_lab.study.study_file import Study


def run_study(study: Study, bench: Runner, only: Sequence[str] = ()) -> None:
    """Run what is missing of the study, or of these entries or budgets, by ``bench``, with a line a run; then pack it
    and write its report."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()
    comparison = Comparison(study)
    comparison.bench = bench
    comparison.run(only)
    pack(study.folder)
    report(study)
