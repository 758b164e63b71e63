from pathlib import Path

import pytest

from tests.support.studies import StudyLife


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyLife:
    """Of a study of two entries of one budget and a third of another; nothing is run yet."""
    return StudyLife(tmp_path / "study", monkeypatch)
