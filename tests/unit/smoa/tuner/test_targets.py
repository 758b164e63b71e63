"""Modules that cannot be adapted are refused by name."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.pytorch_utils import Conv1D

from smoa import ConfigError, PartitionError, SmoaConfig, SmoaError, UnsupportedModuleError
from smoa.tuner.targets import check_target
from tests.support.layers import Wrapper, smoa_layers
from tests.support.tiny_models import build
from tests.support.tolerance import assert_close


def test_targets_without_room_for_all_blocks_are_named_in_one_warning(tiny_llama: PreTrainedModel) -> None:
    config = SmoaConfig(r=40, num_blocks=20, target_modules=["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match=r"side of 2 of 4 targets: .*layers\.0\.self_attn\.v_proj takes 16") as found:
        model = get_peft_model(tiny_llama, config)
    assert sum("num_blocks" in str(warning.message) for warning in found) == 1
    assert {len(layer.ranks["default"]) for layer in smoa_layers(model).values()} == {20, 16}


def test_the_blocks_of_a_weight_that_zero3_has_left_empty_are_those_of_its_whole_shape() -> None:
    module = Conv1D(2, 10)
    module.weight.ds_shape = module.weight.shape
    module.weight.data = torch.empty(0)
    assert check_target("head", module, SmoaConfig(num_blocks=4), nn.Module())[1] == (2, 10)
    with pytest.raises(PartitionError, match=r"head: num_blocks=3 must be between 1 and 2 .*\(2, 10\)"):
        check_target("head", module, SmoaConfig(num_blocks_pattern={"head": 3}), nn.Module())


SUPPORTED = r"torch\.nn\.Linear.*Conv1D.*Embedding.*Conv3d.*quantized"


class OddModel(nn.Module):
    """Modules of many kinds, some of which other PEFT methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.ConvTranspose2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lazy = nn.LazyLinear(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        ("transposed", r"ConvTranspose2d; .*\(it has weight \(8, 8, 3, 3\), bias \(8,\)\)"),
        ("attention", r"MultiheadAttention; .*\(it has in_proj_weight \(24, 8\), in_proj_bias \(24,\)\)"),
        ("empty", r"Identity; .*remove it from target_modules .*\(it has no parameters\)"),
    ],
)
def test_an_unsupported_module_is_refused_with_its_shapes_and_the_remedy(target: str, shapes: str) -> None:
    model = OddModel()
    model.empty = nn.Identity()
    with pytest.raises(UnsupportedModuleError, match=rf"{target}: .*{shapes}") as caught:
        get_peft_model(model, SmoaConfig(r=4, target_modules=[target, "linear"]))
    assert re.search(SUPPORTED, str(caught.value))
    assert type(model.linear) is nn.Linear


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_linear_layer_without_a_weight_yet_is_refused_by_name() -> None:
    with pytest.raises(SmoaError, match="lazy"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["lazy"]))


def test_a_layer_that_its_parent_never_calls_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"attention\.out_proj.*uses its weight without calling it"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["out_proj", "linear"]))


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}


def llama4() -> PreTrainedModel:
    return Llama4ForCausalLM(Llama4TextConfig(**SMALL, **HEADS, num_hidden_layers=5, head_dim=8))


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' takes linear layers only:UserWarning")
def test_all_linear_leaves_out_routers_with_a_forward_of_their_own_and_names_them() -> None:
    with pytest.warns(UserWarning, match=r"leaves out model\.layers\.0\..*and 2 more.*Llama4Router") as found:
        model = get_peft_model(llama4(), SmoaConfig(r=4, target_modules="all-linear", init_weights=False)).eval()
    assert sum("leaves out" in str(warning.message) for warning in found) == 1
    assert not any("router" in name or name.endswith(".gate") for name in smoa_layers(model))
    logits = model(torch.tensor([[5, 9, 3]])).logits
    model.merge_adapter()
    assert_close(model(torch.tensor([[5, 9, 3]])).logits, logits)


def test_a_router_with_a_forward_of_its_own_is_refused_if_it_is_named() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"router: .*Llama4Router has a forward of its own"):
        get_peft_model(llama4(), SmoaConfig(target_modules=["router", "q_proj"]))


class Renamed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_with_a_forward_of_its_own_is_adapted_if_it_computes_the_same(device: str) -> None:
    with torch.device(device):
        renamed, scaled = Wrapper(Renamed(8, 6)), Wrapper(Scaled(8, 6))
    state = torch.random.get_rng_state()
    with pytest.raises(UnsupportedModuleError, match=r"layer: .*Scaled has a forward of its own"):
        get_peft_model(scaled, SmoaConfig(target_modules=["layer"]))
    assert torch.equal(torch.random.get_rng_state(), state)
    model = get_peft_model(renamed, SmoaConfig(target_modules=["layer"]))
    assert set(smoa_layers(model)) == {"layer"}


def test_a_convolution_with_a_normalized_weight_is_refused_by_name() -> None:
    sizes = {"num_feat_extract_layers": 1, "conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,)}
    model = Wav2Vec2Model(Wav2Vec2Config(**SMALL, **sizes, num_hidden_layers=1, num_conv_pos_embedding_groups=2))
    with pytest.raises(UnsupportedModuleError, match=r"pos_conv_embed\.conv: .*weight is not a parameter.*parametriz"):
        get_peft_model(model, SmoaConfig(target_modules=["pos_conv_embed.conv"]))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:ensure_weight_tying has no effect:UserWarning")
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_embedding_that_only_lends_its_weight_is_refused_and_those_that_are_called_are_named(family: str) -> None:
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = build("t5") if family == "t5" else BartModel(BartConfig(vocab_size=64, d_model=32, **sizes))
    pattern = r"shared: .*does not call it, but decoder\.embed_tokens and encoder\.embed_tokens.*ensure_weight_tying"
    with pytest.raises(UnsupportedModuleError, match=pattern):
        get_peft_model(model, SmoaConfig(target_modules=["shared"]))
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(70, mean_resizing=False)
    for settings in ({}, {"ensure_weight_tying": True}):
        with pytest.raises(UnsupportedModuleError, match=r"shared: .*does not call it.*; save and load the model"):
            get_peft_model(resized, SmoaConfig(target_modules=["shared"], **settings))
    called = get_peft_model(model, SmoaConfig(target_modules=["embed_tokens"]))
    assert set(smoa_layers(called)) == {"encoder.embed_tokens", "decoder.embed_tokens"}


def test_what_the_kernels_of_a_mamba_model_read_without_a_call_is_refused_and_left_out_of_all_linear() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=32, state_size=4, num_hidden_layers=1))
    for name in ("out_proj", "conv1d"):
        with pytest.raises(ConfigError, match=rf"backbone\.layers\.0\.mixer\.{name}: is incompatible with Mamba"):
            get_peft_model(model, SmoaConfig(r=4, target_modules=["in_proj", name]))
        assert not smoa_layers(model)
    adapted = smoa_layers(get_peft_model(model, SmoaConfig(r=4, target_modules="all-linear")))
    assert {name.rpartition(".")[2] for name in adapted} == {"in_proj", "x_proj", "dt_proj"}


# All targets at once.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(12, 8)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.bank = nn.Module()
        self.bank.bias = nn.Parameter(nn.init.zeros_(nn.Linear(4, 1).weight)[0])


def test_problems_of_modules_and_of_parameters_are_one_error_before_anything_is_changed() -> None:
    model = Net()
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["good", "bilinear"], target_parameters=["bank.bias"])
    with pytest.raises(SmoaError, match=r"(?s)bilinear.*; .*bank\.bias"):
        get_peft_model(model, config)
    assert type(model.good) is nn.Linear
