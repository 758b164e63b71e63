"""What is held at once while adapters are made, merged and loaded, in bytes of tensors, on small shapes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smoa import SmoaConfig, clear_spectrum_cache
from smoa.layers import merging
from smoa.layers.adapter import labels_and_scales
from smoa.maths import spectrum
from smoa.maths.kernels import one_product
from smoa.maths.kernels.blocks import SCRATCH
from tests.support.live_bytes import LiveBytes

SMALL = 1.1
"""Vectors, tiles of rows and factors, which are no small part at these shapes, are allowed a tenth of a matrix."""


@pytest.fixture(autouse=True)
def _tiles_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tiles of rows as a large weight has."""
    monkeypatch.setattr(spectrum, "ROW_TILE", 32)
    monkeypatch.setattr(one_product, "PIECE", 1)
    monkeypatch.setattr(merging, "LOSS_ROWS", 16)
    clear_spectrum_cache()


class TwoLayers(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(384, 512, bias=False, dtype=dtype) for _ in range(2))


def adapted(base: TwoLayers, partition: str = "contiguous", r: int = 8) -> PeftModel:
    config = SmoaConfig(r=r, num_blocks=4, partition=partition, target_modules=["first", "second"], init_weights=False)
    return get_peft_model(base, config)


@pytest.mark.parametrize("shape", [(512, 512), (1024, 384), (384, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("close", "most"), [(0.0, 3), (1e9, 6)], ids=["float32", "on in float64"])
def test_making_an_adapter_holds_few_copies_of_the_larger_of_weight_and_gram_matrix(
    close: float, most: int, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "CLOSE_SCORES", close)
    weight = (0.02 * torch.randn(shape)).to(dtype)
    with LiveBytes(weight) as held:
        labels_and_scales(4, weight, ("spectral", None, "hadamard", 0))
    assert held.peak <= (most + SMALL - 1) * 4 * weight.numel()
    assert held.peak >= 4 * min(shape) ** 2  # the Gram matrix was counted


def test_making_a_model_s_adapter_takes_no_more_than_its_largest_layer() -> None:
    model = TwoLayers(torch.bfloat16)
    with LiveBytes(*model.parameters()) as held:
        adapted(model, "spectral")
    assert held.peak <= (3 + SMALL - 1) * 4 * 384 * 512
    assert held.live <= 0.1 * 4 * 384 * 512  # factors and labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_by_layers_takes_one_matrix_beside_the_blocks_that_it_keeps(dtype: torch.dtype) -> None:
    model = adapted(TwoLayers(dtype))
    matrix = 384 * 512 * dtype.itemsize
    model.merge_adapter()  # the buffer of a piece stays
    model.unmerge_adapter()
    with LiveBytes(*model.parameters(), *SCRATCH.buffers.values()) as held:
        model.merge_adapter()
    kept = 2 * matrix / 4
    assert held.peak <= kept + matrix * (1.25 if dtype == torch.bfloat16 else SMALL)
    assert held.live <= kept + 0.1 * matrix
    with LiveBytes(*model.parameters()) as held:
        model.unmerge_adapter()
    assert held.peak <= 0.1 * matrix


def test_loading_takes_the_file_and_the_adapter_and_nothing_of_the_weight_s_size(tmp_path: Path) -> None:
    adapted(TwoLayers(torch.float32), r=64).save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").stat().st_size
    base = TwoLayers(torch.float32)
    with LiveBytes(*base.parameters()) as held:
        PeftModel.from_pretrained(base, tmp_path)
    assert held.live <= 1.3 * file  # with the labels in order
    of_a_block = base.first.weight.nbytes / 4**2  # in float32, of which the size is compared with the file's
    assert held.peak <= 2.3 * file + 2 * of_a_block <= 0.6 * base.first.weight.nbytes
