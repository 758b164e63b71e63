"""The partition is part of the saved adapter: loading decides nothing anew and adds nothing else to the file."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor

from smoa import AdapterFileError, SmoaConfig
from smoa.adapter import make_blocks
from smoa.compat import PREFIX
from smoa.layer import SmoaLayer
from tests import oracle
from tests.support import tiny
from tests.support.layers import (
    adapted_layer,
    add_adapter,
    assert_path,
    base_layer,
    base_weight,
    default_dtype,
    factors,
    labels,
    layer_13_to_11,
    randomise,
    smoa_layers,
)
from tests.support.watch import gathers

CONFIG = {"r": 5, "num_blocks": 3, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def trained_llama(family: str = "llama", **config: object) -> PeftModel:
    model = get_peft_model(tiny.build(family), SmoaConfig(**{**CONFIG, **config}))
    for layer in smoa_layers(model).values():
        randomise(layer)
    return model.eval()


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_the_file_holds_factors_labels_and_scales_and_nothing_else(tmp_path: Path) -> None:
    model = trained_llama()
    tensors = load_file(saved(model, tmp_path) / "adapter_model.safetensors")
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, layer in smoa_layers(model).items():
        A_shape, B_shape = oracle.factor_shapes(layer.out_features, layer.in_features, 3, 5)
        expected[f"{PREFIX}{name}.smoa_A.weight"] = (A_shape, torch.float32)
        expected[f"{PREFIX}{name}.smoa_B.weight"] = (B_shape, torch.float32)
        expected[f"{PREFIX}{name}.smoa_row_labels"] = ((layer.out_features,), torch.uint8)
        expected[f"{PREFIX}{name}.smoa_col_labels"] = ((layer.in_features,), torch.uint8)
        expected[f"{PREFIX}{name}.smoa_block_scale"] = ((3,), torch.float32)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == expected
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)


def test_an_adapter_made_from_a_saved_config_alone_decides_its_labels_at_its_first_use(tmp_path: Path) -> None:
    config = SmoaConfig.from_pretrained(saved(trained_llama(), tmp_path / "first"))
    model = get_peft_model(tiny.build("llama"), config)
    model(**tiny.batch("llama"))
    tensors = load_file(saved(model, tmp_path / "second") / "adapter_model.safetensors")
    for name, layer in smoa_layers(model).items():
        own = tensors[f"{PREFIX}{name}.smoa_row_labels"].tolist(), tensors[f"{PREFIX}{name}.smoa_col_labels"].tolist()
        assert own == oracle.spectral_labels(base_weight(layer), 3)


def test_the_labels_of_a_model_adapted_on_the_meta_device_are_decided_once_weights_are_there() -> None:
    with torch.device("meta"):
        model = get_peft_model(tiny.llama(), SmoaConfig(**CONFIG))
    real = tiny.build("llama").state_dict()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            tensor.copy_(real.get(own, torch.ones_like(tensor)))
    for layer in smoa_layers(model).values():
        expected = oracle.spectral_labels(base_weight(layer), 3)
        partition = layer.blocks("default")
        assert (partition.row_labels.tolist(), partition.col_labels.tolist()) == expected


def as_fsdp1(layer: Any) -> None:
    scale = layer.smoa_block_scale["default"]
    scale.data = scale.bfloat16()


CASTS = {
    "in place, as FSDP1 does": as_fsdp1,
    "half": lambda layer: layer.half(),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "to": lambda layer: layer.to(torch.bfloat16),
    "of the buffer alone": lambda layer: layer.smoa_block_scale.bfloat16(),
    "moved by PEFT": lambda layer: layer._move_adapter_to_device_of_base_layer("default"),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_scale_of_a_block_is_not_rounded(cast: str) -> None:
    layer = adapted_layer(base_layer(12, 8, dtype=torch.bfloat16), r=4, num_blocks=2, scale="layer")
    before = layer.decided("default").block_scale.clone()
    assert not torch.equal(before, before.bfloat16().float())
    CASTS[cast](layer)
    assert layer.state_dict()["smoa_block_scale.default"].dtype == torch.float32
    assert torch.equal(layer.state_dict()["smoa_block_scale.default"], before)
    assert torch.equal(layer.decided("default").block_scale, before)
    assert torch.equal(layer.decided("default").rank_scale, before.repeat_interleave(2))


def test_scales_that_fsdp1_has_rounded_are_saved_as_they_were_trained_and_loaded_so(tmp_path: Path) -> None:
    model, other = trained_llama(), trained_llama(partition="random")
    expected = model(**tiny.batch("llama")).logits
    for layer in (*smoa_layers(model).values(), *smoa_layers(other).values()):
        as_fsdp1(layer)
    assert torch.equal(model(**tiny.batch("llama")).logits, expected)
    tensors = load_file(saved(model, tmp_path) / "adapter_model.safetensors")
    scales = [tensor for name, tensor in tensors.items() if "block_scale" in name]
    assert {scale.dtype for scale in scales} == {torch.float32}
    assert any(not torch.equal(scale, scale.bfloat16().float()) for scale in scales)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))  # whose buffers are rounded, too
    for again in (other, PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()):
        assert torch.equal(again(**tiny.batch("llama")).logits, expected)


def test_blocks_leave_with_the_last_adapter_that_has_them() -> None:
    layer = adapted_layer(base_layer(12, 8), r=4, num_blocks=2, partition="random")
    left = weakref.ref(layer.blocks("default"))
    layer.delete_adapter("default")
    gc.collect()
    assert left() is None


def test_labels_stay_in_memory_where_a_layer_is_moved_to_the_meta_device() -> None:
    layer = adapted_layer(base_layer(12, 8), r=4, num_blocks=2)
    known = layer.smoa_row_labels["default"].clone()
    layer.to("meta")
    assert torch.equal(layer.smoa_row_labels["default"], known)


def test_a_whole_model_is_saved_and_loaded_by_safetensors(tmp_path: Path) -> None:
    config = SmoaConfig(r=4, target_modules=["q_proj"], init_weights=False)
    saved, loaded = (get_peft_model(tiny.build("llama"), config).eval() for _ in range(2))
    layer = saved.base_model.model.model.layers[0].self_attn.q_proj
    as_fsdp1(layer)
    save_model(saved, tmp_path / "model.safetensors")  # as accelerate's save_model and load_state do
    load_model(loaded, tmp_path / "model.safetensors")
    batch = tiny.batch("llama")
    assert torch.equal(loaded(**batch).logits, saved(**batch).logits)


@pytest.mark.parametrize(
    ("partition", "dtype"), [("spectral", torch.bfloat16), ("spectral", torch.float64), ("random", torch.float16)]
)
def test_injecting_and_loading_do_not_depend_on_the_default_dtype(
    tmp_path: Path, partition: str, dtype: torch.dtype
) -> None:
    model, batch = trained_llama(partition=partition), tiny.batch("llama")
    folder = saved(model, tmp_path)
    bases = [tiny.build("llama") for _ in range(2)]
    with default_dtype(dtype):
        injected = get_peft_model(bases[0], SmoaConfig(**CONFIG, partition=partition))
        loaded = PeftModel.from_pretrained(bases[1], folder).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    usual = smoa_layers(get_peft_model(tiny.build("llama"), SmoaConfig(**CONFIG, partition=partition)))
    for name, layer in smoa_layers(injected).items():
        assert layer.decided("default").block_scale.dtype == torch.float32
        scale, usual_scale = (each.decided("default").block_scale for each in (layer, usual[name]))
        assert partition == "random" or torch.equal(scale, usual_scale)
        assert partition == "random" or labels(layer) == labels(usual[name])


def test_an_adapter_loaded_in_inference_mode_can_be_trained() -> None:
    model, other = trained_llama(), trained_llama(partition="random")
    with torch.inference_mode():
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    model.train()(**tiny.batch("llama")).loss.backward()
    for name, layer in smoa_layers(model).items():
        assert labels(layer) == labels(smoa_layers(other)[name])
        assert all(factor.grad is not None for factor in factors(layer))


# contiguous blocks are slices: nothing is gathered or scattered


def step(layer: SmoaLayer, x: Tensor) -> None:
    layer(x).square().sum().backward()


def contiguous(dtype: torch.dtype = torch.float64, **config: object) -> tuple[SmoaLayer, Tensor]:
    layer = layer_13_to_11(dtype=dtype, **{"partition": "contiguous"} | config)
    return layer, torch.randn(2, 5, 13, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("partition", ["contiguous", "spectral"])
@pytest.mark.parametrize(
    ("route", "dtype", "conv1d"),
    [("one product", torch.float64, False), ("apart", torch.float64, True), ("apart", torch.bfloat16, False)],
)
def test_a_training_step_gathers_nothing_of_contiguous_blocks(
    monkeypatch: pytest.MonkeyPatch, route: str, dtype: torch.dtype, conv1d: bool, partition: str
) -> None:
    layer, x = contiguous(dtype, route=route, conv1d=conv1d, partition=partition)
    with gathers(monkeypatch) as found:
        step(layer, x)
    assert bool(found) is (partition == "spectral")


def test_labels_that_happen_to_ascend_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = contiguous(partition="random", route="apart", other_base=True)
    rows, cols, scale = layer.partition_of("default")
    layer.set_partition("default", (rows.sort().values, cols.sort().values, scale))
    layer.decided("default")
    with gathers(monkeypatch) as found:
        step(layer, x)
    assert not found
    assert_path(layer, layer(x), x)
    for number in range(2):  # one side alone
        partition = [*layer.partition_of("default")]
        partition[number] = partition[number].roll(1)
        layer.set_partition("default", partition)
        assert_path(layer, layer(x), x)


def test_a_loaded_adapter_shares_blocks_with_one_of_equal_rows_and_columns_alone() -> None:
    layer = adapted_layer(base_layer(12, 8), r=4, num_blocks=2, partition="contiguous", other_base=True)
    add_adapter(layer, "second", r=4, num_blocks=2, partition="contiguous", other_base=True)
    assert layer.blocks("second") is layer.blocks("default")
    state = layer.state_dict()
    layer.load_state_dict(state | {"smoa_col_labels.second": state["smoa_col_labels.second"].flip(0)})
    assert torch.equal(layer.blocks("second").col_labels, layer.smoa_col_labels["second"])


def test_blocks_that_are_made_again_keep_the_scales_that_fsdp1_has_rounded() -> None:
    layer = adapted_layer(base_layer(12, 8, dtype=torch.bfloat16), r=4, num_blocks=2, scale="layer")
    before = layer.adapters["default"].block_scale.clone()
    as_fsdp1(layer)
    make_blocks(layer, "default")  # as on another device
    assert torch.equal(layer.adapters["default"].block_scale, before)


def test_an_adapter_that_is_set_and_not_loaded_is_compared_with_the_base_at_its_first_use() -> None:
    """As transformers 5 sets the buffers of an adapter that it loads."""
    known, layer = (adapted_layer(base_layer(12, 8), r=4, num_blocks=2) for _ in range(2))
    layer.set_partition("default", known.partition_of("default"))
    with torch.no_grad():
        base_weight(layer).copy_(3 * base_weight(known))
    with pytest.raises(AdapterFileError, match="another base"):
        layer.blocks("default")


def test_an_adapter_may_be_called_like_an_attribute_of_what_keeps_its_labels() -> None:
    layer = adapted_layer(base_layer(12, 8), "persistent", r=4, num_blocks=2)
    add_adapter(layer, "take_loaded", r=4, num_blocks=2)
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.blocks("persistent").row_labels, layer.blocks("take_loaded").row_labels)
