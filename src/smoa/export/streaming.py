"""Merges a saved adapter into a checkpoint on disk, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import AdapterFileError, MergeError
from smoa.export.shards import FLOATS, Checkpoint, HeaderEntry, write_checkpoint
from smoa.export.stream_targets import StreamTarget, separate_experts, target_of
from smoa.files.loading import read_adapter
from smoa.files.names import PARTS, PREFIX
from smoa.layers.experts.layout import Layout
from smoa.layers.layer import as_matrix, as_stored
from smoa.maths.blocks import Blocks
from smoa.maths.factors import Factors
from smoa.maths.modulations import MODULATIONS
from smoa.maths.scale import rank_scale
from smoa.maths.stack import Stack, stacked_blocks
from smoa.maths.update import Update


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

    def add(self, name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        """Add one layer.

        Args:
            name: Name of the layer.
            before: Weight before the merge, float32 or wider.
            after: Weight after the merge, in the same dtype.
            dtype: Dtype in which it is saved.

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


class SavedAdapter:
    """The tensors of an adapter's file, by the base model's module names.

    Raises:
        AdapterFileError: the file is damaged, comes from another adapter than its config, or lacks tensors of a layer.
    """

    def __init__(self, folder: str | Path, config: SmoaConfig) -> None:
        self.config = config
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.others: dict[str, Tensor] = {}
        for key, tensor in read_adapter(folder).items():
            name = key.removeprefix(PREFIX)
            module, found, part = name.partition(".smoa_")
            if found:
                self.layers.setdefault(module, {})["smoa_" + part] = tensor
            elif ".original_module." not in name and ".modules_to_save." not in name:  # also saved under the plain name
                self.others[name.replace(".base_layer.", ".")] = tensor
        for module, parts in self.layers.items():
            if parts.keys() != set(PARTS):
                raise AdapterFileError(f"{folder}: {module} has {sorted(parts)}, expected {sorted(PARTS)}")

    def merged(self, target: StreamTarget, weight: Tensor) -> Tensor:
        """`W + ΔW` of what a tensor of the checkpoint holds, in its shape and in float32 or wider."""
        if target.layout is not None:
            return self._merged_experts(target, target.layout, weight)
        pristine = as_matrix(weight, target.transposed)
        merged = _sum(pristine, self._update(target.name).delta(pristine))
        return as_stored(merged, weight.shape, target.transposed)

    def _merged_experts(self, target: StreamTarget, layout: Layout, weight: Tensor) -> Tensor:
        stack = self._stack(target.name, layout)
        if target.number is not None:
            return _sum(weight, stack.update(target.number).delta(weight))
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        matrices = (matrix for expert in layout.matrices(merged) for matrix in expert)  # views
        for number, matrix in enumerate(matrices):
            matrix.copy_(_sum(matrix, stack.update(number).delta(matrix)))
        return merged

    def _stack(self, name: str, layout: Layout) -> Stack:
        """ΔW of the matrices of experts.

        Raises:
            AdapterFileError: the tensors don't fit the parameter.
        """
        tensors, count, shape = self.layers[name], layout.count, layout.shape
        A, B, rows, cols, block_scale = (tensors[part] for part in PARTS)
        ranks = self.config.ranks_of(name, shape=shape)
        r = sum(ranks)
        if (rows.shape[-1], cols.shape[-1]) != shape or len(A) != count * r:
            raise AdapterFileError(f"{name}: the adapter is for a parameter of another shape than {layout}")
        scale = rank_scale(block_scale.float(), ranks)
        parts = A.unflatten(0, (count, r)).unbind(), B.unflatten(1, (count, r)).unbind(1)
        blocks, modulation = stacked_blocks(rows, cols, len(ranks)), MODULATIONS[self.config.modulation]
        return Stack(*parts, ranks, self.config.alpha_of(name, r, shape) / r, scale, blocks, modulation)

    def _update(self, module: str) -> Update:
        """ΔW of one layer.

        Raises:
            PartitionError: the labels are not a partition of this weight.
        """
        A, B, rows, cols, block_scale = (self.layers[module][part] for part in PARTS)
        shape = (len(rows), len(cols))
        ranks = self.config.ranks_of(module, len(A), shape)
        scaling = self.config.alpha_of(module, len(A), shape) / len(A)
        factors = Factors(A, B, ranks, scaling, rank_scale(block_scale.float(), ranks), Blocks(rows, cols, len(ranks)))
        return Update(factors, MODULATIONS[self.config.modulation])


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """`W + ΔW`, which overwrites ΔW, with the exact bits of W where nothing is added: -0 + 0 is 0."""
    return torch.where(delta == 0, weight, delta.add_(weight))


@dataclass(frozen=True)
class StreamPlan:
    """What changes in the checkpoint, by key: what each adapted tensor holds, and the tensors to replace."""

    weights: dict[str, StreamTarget]
    replaced: dict[str, Tensor]


def plan_stream(adapter: SavedAdapter, model: PreTrainedModel, checkpoint: Checkpoint) -> StreamPlan | None:
    """Match the adapter's names with the checkpoint's.

    Args:
        adapter: The adapter.
        model: The base model, may be on the meta device.
        checkpoint: The base model's files.

    Returns:
        None if the merge needs a loaded model: transformers renames or converts the keys of what changes while loading,
        only one of several tied weights changes, or the vocabulary was resized.

    Raises:
        AdapterFileError: the model lacks a module that is adapted.
    """
    targets = {name: target_of(name, model) for name in adapter.layers}
    missing = sorted(name for name, target in targets.items() if target is None)
    if missing:
        raise AdapterFileError(
            f"the adapter is for {missing[0]} and {len(missing) - 1} more that {type(model).__name__} does not have; "
            "give the base model it was trained on"
        )
    weights: dict[str, StreamTarget] = {}
    apart: dict[str, StreamTarget] = {}
    prefixes = ("", f"{getattr(model, 'base_model_prefix', '')}.")
    for name, target in targets.items():
        assert target is not None, "those that are missing were refused"
        separate = separate_experts(target, prefixes, checkpoint)
        apart |= separate
        weights |= {} if separate else {name if target.layout else f"{name}.weight": target}
    if any(name in _tied_names(model) for name in (*weights, *adapter.others)):
        return None
    keys = {name: _key_of(name, model, checkpoint) for name in (*weights, *adapter.others)}
    unfound = {name for name, key in keys.items() if key not in checkpoint.entries}
    if unfound & weights.keys() or not unfound <= _missing(model, checkpoint, unfound):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in adapter.others.items() if name in shapes}
    given |= {name: checkpoint.entries[keys[name]].shape for name in weights}
    if any(shapes[name] != shape for name, shape in given.items()):
        return None
    return StreamPlan(
        {keys[name]: target for name, target in weights.items()} | apart,
        {keys[name]: tensor for name, tensor in adapter.others.items()},
    )


def _missing(model: PreTrainedModel, checkpoint: Checkpoint, names: Collection[str]) -> set[str]:
    """Those of the names that the checkpoint has under no key, such as a new head's.

    transformers, which renames keys while it loads, says so. It gets tensors without data.
    """
    if not names:
        return set()
    tensors = {key: torch.empty(entry.shape, device="meta") for key, entry in checkpoint.entries.items()}
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it lists the missing keys
    logging.disable_progress_bar()
    try:
        options: Any = {"state_dict": tensors, "output_loading_info": True, "ignore_mismatched_sizes": True}
        found: Any = type(model).from_pretrained(None, config=model.config, device_map="meta", **options)
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
    return set(names).intersection(found[1]["missing_keys"])


def _tied_names(model: nn.Module) -> set[str]:
    """Names of parameters that have several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _key_of(name: str, model: nn.Module, checkpoint: Checkpoint) -> str:
    """Key of a parameter: the name, or the name without or with the prefix of models with a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    others = (name.removeprefix(prefix), prefix + name)
    return next((key for key in (name, *others) if key in checkpoint.entries), name)


@torch.no_grad()
def stream_merge(
    adapter: SavedAdapter,
    plan: StreamPlan,
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
) -> RoundingLoss:
    """Write the merged checkpoint into `folder`, in `dtype` or each tensor's own.

    Raises:
        MergeError: a merged weight is not finite.
    """
    entries = {key: entry.cast(dtype) for key, entry in checkpoint.entries.items()}
    for key, tensor in plan.replaced.items():
        kept = FLOATS.get(entries[key].dtype) if key in entries else None
        entries[key] = HeaderEntry.of(tensor).cast(dtype or kept)
    loss = RoundingLoss()

    def read(key: str) -> Tensor:
        tensor = plan.replaced[key] if key in plan.replaced else checkpoint.read(key)
        if key not in plan.weights:
            return tensor
        target = plan.weights[key]
        merged = adapter.merged(target, tensor)
        loss.add(target.label, tensor.to(merged.dtype), merged, FLOATS[entries[key].dtype])
        return merged

    write_checkpoint(folder, entries, read, max_shard_size)
    return loss
