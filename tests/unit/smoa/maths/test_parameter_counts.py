from __future__ import annotations

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from tests import reference
from tests.support.layers import adapted_layer, base_layer, factors

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
LORA = LoraConfig(r=32, target_modules=TARGETS)
HIRA = HiraConfig(r=32, target_modules=TARGETS)
SMOA_1 = SmoaConfig(r=32, num_blocks=1, target_modules=TARGETS)
SMOA_2 = SmoaConfig(r=32, num_blocks=2, target_modules=TARGETS)


def on_the_meta_device(model_config: LlamaConfig, adapter_config: PeftConfig) -> PeftModel:
    with torch.device("meta"):
        return get_peft_model(LlamaForCausalLM(model_config), adapter_config)


# Published: arXiv:2605.21147, its table of trainable parameters.
@pytest.mark.parametrize(
    ("model_config", "adapter_config", "millions", "percent"),
    [
        pytest.param(LLAMA_2_7B, LORA, "56.10", "0.8256", id="Llama-2-7B LoRA"),
        pytest.param(LLAMA_2_7B, HIRA, "56.10", "0.8256", id="Llama-2-7B HiRA"),
        pytest.param(LLAMA_2_7B, SMOA_1, "56.10", "0.8256", id="Llama-2-7B SMoA K=1"),
        pytest.param(LLAMA_2_7B, SMOA_2, "28.05", "0.4145", id="Llama-2-7B SMoA K=2"),
        pytest.param(LLAMA_3_8B, LORA, "56.62", "0.7002", id="Llama-3-8B LoRA"),
        pytest.param(LLAMA_3_8B, SMOA_1, "56.62", "0.7002", id="Llama-3-8B SMoA K=1"),
        pytest.param(LLAMA_3_8B, SMOA_2, "28.31", "0.3513", id="Llama-3-8B SMoA K=2"),
    ],
)
def test_published_parameter_counts_are_reproduced(
    model_config: LlamaConfig, adapter_config: PeftConfig, millions: str, percent: str
) -> None:
    trainable, total = on_the_meta_device(model_config, adapter_config).get_nb_trainable_parameters()
    assert f"{trainable / 1e6:.2f}" == millions
    assert f"{100 * trainable / total:.4f}" == percent


def test_a_model_on_the_meta_device_is_adapted_without_being_materialized() -> None:
    model = on_the_meta_device(LLAMA_2_7B, SMOA_2)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(("out_features", "in_features", "r", "num_blocks"), [(12, 18, 6, 3), (8, 8, 4, 1)])
def test_a_layer_trains_r_times_both_sides_over_k_parameters(
    out_features: int, in_features: int, r: int, num_blocks: int
) -> None:
    layer = adapted_layer(base_layer(out_features, in_features), r=r, num_blocks=num_blocks)
    counted = sum(factor.numel() for factor in factors(layer))
    assert counted == r * (out_features + in_features) // num_blocks
    assert counted == reference.parameter_count(out_features, in_features, reference.block_ranks(r, num_blocks))


def test_a_ragged_layer_pads_by_at_most_one_entry_a_rank() -> None:
    layer = adapted_layer(base_layer(11, 13), r=7, num_blocks=3)
    padding = sum(factor.numel() for factor in factors(layer)) - reference.parameter_count(11, 13, [3, 2, 2])
    assert 0 < padding <= 2 * 7
