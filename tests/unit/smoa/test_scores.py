from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smoa import SmoaConfig, clear_spectrum_cache, make_partition, scores
from smoa.scores import CACHE_VARIABLE, cached_spectral_scores
from tests.support.layers import adapted_layer, base_layer


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    clear_spectrum_cache()


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each decomposition that has run."""
    ran: list[int] = []
    eigh = torch.linalg.eigh

    def counting(matrix: torch.Tensor, **kwargs: str) -> object:
        ran.append(len(matrix))
        return eigh(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    return ran


def test_a_second_adapter_with_another_number_of_blocks_costs_no_decomposition(decompositions: list[int]) -> None:
    layer = adapted_layer(base_layer(24, 20), num_blocks=2)
    layer.update_layer("other", SmoaConfig(r=6, num_blocks=5))
    assert len(decompositions) == 1
    expected = make_partition(layer.pristine_weight(), 5)
    assert torch.equal(layer.blocks("other").row_labels, expected.row_labels)
    assert torch.equal(layer.blocks("other").col_labels, expected.col_labels)


def test_a_changed_weight_is_decomposed_anew(decompositions: list[int]) -> None:
    weight = torch.randn(9, 7)
    cached_spectral_scores(weight)
    weight.data[0, 0] += 1
    cached_spectral_scores(weight)
    assert len(decompositions) == 2
    rows, cols = cached_spectral_scores(weight.reshape(7, 9))
    assert (len(rows), len(cols)) == (7, 9)


def test_a_folder_saves_the_next_process_the_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decompositions: list[int]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "spectra"))
    weight = torch.randn(12, 10, dtype=torch.float64)
    first = cached_spectral_scores(weight)
    clear_spectrum_cache()
    second = cached_spectral_scores(weight)
    assert len(decompositions) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [path.suffix for path in (tmp_path / "spectra").iterdir()] == [".safetensors"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa.scores.MEMORY_LIMIT", 200)
    for _ in range(5):
        cached_spectral_scores(torch.randn(10, 10))
    assert len(scores._memory) <= 2


@pytest.mark.parametrize(
    "other", [None, {"row_scores": torch.zeros(12)}, {name: torch.zeros(7) for name in ("row_scores", "col_scores")}]
)
def test_a_cache_file_that_is_broken_or_of_another_weight_is_replaced(
    other: dict[str, torch.Tensor] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decompositions: list[int]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    weight = torch.randn(12, 10)
    first = cached_spectral_scores(weight)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if other is None:
        file.write_bytes(whole[:20])
    else:
        save_file(other, file)
    clear_spectrum_cache()
    assert all(torch.equal(a, b) for a, b in zip(cached_spectral_scores(weight), first, strict=True))
    assert len(decompositions) == 2
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decompositions: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="SMOA_SPECTRUM_CACHE: can't write scores to .*file"):
        cached_spectral_scores(torch.randn(12, 10))
    assert len(decompositions) == 1
