"""Where parameters hold the matrices of experts, and their partitions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoa.layers.partition import PartitionSpec
from smoa.maths.experts import Layout
from tests import reference
from tests.support.decompositions import NoDecomposition

K = 3


def test_each_matrix_gets_the_oracles_partition_of_it() -> None:
    weights = torch.randn(4, 2, 11, 13, dtype=torch.float64)
    rows, cols, _ = PartitionSpec("spectral", "hadamard", "lora").decide(K, weights)
    found = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert found == [reference.spectral_labels(weight, K) for weight in weights.flatten(0, 1)]
    assert rows.dtype == torch.uint8
    with NoDecomposition():
        rows, cols, _ = PartitionSpec("contiguous", "hadamard", "lora").decide(K, weights)
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
