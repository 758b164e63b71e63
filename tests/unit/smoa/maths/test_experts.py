"""Updates and partitions of the matrices of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoa.maths.blocks import Blocks, Orders
from smoa.maths.experts import Layout, Run, Stack, stack_partition, stacked_blocks
from smoa.maths.spectrum import spectral_scores
from tests import reference
from tests.support.tolerance import assert_close
from tests.support.updates import Problem, problem

EXPERTS, HALVES, RANKS = 3, 2, (3, 2, 2)
RUNS = [Run(2, slice(0, 4)), Run(0, slice(4, 5))]
"""Rows of x of the experts 2 and 0; the last row belongs to none."""


def stack() -> tuple[Stack, list[Problem], Tensor]:
    """Six ragged matrices, and their weights (experts, halves, 11, 13)."""
    cases = [problem(11, 13, RANKS) for _ in range(EXPERTS * HALVES)]
    blocks = [case.partition for case in cases]
    A, B = torch.cat([case.A for case in cases]), torch.cat([case.B for case in cases], dim=1)
    found = Stack(A, B, RANKS, 0.5, torch.ones(len(cases), sum(RANKS)), blocks)
    return found, cases, torch.stack([case.weight for case in cases]).unflatten(0, (EXPERTS, HALVES))


def test_only_x_and_the_factors_are_kept_for_the_backward() -> None:
    own, _, matrices = stack()
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != matrices.untyped_storage().data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        own.apply(x, matrices, RUNS)
    assert sum(kept) == x.numel() + own.A.numel() + own.B.numel()


def test_stacked_blocks_are_the_blocks_of_each_matrix() -> None:
    own, runs = problem(11, 13, RANKS).partition, problem(11, 13, RANKS, "contiguous").partition
    mixed = Blocks(runs.row_labels, own.col_labels, len(RANKS)), Blocks(own.row_labels, runs.col_labels, len(RANKS))
    cases: list[Any] = [own, runs, *mixed]
    rows, cols = (torch.stack([getattr(case, side) for case in cases]) for side in ("row_labels", "col_labels"))
    for own, expected in zip(stacked_blocks(rows, cols, len(RANKS)), cases, strict=True):
        assert isinstance(own, Blocks)
        assert torch.equal(own.row_labels, expected.row_labels)
        assert torch.equal(own.col_labels, expected.col_labels)
        assert own.is_contiguous == expected.is_contiguous
        assert all(torch.equal(a, b) for a, b in zip(own.orders, Orders(*expected.orders), strict=True))


def test_batched_and_repeated_gradients_are_the_oracles() -> None:
    own, cases, matrices = stack()
    x, run = torch.randn(2, 13, dtype=torch.float64, requires_grad=True), Run(1, slice(0, 2))
    leaves, g = [x, cases[2].A, cases[2].B], torch.randn(4, 2, 11, dtype=torch.float64)
    y, expected = own.apply(x, matrices, [run])[:, 0], x @ cases[2].oracle("hadamard", 0.5).T
    batched = [torch.autograd.grad(out, leaves, g, is_grads_batched=True, retain_graph=True) for out in (y, expected)]
    (first, second) = (
        torch.autograd.grad(out.square().sum(), leaves[1], create_graph=True)[0] for out in (y, expected)
    )
    repeated = [torch.autograd.grad(out.square().sum(), leaves) for out in (first, second)]
    for found, oracles in zip(*batched, strict=True):
        assert_close(found, oracles)
    for found, oracles in zip(*repeated, strict=True):
        assert_close(found, oracles)


K = 3


def matrices() -> torch.Tensor:
    return torch.randn(4, 2, 11, 13, dtype=torch.float64)


def test_each_matrix_gets_the_oracles_partition_of_it() -> None:
    weights = matrices()
    rows, cols = stack_partition(weights, K, "spectral", spectral_scores)
    found = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert found == [reference.spectral_labels(weight, K) for weight in weights.flatten(0, 1)]
    assert rows.dtype == torch.uint8


def test_contiguous_blocks_decompose_nothing() -> None:
    def refuse(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a weight was decomposed")

    rows, cols = stack_partition(matrices(), K, "contiguous", refuse)
    assert all(row == reference.contiguous_labels(11, K) for row in rows.tolist())
    assert all(col == reference.contiguous_labels(13, K) for col in cols.tolist())


# where a parameter holds the matrices


E, M, N = 3, 4, 5


def module(name: str, *shape: int, kind: str = "Experts", **marks: bool) -> Any:
    found: Any = type(kind, (nn.Module,), {})()
    found.register_parameter(name, nn.Parameter(torch.randn(shape)))
    for mark, value in marks.items():
        setattr(found, mark, value)
    return found


def outputs(layout: Layout, parameter: Tensor, x: Tensor, expert: int) -> Tensor:
    """The model's own product with one expert's part of the parameter."""
    part = parameter[expert] if layout.is_stack else parameter
    return x @ part if layout.transposed else x @ part.T


@pytest.mark.parametrize(
    ("name", "shape", "kind", "marks", "expected"),
    [
        ("down_proj", (E, M, N), "Experts", {}, Layout(E, 1, M, N)),
        ("gate_up_proj", (E, 2 * M, N), "Experts", {"is_transposed": False}, Layout(E, 2, M, N)),
        ("gate_up_proj", (E, N, 2 * M), "Llama4TextExperts", {}, Layout(E, 2, M, N, transposed=True)),
        ("gate_up_proj", (E, N, 2 * M), "FSDPLlama4TextExperts", {}, Layout(E, 2, M, N, transposed=True)),
        ("gate_up_proj", (E, N, 2 * M), "GptOssExperts", {}, Layout(E, 2, M, N, transposed=True, interleaved=True)),
        (
            "gate_up_proj",
            (E, N, 2 * M),
            "Experts",
            {"is_transposed": True, "is_concatenated": False},
            Layout(E, 2, M, N, transposed=True, interleaved=True),
        ),
        ("down_proj", (E, N, M), "GptOssExperts", {}, Layout(E, 1, M, N, transposed=True)),
        ("weight", (M, N), "Linear", {}, Layout(1, 1, M, N, is_stack=False)),
    ],
)
def test_each_layout_is_found_and_its_matrices_give_the_models_outputs(
    name: str, shape: tuple[int, ...], kind: str, marks: dict[str, bool], expected: Layout
) -> None:
    owner = module(name, *shape, kind=kind, **marks)
    layout, parameter = Layout.of(owner, name), getattr(owner, name).detach()
    assert layout == expected
    matrices, x = layout.matrices(parameter), torch.randn(6, N)
    assert matrices.shape == (layout.experts, layout.halves, M, N)
    assert matrices.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    for expert in range(layout.experts):
        of_halves = torch.stack([x @ matrix.T for matrix in matrices[expert]], dim=1)
        torch.testing.assert_close(layout.join(of_halves), outputs(layout, parameter, x, expert))
    if layout.interleaved:  # gate and up by turns
        assert torch.equal(matrices[1, 0], parameter[1, :, 0::2].T)
        assert torch.equal(matrices[1, 1], parameter[1, :, 1::2].T)
