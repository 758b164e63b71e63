"""Models that see, hear and draw through the life of an adapter: convolutions, embeddings, layers that a parent reads
the weight of, images among the tokens, a UNet and a diffusion transformer. All are tiny and random."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from smoa import SmoaConfig
from smoa.conv import Convolution
from smoa.embedding import Embedding
from smoa.linear import Linear
from tests.support.layers import assert_close, layers_of, oracle_delta
from tests.support.tiny import SEED
from tests.support.watch import NoDecomposition

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Model with `tie_word_embeddings=True` and:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`",
)
ATTENTION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**ATTENTION, "num_key_value_heads": 1, "vocab_size": 60, "max_position_embeddings": 64}
CONVOLVES, LOOKS_UP = {Convolution, Linear}, {Convolution, Embedding, Linear}


@dataclass(frozen=True)
class Tower:
    """A model, its inputs, the modules that are adapted, and what these become."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    targets: list[str]
    kinds: set[type] = frozenset(LOOKS_UP)  # type: ignore[assignment]

    def seeded(self, make: Callable[[], Any]) -> Any:
        torch.manual_seed(SEED)
        return make()

    def loss(self, model: nn.Module) -> Tensor:
        output = model(**self.seeded(self.batch))
        return output.loss if hasattr(output, "loss") else (output.sample - 1).square().mean()


def whisper() -> nn.Module:
    side = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in side.items()}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(
        WhisperConfig(d_model=16, **sizes, **tokens, **lengths, **none, tie_word_embeddings=False)
    )


def gemma3() -> nn.Module:
    """Its images reach the text, unlike in a new model, whose projection is zero. Nothing calls its SigLIP's head."""
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text = {**TEXT, **layers, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {**ATTENTION, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    tokens = {"image_token_index": 59, "boi_token_index": 57, "eoi_token_index": 58}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def qwen2_5_vl() -> nn.Module:
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    sizes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    tokens = {"image_token_id": 59, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
    vision = {**sizes, **patches, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rotary}, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


def image_and_text(pixels: Tensor, types: str, **others: Tensor) -> dict[str, Tensor]:
    """A sentence with an image of four tokens."""
    tokens = torch.randint(3, 50, (1, 12))
    tokens[:, 1], tokens[:, 2:6] = 57, 59
    return {"input_ids": tokens, "pixel_values": pixels, types: (tokens == 59).long(), "labels": tokens, **others}


def unet() -> nn.Module:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    heads = {"cross_attention_dim": 8, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, **sizes, **heads)


def dit() -> nn.Module:
    sizes = {"in_channels": 4, "num_layers": 2, "sample_size": 8, "norm_num_groups": 4, "num_embeds_ada_norm": 10}
    return diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, **sizes)


TOWERS = {
    "convnext": Tower(
        lambda: ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, num_labels=3)
        ),
        lambda: {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.arange(3)},
        ["patch_embeddings", "dwconv", "pwconv1", "pwconv2", "downsampling_layer.1"],
        CONVOLVES,
    ),
    "whisper": Tower(
        whisper,
        lambda: {"input_features": torch.randn(2, 8, 20), "labels": torch.randint(3, 40, (2, 5))},
        ["conv1", "conv2", "embed_tokens", "q_proj", "fc1"],
    ),
    "gemma3": Tower(
        gemma3,
        lambda: image_and_text(torch.randn(1, 3, 16, 16), "token_type_ids"),
        ["patch_embedding", "q_proj", "layers.0.mlp.fc1"],
        CONVOLVES,
    ),
    "qwen2_5_vl": Tower(
        qwen2_5_vl,
        lambda: image_and_text(
            torch.randn(16, 3 * 2 * 4 * 4), "mm_token_type_ids", image_grid_thw=torch.tensor([[1, 4, 4]])
        ),
        ["patch_embed.proj", "embed_tokens", "q_proj", "qkv"],
    ),
    "unet": Tower(
        unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": torch.randn(2, 3, 8),
        },
        ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "to_q", "to_v"],
        CONVOLVES,
    ),
    "dit": Tower(
        dit,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 4]),
        },
        ["pos_embed.proj", "embedding_table", "to_q", "to_v", "linear"],
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_model_is_a_no_op_then_learns_then_is_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    tower = TOWERS[name]
    base = tower.seeded(tower.build).eval()
    before = tower.loss(base).detach()
    model = get_peft_model(base, SmoaConfig(r=6, num_blocks=3, target_modules=tower.targets))
    assert {type(layer) for layer in layers_of(model)} == tower.kinds
    assert_close(tower.loss(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(4):
        tower.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = tower.loss(model.eval()).detach()
    assert trained < before

    model.save_pretrained(tmp_path)
    with NoDecomposition():
        loaded = PeftModel.from_pretrained(tower.seeded(tower.build).eval(), tmp_path).eval()
        assert torch.equal(tower.loss(loaded), trained)
    for layer in layers_of(loaded):
        assert_close(layer.delta("default"), oracle_delta(layer))
    weights = copy.deepcopy(loaded.state_dict())
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    merged = loaded.merge_and_unload(safe_merge=True)
    assert not layers_of(merged)
    assert_close(tower.loss(merged), trained)
