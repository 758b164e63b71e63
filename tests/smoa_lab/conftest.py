import pytest


@pytest.fixture(scope="module", autouse=True)
def _pictures(quick_pictures: None) -> None:
    """Only the tests of pages draw."""
