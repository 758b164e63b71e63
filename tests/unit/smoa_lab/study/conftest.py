from pathlib import Path

import pytest

from smoa_lab.study.run_study import Comparison
from smoa_lab.study.study import Study
from tests.support import studies
from tests.support.studies import WrittenRuns, write_runs


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> WrittenRuns:
    """Runs are written, and not trained."""
    return write_runs(monkeypatch)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two entries of one budget and a third of another; nothing is run yet."""
    return studies.tiny_study(tmp_path / "study")


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies run all their rounds: for tests of what is run, and not of what ends it."""
    monkeypatch.setattr(Comparison, "_decide", lambda self, only=(): None)
