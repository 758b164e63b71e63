"""Updates of a stack of matrices."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.adapter import decided_partition
from smoa.experts import Layout
from smoa.kernels import stack as stacks
from smoa.kernels.stack import Side, Stack
from tests import oracle
from tests.support.layers import Problem, assert_close, problem
from tests.support.watch import NoDecomposition

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


def outputs_of(cases: list[Problem], x: Tensor, ends: list[int]) -> Tensor:
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
    y, expected = own.apply(x.to(dtype), matrices, torch.tensor(ends).int()), outputs_of(cases, x, ends)
    assert_close(y, expected)
    g = torch.randn_like(expected)
    of_x, of_A, of_B = torch.autograd.grad(y, [x, own.A, own.B], g.to(dtype))
    leaves = [factor for case in cases for factor in (case.A, case.B)]
    of_oracle, *of_leaves = torch.autograd.grad(expected, [x, *leaves], g, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if found is None else found for leaf, found in zip(leaves, of_leaves, strict=True)]
    assert_close(of_x, of_oracle, dtype)
    assert_close(of_A, torch.cat(zeros[::2]))
    assert_close(of_B, torch.cat(zeros[1::2], dim=1))


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


# each matrix, and where a parameter holds it

K = 3


def test_each_matrix_gets_the_oracles_partition_of_it() -> None:
    weights = torch.randn(4, 2, 11, 13, dtype=torch.float64)
    rows, cols, _ = decided_partition(K, weights, SmoaConfig(partition="spectral"), 0)
    found = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert found == [oracle.spectral_labels(weight, K) for weight in weights.flatten(0, 1)]
    assert rows.dtype == torch.uint8
    with NoDecomposition():
        rows, cols, _ = decided_partition(K, weights, SmoaConfig(partition="contiguous"), 0)
    assert all(row == oracle.contiguous_labels(11, K) for row in rows.tolist())
    assert all(col == oracle.contiguous_labels(13, K) for col in cols.tolist())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 2])
def test_one_block_of_experts_decodes_and_trains(K: int, dtype: torch.dtype) -> None:
    """E9: grouped_mm refuses the view of a single block."""
    W = torch.randn(4, 1, 16, 16, dtype=dtype)
    rows = cols = Side.of(torch.arange(K, dtype=torch.uint8).repeat_interleave(16 // K).expand(4, 1, 16), K)
    A, B = torch.randn(4 * 2 * K, 16 // K, requires_grad=True), torch.randn(16 // K, 4 * 2 * K, requires_grad=True)
    own = Stack(A, B, (2,) * K, 1.0, torch.ones(4, 2 * K), rows, cols)
    for ends in ([0, 1, 1, 1], [0, 0, 0, 2], [3, 3, 3, 3], [1, 2, 3, 4]):
        x = torch.randn(ends[-1], 16, dtype=dtype)
        y = own.apply(x, W, torch.tensor(ends).int())
        expected = [
            x[start:stop].double() @ own.update(e).delta(W[e, 0]).double().T
            for e, (start, stop) in enumerate(pairwise([0, *ends]))
        ]
        assert_close(y[:, 0], torch.cat(expected), dtype)
        y.sum().backward()


@pytest.mark.skipif(stacks.grouped_mm is None, reason="before PyTorch 2.10")
def test_a_call_of_grouped_mm_has_less_than_1024_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """E10: more are refused in 16 bits on an H100."""
    seen = list[int]()
    original: Any = stacks.grouped_mm

    def counted(*args: Any, offs: Tensor, **kwargs: Any) -> Tensor:
        seen.append(len(offs))
        return original(*args, offs=offs, **kwargs)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        own, _, matrices = make_stack((24, 24), torch.float32)
        x = torch.randn(9, 24, requires_grad=True)
        y = own.apply(x, matrices, torch.tensor([4, 4, 9]).int())
        return [y, *torch.autograd.grad(y.square().sum(), [x, own.A, own.B])]

    monkeypatch.setattr(stacks, "grouped_mm", counted)
    expected = run()
    assert max(seen) == EXPERTS * HALVES * len(RANKS)
    seen.clear()
    monkeypatch.setattr(stacks, "MOST_GROUPS", 7)
    for found, own in zip(run(), expected, strict=True):
        assert_close(found, own)
    assert max(seen) <= 7
    assert stacks.MOST_GROUPS < 1024
