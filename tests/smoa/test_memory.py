"""What is held at once while adapters are made, trained, merged and loaded, on small shapes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import SmoaConfig, clear_spectrum_cache, spectrum
from smoa.adapter import decided_partition
from smoa.kernels import one_product
from smoa.kernels.blocks import SCRATCH
from tests.support.layers import BITSANDBYTES, ROUTES, adapted_layer, add_adapter, base_layer, factors, quantized_layer
from tests.support.watch import LiveBytes

SMALL = 1.1
"""Vectors, tiles of rows and factors, which are no small part at these shapes, are allowed a tenth of a matrix."""


@pytest.fixture(autouse=True)
def _tiles_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tiles of rows as a large weight has."""
    monkeypatch.setattr(spectrum, "ROW_TILE", 32)
    monkeypatch.setattr(one_product, "PIECE", 1)
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
        decided_partition(4, weight, SmoaConfig(), 0)
    assert held.peak <= (most + SMALL - 1) * 4 * weight.numel()
    assert held.peak >= 4 * min(shape) ** 2  # the Gram matrix was counted


def test_the_scores_of_a_tall_weight_take_tiles_of_rows() -> None:
    weight = 0.02 * torch.randn(2048, 128)
    with LiveBytes(weight) as held:
        spectrum.spectral_scores(weight)
    assert held.peak <= 0.6 * weight.nbytes


def test_making_a_model_s_adapter_takes_no_more_than_its_largest_layer() -> None:
    model = TwoLayers(torch.bfloat16)
    with LiveBytes(*model.parameters()) as held:
        adapted(model, "spectral")
    assert held.peak <= (3 + SMALL - 1) * 4 * 384 * 512
    assert held.live <= 0.1 * 4 * 384 * 512  # factors and labels


KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda: base_layer(96, 80, dtype=torch.float32), (4, 80), {}),
    "conv1d of gpt2, dropout": (
        lambda: base_layer(96, 80, conv1d=True, dtype=torch.float32),
        (4, 80),
        {"smoa_dropout": 0.1},
    ),
    "bfloat16, dropout": (lambda: base_layer(96, 80, dtype=torch.bfloat16), (4, 80), {"smoa_dropout": 0.1}),
    "autocast": (lambda: base_layer(96, 80, dtype=torch.bfloat16), (4, 80), {}),
    "without modulation": (lambda: base_layer(96, 80, dtype=torch.float32), (4, 80), {"modulation": "none"}),
    "convolution": (lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 4, 4), {}),
    **{kind: (partial(quantized_layer, kind, 96, 128), (4, 128), {}) for kind in BITSANDBYTES},
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("how", [*ROUTES, "by names"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward(case: str, how: str) -> None:
    make, shape, settings = KEPT[case]
    layer = adapted_layer(make(), r=2, num_blocks=2, route=how if how in ROUTES else None, **settings).train()
    add_adapter(layer, "other", r=2, num_blocks=2, **settings)
    layer.set_adapter("default")
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    dtype = torch.float32 if case == "autocast" else next(layer.smoa_A.parameters()).dtype
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[id(tensor)] = tensor.numel()
        return tensor

    options = {"adapter_names": ["default", "other", "default", "other"][: len(x)]} if how == "by names" else {}
    rounded = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with rounded, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x, **options)
    assert y.requires_grad
    small = 4 * (x.numel() + y.numel() + sum(factor.numel() for factor in factors(layer)))
    assert sum(kept.values()) <= small < layer.out_features * layer.in_features


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
