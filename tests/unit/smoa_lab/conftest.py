import pytest

from tests.support.pictures import quick_pictures as _quick_pictures

quick_pictures = _quick_pictures


@pytest.fixture(scope="module", autouse=True)
def _pictures(quick_pictures: None) -> None:
    """Only the tests of pages draw."""
