"""Scores are those of a full decomposition, on every device, and partitions are cut from them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoa import SmoaConfig, clear_spectrum_cache
from smoa.adapter import decided_partition
from smoa.errors import ConfigError
from smoa.spectrum import (
    decomposition_device,
    labels_from_scores,
    make_partition,
    spectral_scores,
)
from tests import oracle
from tests.support.layers import assert_close
from tests.support.watch import NoDecomposition, limited_device

SHAPES = [(24, 24), (40, 16), (16, 40), (7, 5), (1, 6), (6, 1)]


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same_scores(weight: Tensor) -> None:
    for actual, expected in zip(spectral_scores(weight), oracle.scores(weight), strict=True):
        assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_those_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    assert_same_scores(doubles(*shape))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_coordinate_without_energy_scores_zero(shape: tuple[int, int]) -> None:
    weight = doubles(*shape)
    weight[[3, 7, 8]] = 0
    weight[:, [0, 5]] = 0
    row_scores, col_scores = spectral_scores(weight)
    assert (row_scores[[3, 7, 8]] == 0).all()
    assert (col_scores[[0, 5]] == 0).all()
    assert_same_scores(weight)


@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=40), num_blocks=st.integers(1, 5))
def test_labels_are_cut_from_a_stable_order(scores: list[float], num_blocks: int) -> None:
    assert labels_from_scores(torch.tensor(scores), num_blocks).tolist() == oracle.labels(scores, num_blocks)


@pytest.mark.parametrize("num_blocks", [1, 3, 7])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (7, 9)])
def test_the_spectral_partition_is_that_of_a_full_decomposition(shape: tuple[int, int], num_blocks: int) -> None:
    weight = doubles(*shape)
    partition = make_partition(weight, num_blocks)
    expected_rows, expected_cols = oracle.spectral_labels(weight, num_blocks)
    assert partition.row_labels.tolist() == expected_rows
    assert partition.col_labels.tolist() == expected_cols


def test_an_unknown_kind_of_partition_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'contigous' must be one of .*'spectral'"):
        make_partition(torch.eye(4), 2, "contigous")  # type: ignore[arg-type]


def test_the_random_partition_follows_the_seed() -> None:
    weight = torch.randn(40, 30)
    first, second = make_partition(weight, 4, "random"), make_partition(weight, 4, "random")
    torch.manual_seed(0)
    torch.randn(40, 30)
    again = make_partition(weight, 4, "random")
    assert not torch.equal(first.row_labels, second.row_labels)
    assert torch.equal(first.row_labels, again.row_labels)
    assert torch.equal(first.col_labels, again.col_labels)


@pytest.mark.parametrize("kind", ["contiguous", "random"])
def test_only_the_spectral_partition_decomposes(kind: str) -> None:
    weight = torch.randn(12, 10)
    with NoDecomposition():
        make_partition(weight, 3, kind)
        with pytest.raises(AssertionError, match="no decomposition is allowed"):
            make_partition(weight, 3, "spectral")


@pytest.mark.parametrize("kind", ["spectral", "contiguous", "random"])
def test_blocks_cover_every_coordinate_once_in_ascending_order(kind: str) -> None:
    partition = make_partition(torch.randn(23, 17), 5, kind)
    if kind == "contiguous":
        assert partition.row_labels.tolist() == oracle.contiguous_labels(23, 5)
        assert partition.col_labels.tolist() == oracle.contiguous_labels(17, 5)
    rows, cols = [partition.rows(k) for k in range(5)], [partition.cols(k) for k in range(5)]
    assert all(torch.equal(block, block.sort().values) for block in rows + cols)
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(23))
    assert torch.equal(torch.cat(cols).sort().values, torch.arange(17))
    assert [len(block) for block in rows] == oracle.block_sizes(23, 5)
    assert [len(block) for block in cols] == oracle.block_sizes(17, 5)


@pytest.mark.parametrize(("gap", "decompositions"), [(1e-7, 2), (0.0, 1), (0.5, 1)])
def test_a_cut_between_scores_that_float32_cannot_tell_apart_is_decided_precisely(
    gap: float, decompositions: int
) -> None:
    asked = []

    def scores_of(weight: Tensor, precise: bool) -> tuple[Tensor, Tensor]:
        asked.append(precise)
        rows = torch.tensor([0.0, 0.25, 0.25 + gap, 0.9])
        return (rows.flip(0) if precise else rows), torch.arange(4.0)

    partition = make_partition(torch.eye(4), 2, scores_of=scores_of)
    assert asked == [False, True][:decompositions]
    assert partition.row_labels.tolist() == ([1, 1, 0, 0] if decompositions == 2 else [0, 0, 1, 1])


def test_precise_scores_of_a_float32_weight_are_nearer_to_those_of_float64() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.linspace(0.01, 1, 200)
    exact = spectral_scores(weight.double())
    errors = [
        max((found.double() - true).abs().max().item() for found, true in zip(scores, exact, strict=True))
        for scores in (spectral_scores(weight), spectral_scores(weight, precise=True))
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("scale", [1e-15, 1e-5, 1e15])
def test_the_partition_does_not_depend_on_the_scale_of_a_float32_weight(scale: float) -> None:
    # a power of two, so that the entries are the same numbers
    factor = 2.0 ** torch.tensor(scale).log2().round().item()
    weight = torch.randn(12, 10) * 0.5
    expected, found = make_partition(weight, 3), make_partition(weight * factor, 3)
    assert torch.equal(found.row_labels, expected.row_labels)
    assert torch.equal(found.col_labels, expected.col_labels)


def test_a_full_device_is_not_taken_for_one_that_lacks_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("full")

    decomposition_device.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", full)
        with pytest.raises(torch.OutOfMemoryError):
            decomposition_device(torch.device("cpu"))
    assert decomposition_device(torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partition", ["spectral", "contiguous"])
def test_what_injection_computes_from_a_weight_is_that_of_the_cpu(partition: str, dtype: torch.dtype) -> None:
    config = SmoaConfig(partition=partition)
    weight = torch.randn(11, 13).to(dtype)
    expected = decided_partition(3, weight, config, 0)
    with limited_device() as device:
        found = decided_partition(3, weight.to(device), config, 0)
    for own, theirs in zip(found, expected, strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_scores_are_computed_at_the_highest_precision_whatever_the_model_has(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: with TF32 some labels differ, and they are cached by the weight alone."""
    seen = []
    original = torch.linalg.eigh

    def eigh(*args: Any, **kwargs: Any) -> Any:
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return original(*args, **kwargs)

    known = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    torch.set_float32_matmul_precision(precision)
    try:
        before = torch.backends.cuda.matmul.fp32_precision
        spectral_scores(torch.randn(12, 9))
        assert seen[-1:] == [("ieee", "ieee")]  # the first of a process asks what the device can
        assert torch.backends.cuda.matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision(known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partition", ["spectral", "of_products"])
def test_autocast_changes_no_partition(partition: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_products(weight: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        rows, cols = (weight @ weight.sum(0), weight.T @ weight.sum(1))
        return labels_from_scores(rows, num_blocks), labels_from_scores(cols, num_blocks)

    monkeypatch.setattr("smoa.spectrum._registered", {"of_products": of_products})
    weight, config = torch.randn(256, 192), SmoaConfig(partition=partition)
    expected = decided_partition(16, weight, config, 0)
    clear_spectrum_cache()
    with torch.autocast("cpu", dtype):
        found = decided_partition(16, weight, config, 0)
    assert all(map(torch.equal, found, expected))
