"""Random models that see and hear: tiny, built from configs. Each comes with inputs and what is adapted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.support.tiny_models import INITIALIZER_RANGE, SEED

ATTENTION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Tower:
    """A model, its inputs, and the modules that are adapted."""

    build: Callable[[], PreTrainedModel]
    batch: Callable[[], dict[str, Tensor]]
    targets: list[str]


def _images(size: int = 16) -> Tensor:
    return torch.randn(3, 3, size, size)


def _classes() -> dict[str, Tensor]:
    return {"pixel_values": _images(), "labels": torch.arange(3)}


def _clip_config() -> CLIPConfig:
    text = {**ATTENTION, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 1}
    vision = {**ATTENTION, "image_size": 16, "patch_size": 4}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def _clip_batch() -> dict[str, Tensor]:
    tokens = torch.randint(2, 39, (3, 6))
    tokens[:, -1] = 39
    return {"pixel_values": _images(), "input_ids": tokens, "return_loss": True}  # type: ignore[dict-item]


def _whisper_config() -> WhisperConfig:
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _SIDE.items()}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperConfig(
        **sides,
        **tokens,
        d_model=16,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}

TOWERS = {
    "vit": Tower(
        lambda: ViTForImageClassification(
            ViTConfig(**ATTENTION, image_size=16, patch_size=4, num_labels=3, initializer_range=INITIALIZER_RANGE)
        ),
        _classes,
        ["patch_embeddings.projection", "q_proj", "v_proj", "query", "value"],
    ),
    "clip": Tower(
        lambda: CLIPModel(_clip_config()),
        _clip_batch,
        ["patch_embedding", "token_embedding", "text_model.embeddings.position_embedding", "q_proj"],
    ),
    "whisper": Tower(
        lambda: WhisperForConditionalGeneration(_whisper_config()),
        lambda: {"input_features": torch.randn(2, 8, 20), "labels": torch.randint(3, 40, (2, 5))},
        ["conv1", "conv2", "embed_tokens", "q_proj", "fc1"],
    ),
    "convnext": Tower(
        lambda: ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, num_labels=3)
        ),
        _classes,
        ["patch_embeddings", "dwconv", "pwconv1", "pwconv2", "downsampling_layer.1"],
    ),
}


_TEXT = {**ATTENTION, "num_key_value_heads": 1, "vocab_size": 60, "max_position_embeddings": 64}


def _gemma3_config() -> Gemma3Config:
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text = {**_TEXT, **layers, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {**ATTENTION, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    tokens = {"image_token_index": 59, "boi_token_index": 57, "eoi_token_index": 58}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def _gemma3() -> PreTrainedModel:
    """Its images reach the text, unlike in a new model, whose projection is zero. Nothing calls its SigLIP's head."""
    model = Gemma3ForConditionalGeneration(_gemma3_config())
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def _qwen_config() -> Qwen2_5_VLConfig:
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    sizes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    tokens = {"image_token_id": 59, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
    text = {**_TEXT, "rope_parameters": rotary}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config={**sizes, **patches, "fullatt_block_indexes": [1]}, **tokens
    )


def _image_and_text(pixels: Tensor, types: str, **others: Tensor) -> dict[str, Tensor]:
    """A sentence with an image of four tokens."""
    tokens = torch.randint(3, 50, (1, 12))
    tokens[:, 1], tokens[:, 2:6] = 57, 59
    return {"input_ids": tokens, "pixel_values": pixels, types: (tokens == 59).long(), "labels": tokens, **others}


VLMS = {
    "gemma3": Tower(
        _gemma3,
        lambda: _image_and_text(_images()[:1], "token_type_ids"),
        ["patch_embedding", "embed_tokens", "q_proj", "layers.0.mlp.fc1"],
    ),
    "qwen2_5_vl": Tower(
        lambda: Qwen2_5_VLForConditionalGeneration(_qwen_config()),
        lambda: _image_and_text(
            torch.randn(16, 3 * 2 * 4 * 4), "mm_token_type_ids", image_grid_thw=torch.tensor([[1, 4, 4]])
        ),
        ["patch_embed.proj", "embed_tokens", "q_proj", "qkv"],
    ),
}
"""Language models that see. The head of both is another layer than the table."""
TOWERS |= VLMS


def build_tower(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode: the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return TOWERS[name].build().eval().to(dtype)


def tower_batch(name: str) -> dict[str, Tensor]:
    """Inputs for which `model(**batch)` returns a loss: the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return TOWERS[name].batch()
