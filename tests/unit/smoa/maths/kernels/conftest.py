from __future__ import annotations

import pytest

from smoa.maths.kernels import scratch


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 16 rows, the fewest that the kernels take."""
    monkeypatch.setattr(scratch, "CHUNK_ELEMENTS", {"cpu": 1, "other": 1})
