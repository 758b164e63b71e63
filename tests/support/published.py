"""Tiny checkpoints in the formats in which models are published: FP8, MXFP4 and compressed-tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
)

from tests.support import tiny_models

LARGEST = 448
"""The largest number of float8_e4m3fn."""
SIDE = 16
PER_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [SIDE, SIDE], "activation_scheme": "dynamic"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": PER_CHANNEL}},
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
DEQUANTIZED = {
    "fp8": lambda: FineGrainedFP8Config(dequantize=True, weight_block_size=(SIDE, SIDE)),
    "compressed-tensors": lambda: CompressedTensorsConfig(dequantize=True),
    "mxfp4": lambda: Mxfp4Config(dequantize=True),
}


def _fp8_blocks(key: str, weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.float().unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE))
    scale = blocks.abs().amax((1, 3)) / LARGEST
    stored = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {key: stored.to(torch.float8_e4m3fn), f"{key}_scale_inv": scale}


def _fp8_rows(key: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / LARGEST
    return {key: (weight.float() / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale.bfloat16()}


def _fp4_groups(key: str, weight: Tensor) -> dict[str, Tensor]:
    """Random numbers in groups of 32 that share an exponent of 2^-7."""
    experts, inputs, outputs = weight.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return {f"{key}_blocks": blocks, f"{key}_scales": torch.full(blocks.shape[:-1], 120, dtype=torch.uint8)}


STORED: dict[str, tuple[tuple[str, ...], Callable[[str, Tensor], dict[str, Tensor]]]] = {
    "fp8": (("proj.weight",), _fp8_blocks),
    "compressed-tensors": (("proj.weight",), _fp8_rows),
    "mxfp4": (("experts.gate_up_proj", "experts.down_proj"), _fp4_groups),
}


def published(method: str, folder: Path) -> PreTrainedModel:
    """Write a checkpoint; the model in bfloat16 that it is made of."""
    torch.manual_seed(tiny_models.SEED)
    model = _gpt_oss() if method == "mxfp4" else tiny_models.build("llama", torch.bfloat16)
    model.save_pretrained(folder)
    endings, store = STORED[method]
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        tensors |= store(key, tensor) if key.endswith(endings) else {key: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"quantization_config": CONFIGS[method]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return model


def _gpt_oss() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    options = {"layer_types": ["full_attention"], "pad_token_id": 0, "rope_parameters": rotary}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, **options)).to(torch.bfloat16).eval()


def dequantized(method: str, folder: Path) -> PreTrainedModel:
    """The checkpoint, loaded as docs/quantized.md says."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, quantization_config=DEQUANTIZED[method]())
    return model
