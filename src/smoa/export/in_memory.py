"""Merges a saved adapter into a model in memory, for bases that can't be merged on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa.errors import MergeError
from smoa.export.streaming import RoundingLoss


def with_plain_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain float32 weights, dequantized if it was quantized.

    Raises:
        MergeError: transformers can't dequantize the model's format.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        try:
            model = model.dequantize(dtype=torch.float32)
        except NotImplementedError as error:
            raise MergeError(f"the base can't be dequantized ({error}); give a base that isn't quantized") from error
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    wide: PreTrainedModel = model.float()
    return wide


def merge_in_memory(
    model: PreTrainedModel,
    adapter: Path,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int | str,
) -> RoundingLoss:
    """Merge the adapter of any PEFT method into `model`, and save the merged model.

    Args:
        model: The base in float32, which is changed.
        adapter: Folder of the adapter.
        folder: Where the merged model is saved.
        dtype: Dtype of the saved weights.
        max_shard_size: Largest file, in bytes or as text ("5GB").

    Returns:
        How much of the update was lost by rounding to `dtype`.

    Raises:
        MergeError: a merged weight is NaN or infinite, the method can't merge, or the adapter doesn't fit the base.
    """
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    except RuntimeError as error:  # PyTorch's, for tensors of other shapes
        raise MergeError(
            f"{adapter}: can't be loaded into {type(model).__name__} ({error}); give the base model it was trained on"
        ) from error
    adapted.eval()
    loss = RoundingLoss()
    with warnings.catch_warnings():
        # Merge layer by layer, so that only one weight at a time is kept for comparison.
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied after merging")
        for name, layer in _layers(adapted):
            _untie(model, layer)
            _merge_layer(name, layer, dtype, loss)
        merged = adapted.merge_and_unload()
    merged.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return loss


def _layers(adapted: PeftModel) -> list[tuple[str, Any]]:
    """The layers to merge by name; of those that share weight and adapter, the first."""
    tuner: Any = adapted.base_model
    found: dict[int, tuple[str, Any]] = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, tuner.tuner_layer_cls) and isinstance(_weight(module), Tensor):
            found.setdefault(id(_weight(module)) if _is_tied(module) else id(module), (name, module))
    return list(found.values())


def _is_tied(layer: Any) -> bool:
    return getattr(layer, "tied", False)


def _weight(layer: Any) -> Any:
    """A layer's weight, or the parameter that it wraps."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)


def _merge_layer(name: str, layer: Any, dtype: torch.dtype, loss: RoundingLoss) -> None:
    before = _weight(layer).detach().clone()
    try:
        layer.merge(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise MergeError(f"{name}: {error}") from error
    loss.add(name, before, _weight(layer).detach(), dtype)


def _untie(model: Any, layer: Any) -> None:
    """Give the layer a weight of its own if another module shares it, because the adapter changes only this layer."""
    base: nn.Module = layer.get_base_layer()
    if _is_tied(layer) or _weight(layer) is not getattr(base, "weight", None):
        return
    users = [module for module in model.modules() if getattr(module, "weight", None) is base.weight]
    if len({id(module) for module in users} - {id(layer)}) > 1:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        model.config.tie_word_embeddings = False
