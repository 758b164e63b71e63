"""Every mistake that can be foreseen is refused with its place, value and rule."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import smoa
from smoa import (
    AdapterFileError,
    ConfigError,
    PartitionError,
    SmoaConfig,
    SmoaError,
    UnsupportedModuleError,
    UnsupportedVersionError,
)
from smoa.registration import check_peft_version
from tests.support import tiny_models
from tests.support.adapter_files import rewritten
from tests.support.layers import Wrapper


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r=0\b"),
        ({"r": -3}, r"r=-3\b"),
        ({"r": 2.5}, r"r=2\.5"),
        ({"r": True}, r"r=True"),
        ({"r": "8"}, r"r='8'"),
        ({"num_blocks": 0}, r"num_blocks=0\b"),
        ({"num_blocks": -1}, r"num_blocks=-1\b"),
        ({"num_blocks": 256}, r"num_blocks=256\b.*255"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [8]}, r"block_ranks=\[8\].*num_blocks=2"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [4, 2, 2]}, r"block_ranks=\[4, 2, 2\].*num_blocks=2"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [4, 5]}, r"block_ranks=\[4, 5\].*9.*r=8"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [9, -1]}, r"block_ranks=\[9, -1\]"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [7.5, 0.5]}, r"block_ranks=\[7\.5, 0\.5\]"),
        ({"r": 8, "num_blocks": 2, "block_ranks": 8}, r"block_ranks"),
        ({"alpha": 0}, r"alpha=0\b"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"alpha": float("inf")}, r"alpha=inf"),
        ({"smoa_dropout": 1.0}, r"smoa_dropout=1\.0"),
        ({"smoa_dropout": -0.1}, r"smoa_dropout=-0\.1"),
        ({"partition": "fourier"}, r"partition='fourier'.*spectral.*contiguous.*random"),
        ({"modulation": "sum"}, r"modulation='sum'.*hadamard.*none"),
        ({"bias": "lora_only"}, r"bias='lora_only'.*none.*all.*smoa_only"),
        ({"init_weights": "gaussian"}, r"init_weights='gaussian'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"alpha_pattern": {"q_proj": -2}}, r"alpha_pattern\['q_proj'\]=-2"),
        ({"rank_pattern": {"q_proj": 4}, "r": 2, "block_ranks": [1, 1]}, r"block_ranks.*rank_pattern"),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SmoaConfig(**settings)


def test_every_problem_of_a_config_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"r=0.*num_blocks=0.*smoa_dropout=2.*"):
        SmoaConfig(r=0, num_blocks=0, smoa_dropout=2)


@pytest.mark.parametrize("setting", [{"layers_to_transform": [0]}, {"layers_to_transform": [0], "layers_pattern": "h"}])
def test_choosing_layers_by_index_needs_a_list_of_module_names(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        SmoaConfig(target_modules="q_proj", **setting)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="number_of_blocks"):
        SmoaConfig(number_of_blocks=4)


@pytest.mark.parametrize("partition", ["spectral", "contiguous", "random"])
def test_more_blocks_than_a_layer_has_coordinates_are_refused_by_name(
    tiny_llama: PreTrainedModel, partition: str
) -> None:
    before = {name: type(module) for name, module in tiny_llama.named_modules()}
    config = SmoaConfig(r=32, num_blocks=20, partition=partition, target_modules=["q_proj", "v_proj"])
    with pytest.raises(PartitionError, match=r"layers\.0\.self_attn\.v_proj.*num_blocks=20.*16"):
        get_peft_model(tiny_llama, config)
    assert {name: type(module) for name, module in tiny_llama.named_modules()} == before


SUPPORTED = r"torch\.nn\.Linear.*Conv1D"


class OddModel(nn.Module):
    """Modules of many kinds, some of which other PEFT methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv1 = nn.Conv1d(8, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.conv3 = nn.Conv3d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.lazy = nn.LazyLinear(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("target", ["embedding", "conv1", "conv2", "conv3", "attention", "norm", "bilinear"])
def test_an_unsupported_module_is_refused_by_name_with_what_is_supported(target: str) -> None:
    model = OddModel()
    with pytest.raises(UnsupportedModuleError, match=rf"{target}\b.*{SUPPORTED}"):
        get_peft_model(model, SmoaConfig(r=4, target_modules=[target, "linear"]))
    assert type(model.linear) is nn.Linear


def test_every_unsupported_module_is_told_at_once() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"embedding.*conv1"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["embedding", "conv1"]))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_linear_layer_without_a_weight_yet_is_refused_by_name() -> None:
    with pytest.raises(SmoaError, match="lazy"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["lazy"]))


def test_an_embedding_of_a_language_model_is_refused_by_name(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModuleError, match=rf"embed_tokens.*Embedding.*{SUPPORTED}"):
        get_peft_model(tiny_llama, SmoaConfig(r=4, target_modules=["embed_tokens"]))


def test_a_target_that_is_not_there_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(tiny_llama, SmoaConfig(target_modules=["nowhere"]))


def test_an_architecture_without_defaults_asks_for_target_modules() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(Wrapper(nn.Linear(8, 8)), SmoaConfig())


@pytest.mark.parametrize("version", ["0.18.0", "0.17.1", "0.9.1"])
def test_an_unsupported_version_of_peft_is_refused_with_the_supported_ones(version: str) -> None:
    with pytest.raises(UnsupportedVersionError, match=rf"(?s)>=0\.18\.1.*{version}"):
        check_peft_version(version)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.1", "0.20.0", "0.21.0", "0.21.2", "0.21.99", "0.21.1.dev0"])
def test_a_supported_version_of_peft_is_accepted(version: str) -> None:
    check_peft_version(version)


@pytest.mark.parametrize("version", ["0.22.0", "0.22.0.dev0", "1.0.0"])
def test_a_newer_version_of_peft_is_tried_with_a_warning(version: str) -> None:
    with pytest.warns(UserWarning, match=rf"tested with peft .*, found {version}"):
        check_peft_version(version)


def test_every_error_is_a_smoa_error_and_the_builtin_that_fits() -> None:
    assert {name: getattr(smoa, name).__mro__[2] for name in smoa.__all__ if name.endswith("Error")} == {
        "AdapterFileError": ValueError,
        "ConfigError": ValueError,
        "DataError": ValueError,
        "MergeError": ValueError,
        "PartitionError": ValueError,
        "SmoaError": BaseException,
        "UnsupportedModuleError": TypeError,
        "UnsupportedVersionError": ImportError,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny_models.build("llama"), config).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **kwargs: Any) -> PeftModel:
    return PeftModel.from_pretrained(tiny_models.build("llama"), folder, **kwargs)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"adapter_config\.json"):
        load(folder)


def test_a_folder_without_the_adapter_file_is_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=folder.name):  # PEFT's own: it looks for the file on the hub
        load(folder)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_adapter_file_is_refused(folder: Path, kept: int) -> None:
    file = folder / "adapter_model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|safetensor") as caught:
        load(folder)
    assert type(caught.value).__name__ in {"SafetensorError", "AdapterFileError"}


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "SMOA", "r": ')
    with pytest.raises(json.JSONDecodeError):
        load(folder)


def test_a_config_with_a_broken_rule_is_refused(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": -4}))
    with pytest.raises(ConfigError, match=r"r=-4"):
        load(folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.smoa_A.weight"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t.pop(A), id="missing"),
        pytest.param(lambda t: t.update({A: t[A][:2]}), id="of fewer rows"),
        pytest.param(lambda t: t.update({A: t[A].T}), id="transposed"),
        pytest.param(lambda t: t.update({A: t[A].long()}), id="of integers"),
        pytest.param(lambda t: t[A].fill_(float("nan")), id="NaN"),
        pytest.param(lambda t: t[A].fill_(float("inf")), id="infinite"),
        pytest.param(lambda t: t.update({A.replace("layers.0", "layers.9"): t[A].clone()}), id="of one layer more"),
    ],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_a_factor_that_does_not_fit_is_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], object], low_cpu_mem_usage: bool
) -> None:
    with pytest.raises(AdapterFileError, match=r"layers\.[09]\.self_attn\.q_proj\.smoa_A"):
        load(rewritten(folder, change), low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_file_of_another_method_under_our_config_is_refused(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("lora")
    get_peft_model(tiny_models.build("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(other)
    (other / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"smoa_A"):
        load(folder)


def test_our_file_under_the_config_of_another_method_does_not_pass_for_it(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("lora")
    get_peft_model(tiny_models.build("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(other)
    (folder / "adapter_model.safetensors").rename(other / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        load(other)


def test_an_adapter_for_a_model_of_other_shapes_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"layers\.0\.self_attn\.q_proj"):
        PeftModel.from_pretrained(tiny_models.build("gemma3"), folder)


def test_an_adapter_for_a_model_without_its_modules_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="q_proj"):
        PeftModel.from_pretrained(tiny_models.build("gpt2"), folder)


def test_an_adapter_of_a_mixture_of_methods_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"(?i)smoa"):
        get_peft_model(tiny_llama, SmoaConfig(r=4, target_modules=["q_proj"]), mixed=True)


def test_a_second_adapter_of_the_same_name_is_refused(tiny_llama: PreTrainedModel) -> None:
    config = SmoaConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama, config)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config)


def test_a_second_adapter_that_trains_biases_is_refused(tiny_llama: PreTrainedModel) -> None:
    config = SmoaConfig(r=4, target_modules=["q_proj"], bias="all")
    model = get_peft_model(tiny_llama, config)
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("other", config)


def test_using_an_adapter_on_the_meta_device_is_refused_clearly() -> None:
    with torch.device("meta"):
        model = get_peft_model(Wrapper(nn.Linear(8, 8)), SmoaConfig(r=4, target_modules=["layer"]))
        with pytest.raises(PartitionError, match="meta"):
            model(torch.randn(2, 8))


class QuantizedLinear(nn.Linear):
    """As bitsandbytes has it: a Linear whose weight holds integers."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)


def test_a_quantized_layer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"layer: .*quantized weight of a .*QuantizedLinear"):
        get_peft_model(Wrapper(QuantizedLinear(8, 8)), SmoaConfig(target_modules=["layer"]))


def test_a_saved_config_read_as_json_is_what_was_saved(tmp_path: Path) -> None:
    config = SmoaConfig(r=4, alpha=3.0, rank_pattern={"up": 2})
    config.save_pretrained(tmp_path)
    assert SmoaConfig.from_json_file(str(tmp_path / "adapter_config.json")) == config.to_dict()


def test_one_config_serves_two_models_and_stays_as_it_is(tiny_llama: PreTrainedModel) -> None:
    config = SmoaConfig(
        r=4, num_blocks=2, target_modules="all-linear", blocks_from_spectrum=True, normalize_anchor=True
    )
    first = get_peft_model(tiny_llama, config)
    before = copy.deepcopy(first.peft_config["default"])
    second = get_peft_model(tiny_models.build("gpt2"), config)
    assert first.peft_config["default"] == before
    assert first.peft_config["default"].target_modules != second.peft_config["default"].target_modules
    assert (config.target_modules, config.num_blocks_pattern, config.normalized_alpha) == ("all-linear", {}, {})
    assert config.save_id is None


def test_an_adapter_of_the_config_that_was_passed_before_is_a_twin(tiny_llama: PreTrainedModel) -> None:
    config = SmoaConfig(r=4, partition="random", target_modules=["q_proj"])
    model = get_peft_model(tiny_llama, config)
    model.add_adapter("twin", config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.smoa_row_labels["twin"], layer.smoa_row_labels["default"])
