from __future__ import annotations

import pytest
import torch

from smoa.layers.buffers import PartitionSpec
from smoa.maths import spectrum
from smoa.maths.analysis import update_spectrum
from smoa.maths.spectrum import PartitionKind, decomposable, decomposition_device, make_partition, spectral_scores
from smoa.state import cached_spectral_scores
from tests.support.limited_device import DEVICE, limited_device
from tests.support.tolerance import assert_close


def test_a_matrix_is_decomposed_where_it_is_if_its_device_can() -> None:
    matrix = torch.randn(3, 2)
    assert decomposable(matrix) is matrix
    assert decomposition_device(matrix) == matrix.device


def test_a_device_without_float64_and_decompositions_leaves_them_to_the_cpu() -> None:
    matrix = torch.randn(5, 4)
    with limited_device() as device:
        there = matrix.to(device)
        with pytest.raises(TypeError, match="float64"):
            there.double()
        with pytest.raises(NotImplementedError, match="eigh"):
            torch.linalg.eigh(there.T @ there)
        assert decomposition_device(there) == torch.device("cpu")
        assert torch.equal(decomposable(there), matrix)


def test_a_full_device_is_not_taken_for_one_that_lacks_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("full")

    spectrum._decomposes.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", full)
        with pytest.raises(torch.OutOfMemoryError):
            decomposable(torch.eye(2))
    assert decomposable(torch.eye(2)).device.type == "cpu"


@pytest.mark.parametrize("cut", ["clear", "close"])
@pytest.mark.parametrize("shape", [(17, 12), (12, 17)])
def test_the_partition_is_that_of_the_cpu(shape: tuple[int, int], cut: str) -> None:
    weight = torch.randn(shape)
    if cut == "close":  # rows that float32 cannot separate: decided again in float64
        weight[1::2] = weight[::2][: len(weight[1::2])] * (1 + 1e-7)
    expected = make_partition(weight, 3)
    with limited_device() as device:
        for scores_of in (spectral_scores, cached_spectral_scores):
            found = make_partition(weight.to(device), 3, "spectral", scores_of)
            assert found.row_labels.device == found.col_labels.device == DEVICE
            assert torch.equal(found.row_labels.cpu(), expected.row_labels)
            assert torch.equal(found.col_labels.cpu(), expected.col_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partition", ["spectral", "contiguous"])
def test_what_injection_computes_from_a_weight_is_that_of_the_cpu(partition: PartitionKind, dtype: torch.dtype) -> None:
    weight, pending = torch.randn(11, 13).to(dtype), PartitionSpec(partition, "hadamard", "lora")
    expected = pending.decide(3, weight)
    with limited_device() as device:
        found = pending.decide(3, weight.to(device))
    for own, theirs in zip(found, expected, strict=True):
        assert torch.equal(own, theirs)


@torch.no_grad()
def test_an_update_is_analysed_on_the_cpu() -> None:
    weight, delta = torch.randn(9, 7), torch.randn(9, 7)
    expected = update_spectrum(weight, delta)
    with limited_device() as device:
        found = update_spectrum(weight.to(device), delta.to(device))
    assert_close(found.update_values, expected.update_values, torch.float32)
    assert_close(found.input_energy, expected.input_energy, torch.float32)
