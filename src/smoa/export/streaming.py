"""Merges a saved adapter into a checkpoint on disk, one tensor at a time.

A tensor of the checkpoint holds the weight of a layer, all matrices of a parameter of experts, or one of them, which
transformers joins while it loads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, MergeError, first_of
from smoa.export.checkpoint import Shards, write_checkpoint
from smoa.files.layers import Loaded
from smoa.files.loading import read_adapter
from smoa.files.names import PREFIX
from smoa.layers.kinds import kind_of
from smoa.layers.layer import as_matrix, as_stored
from smoa.maths.experts import HALVED, Layout

SEPARATE = {
    HALVED: (("gate_proj.weight", "up_proj.weight"), ("w1.weight", "w3.weight")),
    "down_proj": (("down_proj.weight",), ("w2.weight",)),
}
"""Names that checkpoints give to the matrices of one expert, which transformers joins while it loads."""
FOLDERS = (".mlp.", ".block_sparse_moe.")
"""Names of the module that holds the experts: transformers' own, and Mixtral's in checkpoints."""


@dataclass
class RoundingLoss:
    """‖error of ΔW‖ / ‖ΔW‖ after rounding to the saved dtype, by layer and over all layers."""

    dtype: torch.dtype = torch.float32
    by_layer: dict[str, float] = field(default_factory=dict)
    update: float = 0.0
    error: float = 0.0

    @property
    def total(self) -> float:
        """The relative error over all layers, 0 if nothing changes."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0

    def in_words(self) -> str:
        """One sentence on how much rounding changed the update, over all layers and in the worst one."""
        if self.total == 0:
            return "rounding took nothing from the adapter's update."
        worst = max(self.by_layer, key=self.by_layer.__getitem__)
        return (
            f"rounding took {100 * self.total:.2g} % of the adapter's update "
            f"(‖error‖ / ‖ΔW‖; the most in {worst}: {100 * self.by_layer[worst]:.2g} %)."
        )

    def add(self, name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        """Add one layer, given its weight before and after the merge, in float32 or wider, and the dtype to save it in.

        Raises:
            MergeError: the merged weight is not finite in the dtype.
        """
        rounded = after.to(dtype)
        if not torch.isfinite(rounded).all():
            raise MergeError(
                f"{name}: the merged weight is NaN, infinite or out of the range of {dtype}; the adapter is "
                "broken, or needs float32 or bfloat16"
            )
        change = after - before
        # compare with the change that is left after rounding both weights
        lost = rounded.to(after.dtype) - before.to(dtype).to(after.dtype) - change
        update, error = (float(torch.linalg.vector_norm(part)) ** 2 for part in (change, lost))
        self.dtype = dtype
        self.by_layer[name] = (error / update) ** 0.5 if update else 0.0
        self.update += update
        self.error += error


@dataclass(frozen=True)
class StreamTarget:
    """What one tensor of a checkpoint holds.

    Args:
        name: Name of the adapted layer or parameter.
        transposed: The tensor is a layer's weight stored as (in_features, out_features).
        layout: How a parameter holds the matrices of experts; None for a layer.
        number: The matrix that the tensor is, if it is one of a parameter's.
    """

    name: str
    transposed: bool = False
    layout: Layout | None = None
    number: int | None = None


class SavedAdapter:
    """The tensors of an adapter's file, by the base model's module names.

    Raises:
        AdapterFileError: the file is damaged, or comes from another adapter than its config.
    """

    def __init__(self, folder: str | Path, config: SmoaConfig) -> None:
        self.source, self.config = str(folder), config
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.others: dict[str, Tensor] = {}
        self.checked: dict[str, Loaded] = {}
        for key, tensor in read_adapter(folder).items():
            name = key.removeprefix(PREFIX)
            module, is_ours, part = name.partition(".smoa_")
            if is_ours:
                self.layers.setdefault(module, {})["smoa_" + part] = tensor
            elif ".original_module." not in name and ".modules_to_save." not in name:  # also saved under the plain name
                self.others[name.replace(".base_layer.", ".")] = tensor

    def check(self, target: StreamTarget, weight: Tensor) -> None:
        """Raise AdapterFileError unless a target's tensors are whole and fit its weight, or its layout."""
        layout, parts = target.layout, self.layers[target.name]
        out_features, in_features = as_matrix(weight, target.transposed).shape if layout is None else layout.shape
        shape = out_features, in_features
        self.checked[target.name] = Loaded.checked(target.name, shape, self.config, parts, self.source, layout)

    def merged(self, target: StreamTarget, weight: Tensor) -> Tensor:
        """`W + ΔW` of what a tensor of the checkpoint holds, in its shape and in float32 or wider."""
        update = self.checked[target.name].update
        if target.layout is None:
            pristine = as_matrix(weight, target.transposed)
            merged = _sum(pristine, update().delta(pristine))
            return as_stored(merged, weight.shape, target.transposed)
        if target.number is not None:
            return _sum(weight, update(target.number).delta(weight))
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        matrices = (matrix for expert in target.layout.matrices(merged) for matrix in expert)  # views
        for number, matrix in enumerate(matrices):
            matrix.copy_(_sum(matrix, update(number).delta(matrix)))
        return merged


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """`W + ΔW`, which overwrites ΔW, with the exact bits of W where nothing is added: -0 + 0 is 0."""
    return torch.where(delta == 0, weight, delta.add_(weight))


def target_of(name: str, model: nn.Module) -> StreamTarget | None:
    """The target of an adapted layer or parameter; None if the model does not have it."""
    module_name, _, parameter = name.rpartition(".")
    modules = dict(model.named_modules())
    if name in modules:
        kind = kind_of(modules[name])
        return StreamTarget(name, kind is not None and kind.fan_in_fan_out)
    if hasattr(modules.get(module_name), parameter):
        return StreamTarget(name, layout=Layout.of(modules[module_name], parameter))
    return None


def separate_experts(target: StreamTarget, prefixes: Collection[str], checkpoint: Shards) -> dict[str, StreamTarget]:
    """The tensors of each expert's matrices by their keys, if the checkpoint has all of them; else none.

    `prefixes` may stand before the parameter's name in the checkpoint's keys.
    """
    layout, (module, _, parameter) = target.layout, target.name.rpartition(".")
    if layout is None:
        return {}
    for prefix in prefixes:
        for folder in FOLDERS:
            place = (prefix + module).replace(FOLDERS[0], folder)
            for names in SEPARATE.get(parameter, ()):
                keys = [f"{place}.{expert}.{name}" for expert in range(layout.experts) for name in names]
                entries = [checkpoint.entries.get(key) for key in keys]
                if all(entry is not None and entry.shape == layout.shape for entry in entries):
                    numbered = enumerate(keys)
                    return {key: StreamTarget(target.name, layout=layout, number=number) for number, key in numbered}
    return {}


StreamPlan = tuple[dict[str, StreamTarget], dict[str, Tensor]]
"""What changes in a checkpoint, by key: what each adapted tensor holds, and the tensors that take another's place."""


def plan_stream(adapter: SavedAdapter, model: PreTrainedModel, checkpoint: Shards) -> StreamPlan | None:
    """Match the adapter's names with those of the checkpoint. The model may be on the meta device.

    Returns:
        None if the merge needs a loaded model: transformers renames or converts the keys of what changes while loading,
        only one of several tied weights changes, or the vocabulary was resized.

    Raises:
        AdapterFileError: the model lacks a module that is adapted, or the adapter's tensors are damaged or don't fit.
    """
    found = {name: target_of(name, model) for name in adapter.layers}
    targets = {name: target for name, target in found.items() if target is not None}
    missing = sorted(found.keys() - targets)
    if missing:
        raise AdapterFileError(
            f"the adapter is for {first_of(missing, 1)} that {type(model).__name__} does not have; "
            "give the base model it was trained on"
        )
    weights: dict[str, StreamTarget] = {}
    apart: dict[str, StreamTarget] = {}
    prefixes = ("", f"{getattr(model, 'base_model_prefix', '')}.")
    for name, target in targets.items():
        separate = separate_experts(target, prefixes, checkpoint)
        apart |= separate
        weights |= {} if separate else {name if target.layout else f"{name}.weight": target}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    if not tied.isdisjoint((*weights, *adapter.others)):
        return None
    keys = {name: _key_of(name, model, checkpoint) for name in (*weights, *adapter.others)}
    unfound = {name for name, key in keys.items() if key not in checkpoint.entries}
    if unfound & weights.keys() or not unfound <= _missing(model, checkpoint, unfound):
        return None
    own = model.state_dict()
    given = {name: tensor.shape for name, tensor in adapter.others.items() if name in own}
    given |= {name: checkpoint.entries[keys[name]].shape for name in weights}
    if any(own[name].shape != shape for name, shape in given.items()):
        return None
    for name, target in targets.items():
        adapter.check(target, own[name if target.layout else f"{name}.weight"])
    replaced = {keys[name]: tensor for name, tensor in adapter.others.items()}
    return {keys[name]: target for name, target in weights.items()} | apart, replaced


def _missing(model: PreTrainedModel, checkpoint: Shards, names: Collection[str]) -> set[str]:
    """Those of the names that the checkpoint has under no key, such as a new head's.

    transformers, which renames keys while it loads, says so. It gets tensors without data.
    """
    if not names:
        return set()
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it lists the missing keys
    logging.disable_progress_bar()
    try:
        options: Any = {
            "state_dict": dict(checkpoint.entries),
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        loaded: Any = type(model).from_pretrained(None, config=model.config, device_map="meta", **options)
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
    return set(names).intersection(loaded[1]["missing_keys"])


def _key_of(name: str, model: nn.Module, checkpoint: Shards) -> str:
    """Key of a parameter: the name, or the name without or with the prefix of models with a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    others = (name.removeprefix(prefix), prefix + name)
    return next((key for key in (name, *others) if key in checkpoint.entries), name)


@torch.no_grad()
def stream_merge(
    adapter: SavedAdapter,
    plan: StreamPlan,
    checkpoint: Shards,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
) -> RoundingLoss:
    """Write the merged checkpoint into `folder`, in `dtype` or each tensor's own.

    Raises:
        MergeError: a merged weight is not finite.
    """
    weights, replaced = plan
    entries = dict(checkpoint.entries)
    for key, tensor in replaced.items():
        entries[key] = torch.empty_like(tensor, dtype=entries.get(key, tensor).dtype, device="meta")
    if dtype is not None:
        entries = {key: entry.to(dtype) if entry.is_floating_point() else entry for key, entry in entries.items()}
    loss = RoundingLoss()

    def read(key: str) -> Tensor:
        tensor = replaced[key] if key in replaced else checkpoint.read(key)
        if key not in weights:
            return tensor
        target = weights[key]
        merged = adapter.merged(target, tensor)
        label = target.name if target.number is None else f"{target.name}[{target.number}]"
        loss.add(label, tensor.to(merged.dtype), merged, entries[key].dtype)
        return merged

    write_checkpoint(folder, entries, read, max_shard_size)
    return loss
