import pytest

from smoa_lab.scoring import differences


@pytest.fixture(scope="module", autouse=True)
def _pictures(quick_pictures: None) -> None:
    """Only the tests of pages draw."""


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is told, and not of how exact it is."""
    monkeypatch.setattr(differences, "RESAMPLES", 400)
