import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from smoa_lab.inspect import rank_bound
from tests import oracle
from tests.support.layers import adapted_layer, base_layer, base_weight, labels, ranks

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
HIRA = peft.HiraConfig(r=32, target_modules=TARGETS) if hasattr(peft, "HiraConfig") else None  # PEFT ≥ 0.20
SMOA_1 = SmoaConfig(r=32, num_blocks=1, target_modules=TARGETS)
SMOA_2 = SmoaConfig(r=32, num_blocks=2, target_modules=TARGETS)


# Published: arXiv:2605.21147, its table of trainable parameters.
@pytest.mark.parametrize(
    ("model_config", "adapter_config", "millions", "percent"),
    [
        pytest.param(LLAMA_2_7B, LORA, "56.10", "0.8256", id="Llama-2-7B LoRA"),
        pytest.param(LLAMA_2_7B, HIRA, "56.10", "0.8256", id="Llama-2-7B HiRA"),
        pytest.param(LLAMA_2_7B, SMOA_1, "56.10", "0.8256", id="Llama-2-7B SMoA K=1"),
        pytest.param(LLAMA_2_7B, SMOA_2, "28.05", "0.4145", id="Llama-2-7B SMoA K=2"),
        pytest.param(LLAMA_3_8B, LORA, "56.62", "0.7002", id="Llama-3-8B LoRA"),
        pytest.param(LLAMA_3_8B, SMOA_2, "28.31", "0.3513", id="Llama-3-8B SMoA K=2"),
    ],
)
def test_published_parameter_counts_are_reproduced(
    model_config: LlamaConfig, adapter_config: PeftConfig, millions: str, percent: str
) -> None:
    one_layer = copy.deepcopy(model_config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(one_layer), adapter_config)
    trainable, total = model.get_nb_trainable_parameters()
    others = model_config.num_hidden_layers - 1
    total += others * sum(parameter.numel() for parameter in model.base_model.model.model.layers.parameters())
    trainable += others * trainable
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert f"{trainable / 1e6:.2f}" == millions
    assert f"{100 * trainable / total:.4f}" == percent


@pytest.mark.parametrize(("out_features", "in_features", "num_blocks", "r"), [(24, 20, 2, 4), (11, 13, 3, 7)])
def test_the_rank_bound_is_that_of_full_anchors(out_features: int, in_features: int, num_blocks: int, r: int) -> None:
    layer = adapted_layer(base_layer(out_features, in_features), r=r, num_blocks=num_blocks)
    expected = oracle.rank_bound(base_weight(layer), *labels(layer), ranks(layer))
    assert rank_bound(out_features, in_features, ranks(layer)) == expected


def test_the_rank_bound_leaves_out_blocks_without_a_rank() -> None:
    assert rank_bound(11, 13, ranks=(4, 0, 1)) == 4 + 3
