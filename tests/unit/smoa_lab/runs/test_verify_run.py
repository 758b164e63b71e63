from __future__ import annotations

import pytest

from smoa.errors import MergeError
from smoa_lab.runs.verify_run import Agreement, _check


def test_what_agrees_passes() -> None:
    _check(Agreement(2.0, 2.0 + 1e-5, 2.0 - 1e-5, logit_difference=5e-5), tolerance=1e-4)


@pytest.mark.parametrize(
    "agreement",
    [
        Agreement(2.0, 2.1, 2.0, logit_difference=0.0),
        Agreement(2.0, 2.0, 1.9, logit_difference=0.0),
        Agreement(2.0, 2.0, 2.0, logit_difference=0.1),
    ],
)
def test_a_saved_adapter_that_is_another_one_is_refused(agreement: Agreement) -> None:
    with pytest.raises(MergeError, match=r"disagrees with the trained one beyond 0\.0001"):
        _check(agreement, tolerance=1e-4)
