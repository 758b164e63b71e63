from __future__ import annotations

import pytest
import torch

from smoa.maths.kernels.block_runs import runs_of
from tests.support.updates import CASES, problem


@pytest.mark.parametrize(
    ("out_features", "in_features", "ranks", "counts"),
    [
        (12, 8, (2, 2, 2, 2), [4]),
        (13, 8, (2, 2, 2, 2), [1, 3]),
        (13, 10, (2, 2, 2, 2), [1, 1, 2]),
        (13, 10, (2, 2, 2, 1), [1, 1, 1, 1]),
        (12, 8, (2, 0, 2, 2), [1, 1, 2]),
    ],
)
def test_blocks_of_one_shape_are_one_run(
    out_features: int, in_features: int, ranks: tuple[int, ...], counts: list[int]
) -> None:
    assert [run.count for run in runs_of(problem(out_features, in_features, ranks).factors())] == counts


@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_the_views_of_a_run_are_its_blocks(out_features: int, in_features: int, ranks: tuple[int, ...]) -> None:
    case = problem(out_features, in_features, ranks, "contiguous")
    factors, blocks = case.factors(), case.partition
    x, y = torch.randn(3, in_features), torch.randn(3, out_features)
    found = [
        views
        for run in runs_of(factors)
        for views in zip(
            run.of_inputs(x),
            run.of_outputs(y),
            run.of_A(factors.A),
            run.of_B(factors.B),
            run.of_slices(case.weight),
            *(side.expand(run.count, run.height, run.width) for side in run.indices(blocks.orders)),
            strict=True,
        )
    ]
    for (rows, cols, slots), views in zip(factors.slots(), found, strict=True):
        of_x, of_y, A, B, entries, row_indices, col_indices = views
        assert torch.equal(of_x, x[:, cols])
        assert torch.equal(of_y, y[:, rows])
        assert torch.equal(A, factors.A[slots, : cols.stop - cols.start])
        assert torch.equal(B, factors.B[: rows.stop - rows.start, slots])
        assert torch.equal(entries, case.weight[rows, cols])
        assert torch.equal(case.weight[row_indices, col_indices], entries)
