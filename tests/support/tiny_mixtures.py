"""Random mixtures of experts with one or two layers, built from configs: nothing is loaded."""

from collections.abc import Callable
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from smoa import SmoaConfig
from smoa.experts import ParamWrapper
from tests import oracle
from tests.support.tiny_models import INITIALIZER_RANGE, SEED, VOCAB_SIZE

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 16,  # grouped_mm wants rows of a multiple of 16 bytes
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": INITIALIZER_RANGE,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}


def qwen3_moe(num_experts: int = 5) -> PreTrainedModel:
    """Gate above up."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, moe_intermediate_size=16, num_experts=num_experts, head_dim=6))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=5))


def olmoe() -> PreTrainedModel:
    return OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=5))


def deepseek_v3() -> PreTrainedModel:
    """A dense layer first, and a shared expert, which is a module of linear layers."""
    settings = COMMON | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    config = DeepseekV3Config(**settings, **heads, moe_intermediate_size=16, n_group=2, topk_group=1)
    return DeepseekV3ForCausalLM(config)


def gpt_oss(**changed: Any) -> PreTrainedModel:
    """Transposed, gate and up by turns, with biases."""
    return GptOssForCausalLM(GptOssConfig(**COMMON | changed, num_local_experts=5, head_dim=6))


def llama4(**changed: Any) -> PreTrainedModel:
    """Transposed, and outside transformers' experts interface: every expert computes every token."""
    settings = COMMON | {"num_experts_per_tok": 1, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1}
    heads = {"head_dim": 6, "attention_chunk_size": 32}
    return Llama4ForCausalLM(Llama4TextConfig(**settings | changed, **heads, num_local_experts=5))


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def build_mixture(family: str) -> PreTrainedModel:
    """A mixture in evaluation mode: the same weights every time, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return MIXTURES[family]().eval()


SETTINGS: dict[str, Any] = {"r": 7, "num_blocks": 3, "alpha": 4.0, "init_weights": False}
FAMILIES = ["qwen3_moe", "gpt_oss", "llama4"]
"""One for each layout: (E, out, in), transposed and interleaved, transposed."""


def experts_of(family: str, adapter: str = "default", dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """The experts of one layer, as a child of another module, with an adapter on both parameters."""
    model = build_mixture(family).to(dtype)
    found = next(module for name, module in model.named_modules() if name.endswith("experts"))
    if hasattr(found, "config"):
        found.config._experts_implementation = "eager"
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, **SETTINGS | settings)
    return inject_adapter_in_model(config, nn.ModuleDict({"experts": found}), adapter)


def add_second_adapter(experts: nn.Module) -> None:
    """Another adapter, of two blocks, on what `experts_of` returned; it is not active."""
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, **SETTINGS | {"num_blocks": 2, "r": 4})
    inject_adapter_in_model(config, nn.ModuleDict({"experts": experts["experts"]}), "second")


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(SEED))


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """The adapted parameters by their names, of the last layer of the model."""
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def matrix_of(wrapper: ParamWrapper, expert: int, half: int) -> Tensor:
    """One expert's matrix (out_features, in_features), picked from the parameter by the names of the models."""
    stored = wrapper.stored_weight().detach()
    stored = stored[expert] if wrapper.layout.is_stack else stored
    stored = stored.T if wrapper.layout.transposed else stored
    if wrapper.layout.halves == 1:
        return stored
    if wrapper.layout.interleaved:
        return stored[half::2]
    return stored[: len(stored) // 2] if half == 0 else stored[len(stored) // 2 :]


def oracle_deltas(wrapper: ParamWrapper, A: Tensor | None = None, B: Tensor | None = None) -> list[Tensor]:
    """The oracle's delta W (m, n) of each expert's matrices, in float64, in the order of the factors."""
    own_A, own_B = wrapper.factors("default")
    A, B = (own.detach() if given is None else given for own, given in ((own_A, A), (own_B, B)))
    ranks, halves = wrapper.adapters["default"].ranks, wrapper.layout.halves
    rows, cols = wrapper.smoa_row_labels["default"].tolist(), wrapper.smoa_col_labels["default"].tolist()
    r, scales = sum(ranks), wrapper.decided("default").block_scale.tolist()
    return [
        oracle.delta_weight(
            matrix_of(wrapper, number // halves, number % halves).double(),
            A[number * r : (number + 1) * r].double(),
            B[:, number * r : (number + 1) * r].double(),
            rows[number % len(rows)],
            cols[number % len(cols)],
            ranks,
            [wrapper.scaling["default"] * scale for scale in scales[number]],
            wrapper.adapters["default"].modulation,
        )
        for number in range(wrapper.layout.count)
    ]
