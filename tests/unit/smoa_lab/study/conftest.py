from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa_lab.study import statistics
from smoa_lab.study.study import Study
from tests.support import lab, studies


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two entries of one budget and a third of another; nothing is run yet."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return studies.tiny_study(tmp_path / "study")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What all runs of a study share: two steps on questions."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    lab.fill_cache(tmp_path / "cache", lab.questions(40, "train"), lab.questions(8, "test"))
    return {
        "model": {"name": str(lab.tiny_base(tmp_path / "base"))},
        "data": {"tasks": ["arc_easy"], "train_examples": 8, "validation_examples": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True},
    }


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is told, and not of how exact it is."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
