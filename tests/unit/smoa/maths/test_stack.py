"""Updates of a stack of matrices."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from smoa.maths import stack as stacks
from smoa.maths.blocks import block_sizes
from smoa.maths.stack import Side, Stack
from tests.support.tolerance import assert_close
from tests.support.updates import Problem, problem

EXPERTS, HALVES, RANKS = 3, 2, (3, 2, 2)


def make_stack(
    sizes: tuple[int, int] = (11, 13), dtype: torch.dtype = torch.float64, kind: str = "spectral"
) -> tuple[Stack, list[Problem], Tensor]:
    """Six matrices, and their weights (experts, halves, …)."""
    cases = [problem(*sizes, RANKS, kind) for _ in range(EXPERTS * HALVES)]
    A, B = torch.cat([case.A for case in cases]), torch.cat([case.B for case in cases], dim=1)
    A, B = (factor.detach().to(dtype).requires_grad_() for factor in (A, B))
    rows, cols = (
        Side.of(
            torch.stack([getattr(case.partition, side) for case in cases]).unflatten(0, (EXPERTS, HALVES)), len(RANKS)
        )
        for side in ("row_labels", "col_labels")
    )
    found = Stack(A, B, RANKS, 0.5, torch.ones(len(cases), sum(RANKS)), rows, cols)
    return found, cases, torch.stack([case.weight for case in cases]).unflatten(0, (EXPERTS, HALVES)).to(dtype)


def oracle(cases: list[Problem], x: Tensor, ends: list[int]) -> Tensor:
    """(rows, halves, out_features), the rows of each expert with its own updates."""
    deltas = torch.stack([case.oracle("hadamard", 0.5) for case in cases]).unflatten(0, (EXPERTS, HALVES))
    own = [x[start:stop] @ deltas[e].mT for e, (start, stop) in enumerate(pairwise([0, *ends]))]
    return torch.cat(own, dim=1).transpose(0, 1)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [((11, 13), "spectral"), ((24, 24), "spectral"), ((24, 24), "contiguous"), ((23, 23), "contiguous")],
)
@pytest.mark.parametrize(
    ("ends", "dtype", "parts"),
    [([4, 4, 9], torch.float64, 2), ([0, 9, 9], torch.float32, 1), ([0, 0, 0], torch.float64, 1)],
)
def test_outputs_and_gradients_are_the_oracles_however_rows_are_shared_out(
    ends: list[int], sizes: tuple[int, int], kind: str, dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "PARTS", parts)
    monkeypatch.setattr(stacks, "LARGE", 0)
    own, cases, matrices = make_stack(sizes, dtype, kind)
    x = torch.randn(ends[-1], sizes[1], dtype=torch.float64, requires_grad=True)
    y, expected = own.apply(x.to(dtype), matrices, torch.tensor(ends).int()), oracle(cases, x, ends)
    assert_close(y, expected)
    g = torch.randn_like(expected)
    of_x, of_A, of_B = torch.autograd.grad(y, [x, own.A, own.B], g.to(dtype))
    leaves = [factor for case in cases for factor in (case.A, case.B)]
    of_oracle, *of_leaves = torch.autograd.grad(expected, [x, *leaves], g, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if found is None else found for leaf, found in zip(leaves, of_leaves, strict=True)]
    assert_close(of_x, of_oracle, dtype)
    assert_close(of_A, torch.cat(zeros[::2]))
    assert_close(of_B, torch.cat(zeros[1::2], dim=1))


def test_only_x_and_the_factors_are_kept_for_the_backward() -> None:
    own, _, matrices = make_stack()
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != matrices.untyped_storage().data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        own.apply(x, matrices, torch.tensor([1, 2, 6]).int())
    assert sum(kept) == x.numel() + own.A.numel() + own.B.numel()


def test_a_side_has_the_coordinates_of_each_block_and_knows_the_place_of_each() -> None:
    labels = torch.stack([problem(11, 13, RANKS).partition.row_labels for _ in range(4)]).unflatten(0, (2, 2))
    side = Side.of(labels, len(RANKS))
    assert side.order.shape == (2, 2, 3, 8)
    for block, size in enumerate(block_sizes(11, 3)):
        own = side.order[:, :, block]
        assert torch.equal(own[..., :size].flatten(), (labels == block).nonzero()[:, 2].int())
        assert (own[..., size:] == own[..., size - 1 : size]).all()
    assert (side.order.flatten(2).gather(2, side.places.long()) == torch.arange(11)).all()


def test_batched_and_repeated_gradients_are_the_oracles() -> None:
    own, cases, matrices = make_stack()
    x, ends = torch.randn(2, 13, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 2]).int()
    y, expected = own.apply(x, matrices, ends)[:, 0], x @ cases[2].oracle("hadamard", 0.5).T
    g = torch.randn(4, 2, 11, dtype=torch.float64)
    r = sum(RANKS)
    own_leaves, leaves = [x, own.A, own.B], [x, cases[2].A, cases[2].B]

    def of_case(gradients: tuple[Tensor, ...]) -> list[Tensor]:
        of_x, of_A, of_B = gradients
        return [of_x, of_A[..., 2 * r : 3 * r, :], of_B[..., 2 * r : 3 * r]]

    batched = torch.autograd.grad(y, own_leaves, g, is_grads_batched=True, retain_graph=True)
    oracles = torch.autograd.grad(expected, leaves, g, is_grads_batched=True, retain_graph=True)
    for found, oracle_of in zip(of_case(batched), oracles, strict=True):
        assert_close(found, oracle_of)
    first = torch.autograd.grad(y.square().sum(), own.A, create_graph=True)[0]
    second = torch.autograd.grad(expected.square().sum(), cases[2].A, create_graph=True)[0]
    repeated = torch.autograd.grad(first.square().sum(), own_leaves)
    for found, oracle_of in zip(of_case(repeated), torch.autograd.grad(second.square().sum(), leaves), strict=True):
        assert_close(found, oracle_of)
