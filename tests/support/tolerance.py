"""How far two routes to the same number may lie apart, by dtype: the one table for all tests."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-10),
    torch.float32: Tolerance(rtol=1e-4, atol=1e-5),
    torch.float16: Tolerance(rtol=1e-2, atol=1e-2),
    torch.bfloat16: Tolerance(rtol=5e-2, atol=5e-2),
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
    """Compare within the tolerance of `dtype`, by default the coarser of the two; a failure prints the errors."""
    dtype = dtype or max(actual.dtype, expected.dtype, key=lambda d: TOLERANCE[d].rtol)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False, **kwargs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    return float((actual.detach().double() - expected).norm() / expected.norm())
