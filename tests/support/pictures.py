"""Pictures that are not drawn: drawing one takes longer than training a tiny model."""

from collections.abc import Iterator

import pytest

from smoa_lab.study import report
from smoa_lab.training import run


@pytest.fixture(scope="module")
def quick_pictures() -> Iterator[None]:
    """The file of a picture is empty."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, report):
            patch.setattr(module, "save_picture", lambda chart, file: file.touch())
        yield
