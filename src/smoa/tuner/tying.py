"""Layers that share one weight, such as an embedding and the head tied to it, and `ensure_weight_tying`.

Which layers share a weight is seen from the model, not from its class or config. Adapters that older versions trained
with `ensure_weight_tying` have the same factors, blocks and scales in all layers of a weight.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

from smoa.config import SmoaConfig
from smoa.errors import ConfigError, MergeError, first_of
from smoa.files.loading import incoming
from smoa.layers.layer import SmoaLayer, smoa_layers
from smoa.layers.merging import weight_id

Group = list[str]
"""Names of the modules that share one weight."""


def tied_groups(model: nn.Module) -> list[Group]:
    """The modules that share their weight with others, adapted already or not."""
    users: dict[int, Group] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and ".smoa_" not in name:
            users.setdefault(weight_id(weight), []).append(name.removesuffix(".base_layer"))
    return [names for names in users.values() if len(names) > 1]


def ties_more_than_ends(model: nn.Module) -> bool:
    """Whether the config of a model from transformers ties more than an embedding and a head. With
    `tie_word_embeddings=False` a saved model is loaded without all that was tied, as the tables of BART's encoder and
    decoder, and with True with the ends apart if the file has both."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(tied) and len(getattr(model, "all_tied_weights_keys", ())) > 1


def refuse_source(model: nn.Module) -> None:
    """Raise MergeError if an adapter is on the weight that several others without one are tied to, as `shared` of BART
    and T5: in a saved model these are one weight in the file, and loading would tie them to the merged one."""
    ties, adapted = Counter(getattr(model, "all_tied_weights_keys", {}).values()), smoa_layers(model)
    for group in tied_groups(model):
        source = next((name for name in group if name in adapted and ties[f"{name}.weight"] > 1), None)
        if source and not adapted.keys() >= set(group):
            raise MergeError(
                f"{source}: {first_of([name for name in group if name != source])} are tied to its weight, and a saved "
                "model would be loaded with all of them merged; keep the adapter unmerged, or adapt one of these"
            )


def refuse_training(model: nn.Module, config: SmoaConfig, is_target: Callable[[SmoaConfig, str], object]) -> None:
    """Raise ConfigError if an adapter with `ensure_weight_tying` on layers of one weight is new, or would be trained.

    Saved ones load, for inference: each layer has the same factors then.
    """
    if not config.ensure_weight_tying:
        return
    group = next((group for group in tied_groups(model) if any(is_target(config, name) for name in group)), None)
    if group is None and not config.trainable_token_indices:
        warnings.warn(
            "ensure_weight_tying has no effect: no target shares its weight with another layer; drop the setting",
            stacklevel=2,
        )
    if group is not None and not (config.inference_mode and incoming() is not None):
        raise ConfigError(
            f"ensure_weight_tying: {first_of(group)} share one weight, and adapters of all of them can be loaded but "
            "not trained: the layers would part. Leave the setting out and name one of them in target_modules; a "
            "saved adapter loads with is_trainable=False"
        )


def refuse_shared(layers: Mapping[str, SmoaLayer]) -> None:
    """Raise MergeError if layers of one weight do not share their adapters: a merged weight would be wrong for both."""
    (other, first), *others = layers.items()
    for name, layer in others:
        if not _are_alike(layer, first):
            raise MergeError(
                f"{name} and {other} share one weight but have an adapter each, so no merged weight is right for both; "
                "untie them, or adapt one of them only"
            )


def _are_alike(layer: SmoaLayer, other: SmoaLayer) -> bool:
    """Whether two layers of one weight have the same W + ΔW."""
    if layer.scaling != other.scaling or layer.saved_shapes((1,)) != other.saved_shapes((1,)):
        return False
    tensors = (
        [tensor for name in each.scaling for tensor in (*each.factors(name), *each.adapters[name].saved())]
        for each in (layer, other)
    )
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*tensors, strict=True))
