"""The tensors of each layer of a saved adapter, checked before anything takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load
from torch import Tensor

from smoa.compat import PREFIX
from smoa.config import Shape, SmoaConfig
from smoa.errors import AdapterFileError, ConfigError, named
from smoa.kernels.factors import saved_shapes
from smoa.kernels.scale import ModulationKind, whole_scale
from smoa.partition import check_labels

LABELS = ("smoa_row_labels", "smoa_col_labels")
PARTS = ("smoa_A.weight", "smoa_B.weight", *LABELS, "smoa_block_scale")
"""The tensors of every saved layer."""
MOST_TEMPLATES = 8
"""Of one base; each holds the bytes of an adapter."""
REMEDY = "only factors of linear layers can be served; merge it with `smoa merge` and serve the model"


@dataclass(frozen=True)
class SavedLayer:
    """The checked tensors of one layer of an adapter."""

    ranks: tuple[int, ...]
    modulation: ModulationKind
    scaling: float
    A: Tensor
    B: Tensor
    row_labels: Tensor
    col_labels: Tensor
    block_scale: Tensor

    @cached_property
    def scale(self) -> Tensor:
        """What B is multiplied by: (blocks, 1)."""
        return whole_scale(self.block_scale, self.scaling, torch.float32)[:, None]

    @cached_property
    def digest(self) -> int:
        """Equal for equal blocks."""
        return hash((self.row_labels.cpu().numpy().tobytes(), self.col_labels.cpu().numpy().tobytes()))

    @cached_property
    def kind(self) -> int:
        """Equal for equal blocks, ranks and modulation."""
        return hash((self.ranks, self.modulation, self.digest))

    @property
    def device(self) -> torch.device:
        """Where it is: an engine may ask this and `pin_memory` of what it takes for a tensor."""
        return self.A.device

    def pin_memory(self) -> Self:
        """Itself: it is copied once for each activation."""
        return self


class Template:
    """A checked adapter, by which others are read that differ from it in factors and scales alone.

    Args:
        layers: Its layers, by path.
        settings: Those of its config.
        data: The bytes of its file, of which its tensors are views, or another adapter never fits.
    """

    def __init__(self, layers: dict[str, SavedLayer], settings: str, data: Tensor) -> None:
        self.layers, self._settings, self._data = layers, settings, data

    @cached_property
    def _span(self) -> tuple[int, int] | None:
        """Where factors and scales are among the float32 numbers of the file; None if anything else is there too."""
        own = [part for each in self.layers.values() for part in (each.A, each.B, each.block_scale)]
        start = min(int(part.storage_offset()) for part in own)
        stop = max(int(part.storage_offset()) + part.numel() for part in own)
        is_whole = all(part.dtype == torch.float32 for part in own) and sum(map(Tensor.numel, own)) == stop - start
        return (start, stop) if is_whole else None

    def read(self, data: Tensor, settings: str) -> dict[str, SavedLayer] | None:
        """The layers of the adapter in the bytes of a file, if it is such a one."""
        known, span = self._data, self._span
        if span is None or settings != self._settings or data.shape != known.shape:
            return None
        head, tail = slice(4 * span[0]), slice(4 * span[1], None)
        if not (torch.equal(data[head], known[head]) and torch.equal(data[tail], known[tail])):
            return None
        numbers = data[head.stop : tail.start].clone().view(torch.float32)  # without the labels, which layers share
        layers = dict[str, SavedLayer]()
        for path, each in self.layers.items():
            parts = each.A, each.B, each.block_scale
            A, B, scale = [numbers.as_strided(p.shape, p.stride(), p.storage_offset() - span[0]) for p in parts]
            layers[path] = replace(each, A=A, B=B, block_scale=scale)
            layers[path].__dict__.update(digest=each.digest, kind=each.kind)  # the blocks are the same
        return layers


def saved_config(folder: str | Path) -> dict[str, Any]:
    """The content of an adapter's config; empty if it can't be read, which its loader then reports."""
    try:
        saved = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def is_smoa(folder: str | Path) -> bool:
    """Whether the folder's config is a SMoA adapter's; a folder without a readable one is left to the engine."""
    return saved_config(folder).get("peft_type") == "SMOA"


def read_layers(folder: str, shape_of: Callable[[str], Shape | str], known: list[Template]) -> dict[str, SavedLayer]:
    """The checked factors of each layer, by its name in the adapter: by a template that it fits, or it becomes one.

    Args:
        folder: The adapter's.
        shape_of: Gives (out_features, in_features) of the layer of a name, or why it can't be adapted.
        known: What was read before.
    """
    config = SmoaConfig.from_pretrained(folder)
    given = {name: getattr(config, name) for name in ("modules_to_save", "trainable_token_indices")}
    given |= {"target_parameters": config.target_parameters, "bias": config.bias if config.bias != "none" else None}
    refused = [f"{name}={value!r}" for name, value in given.items() if value]
    if refused:
        raise ConfigError(f"{folder}: has {', '.join(refused)}; {REMEDY}")
    content = Path(folder, SAFETENSORS_WEIGHTS_NAME).read_bytes()
    data = torch.from_numpy(numpy.frombuffer(content, numpy.uint8).copy())
    settings = json.dumps(config.to_dict(), default=sorted, sort_keys=True)
    for template in known:
        if (layers := template.read(data, settings)) is not None:
            return layers
    tensors = load(content)
    with suppress(RuntimeError):  # of one that is at no multiple of its dtype's size
        tensors = _views(tensors, data)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix(PREFIX).partition(".smoa_")
        if f"smoa_{part}" not in PARTS:
            raise ConfigError(f"{folder}: has {key}; {REMEDY}")
        found.setdefault(layer, {})[f"smoa_{part}"] = tensor
    shapes = {path: shape_of(path) for path in sorted(found)}
    refused = [f"{path} ({shape})" for path, shape in shapes.items() if isinstance(shape, str)]
    if refused:
        raise ConfigError(f"{folder}: adapts {refused[0]}; {REMEDY}")
    right = {path: shape for path, shape in shapes.items() if not isinstance(shape, str)}
    layers = _checked(found, right, config, folder)
    known[:] = [Template(layers, settings, data), *known[: MOST_TEMPLATES - 1]]
    return layers


def _checked(
    found: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, int]], config: SmoaConfig, source: str
) -> dict[str, SavedLayer]:
    """The layers of these shapes, of tensors by layer and part."""
    by_name = config.rank_pattern or config.alpha_pattern or config.num_blocks_pattern

    @cache
    def sizes_of(path: str, shape: tuple[int, int]) -> tuple[tuple[int, ...], float, tuple[tuple[int, ...], ...]]:
        ranks = config.ranks_of(path, shape=shape)
        return ranks, config.alpha_of(path, sum(ranks), shape) / sum(ranks), saved_shapes(shape, ranks)

    layers = dict[str, SavedLayer]()
    with named(source):
        for path, shape in shapes.items():
            ranks, scaling, sizes = sizes_of(path if by_name else "", shape)
            own = found[path]
            wrong = [
                part for part, size in zip(PARTS, sizes, strict=True) if part not in own or own[part].shape != size
            ]
            if wrong:
                raise AdapterFileError(f"{path}.{wrong[0]} is missing or doesn't fit the layer")
            with named(path):
                for part in LABELS:
                    check_labels(own[part], len(ranks), part)
            A, B, rows, cols, scale = (own[part] for part in PARTS)
            layers[path] = SavedLayer(ranks, config.modulation, scaling, A, B, rows, cols, scale.float())
    return layers


def _views(tensors: Mapping[str, Tensor], data: Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of its bytes."""
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    own = {key: data[start:][slice(*header[key]["data_offsets"])] for key in tensors}
    return {key: own[key].view(tensor.dtype).view(tensor.shape) for key, tensor in tensors.items()}
