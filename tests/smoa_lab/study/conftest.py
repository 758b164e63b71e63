from pathlib import Path

import pytest

from tests.support import studies
from tests.support.studies import WrittenRuns, write_runs


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> WrittenRuns:
    """Runs are written, and not trained."""
    return write_runs(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a study of two entries of one budget and a third of another; nothing is run yet."""
    return studies.tiny_study(tmp_path / "study")
