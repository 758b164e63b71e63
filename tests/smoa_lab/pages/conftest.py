import pytest


@pytest.fixture(scope="module")
def quick_pictures() -> None:
    """Here pictures are drawn."""
