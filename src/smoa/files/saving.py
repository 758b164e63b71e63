"""What `save_pretrained` writes of an adapter, and what it refuses to write or warns of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smoa.errors import AdapterFileError, first_of, named
from smoa.files.names import (
    COMPILED,
    PARTS,
    PREFIX,
    adapter_layers,
    embeddings_of,
    key_of,
    saved_names,
    trained_biases,
)
from smoa.layers.adapter import Adapter, no_partition_any_more
from smoa.layers.distributed import LABELS, SCALE, is_distributed, plain_name
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import as_labels


def adapter_tensors(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: Any = ()
) -> dict[str, Tensor]:
    """The tensors of an adapter among those of a model, by their names in a file, before PEFT takes the adapter's name
    out; blocks that are pending are decided.

    Raises:
        PartitionError: the labels are no partition any more.
        AdapterFileError: tensors are missing, or ZeRO-3 has left them empty.
    """
    layers, names = adapter_layers(model, adapter_name), saved_names(model)
    for name, layer in layers.items():
        layer.decide_partition(adapter_name)  # in place: the tensors in `state_dict` see it
        layer.derive()
        if not layer.adapters[adapter_name].is_valid():
            with named(name):
                raise no_partition_any_more(repr(adapter_name))
    for name, layer in embeddings_of(model).items():
        if isinstance(layer, SmoaLayer):  # PEFT saves its table too
            layer.unmerge_saved(state_dict, f"{plain_name(name)}.base_layer.")
    keys = [key_of(name, part, adapter_name) for name, part in product(layers, PARTS)]
    bare = {key.replace(COMPILED, "."): key for key in keys}  # as torch.distributed.checkpoint names them
    state_dict = state_dict | {bare[key]: tensor for key, tensor in state_dict.items() if key in bare}
    selected = trained_biases(model, state_dict, config, adapter_name)
    missing = []
    for name, part in product(layers, PARTS):
        if (key := key_of(name, part, adapter_name)) in state_dict:
            saved_as, adapter = key_of(names.get(name, name), part, adapter_name), layers[name].adapters[adapter_name]
            selected[saved_as] = _as_saved(key, part, state_dict[key], adapter)
        else:
            missing.append(key)
    check_gathered(selected, missing)
    report_untrained(adapter_name, state_dict, layers, names)
    return selected


def _as_saved(key: str, part: str, tensor: Tensor, adapter: Adapter) -> Tensor:
    """Labels and scales in their own dtypes, also where a caller has made all of a state dict float32 or bfloat16."""
    if part in LABELS and (tensor := as_labels(tensor)).dtype != torch.uint8:
        raise AdapterFileError(
            f"{key}: holds no labels ({tensor.dtype}); give save_pretrained the model's own state dict"
        )
    if part != SCALE or tensor.dtype == torch.float32:
        return tensor
    return adapter.derived().block_scale.to(tensor.device)


def check_gathered(state_dict: dict[str, Tensor], missing: Sequence[str]) -> None:
    """Refuse to save less than the whole adapter, or tensors that ZeRO-3 has left empty. Only rank 0 saves, so others
    are not checked."""
    empty = sorted(key for key, tensor in state_dict.items() if tensor.numel() == 0)
    if is_distributed() and dist.get_rank() > 0:
        return
    if missing:
        raise AdapterFileError(
            f"the state dict to save lacks {len(missing)} tensor(s) of the adapter: {first_of(missing)}; give "
            "save_pretrained the whole state dict of the model, or none"
        )
    if empty:
        raise AdapterFileError(
            f"{first_of(empty, 1)}: empty, because DeepSpeed ZeRO-3 has partitioned these weights; "
            "gather them on every rank: save_pretrained(folder, state_dict=accelerator.get_state_dict(engine))"
        )


def report_untrained(
    adapter_name: str, state_dict: Mapping[str, Tensor], layers: Mapping[str, SmoaLayer], names: Mapping[str, str]
) -> None:
    """Warn of layers whose ΔW is zero after training: the loss does not depend on them.

    That there was training is seen from other layers or `modules_to_save`. Layers whose names differ only in numbers
    count as one, because some batches skip a layer or use few experts. `names` are from `saved_names`.
    """
    here = {key: tensor for key, tensor in state_dict.items() if type(tensor) is Tensor and not tensor.is_meta}
    trained: dict[str, bool] = {}
    for name, layer in layers.items():
        factors = {key_of(name, part, adapter_name) for part in PARTS[:2]}
        if factors <= here.keys() and any(factor.requires_grad for factor in layer.smoa_B[adapter_name].parameters()):
            kind = re.sub(r"\b\d+\b", "*", names.get(name, name).removeprefix(PREFIX))
            # One factor starts at zero; hot-swapping sets both to zero
            trained[kind] = trained.get(kind, False) or len({bool(here[factor].any()) for factor in factors}) == 1
    untrained = [kind for kind, is_trained in trained.items() if not is_trained]
    own = f".modules_to_save.{adapter_name}."
    copies = ((here[key], here.get(key.replace(own, ".original_module."))) for key in here if own in key)
    if untrained and (any(trained.values()) or any(b is not None and (a != b.to(a)).any() for a, b in copies)):
        warnings.warn(
            f"training left ΔW of {adapter_name!r} at zero in {first_of(untrained)}: the model uses their weights "
            "without calling these layers, or no batch reached them; leave them out, as with exclude_modules",
            stacklevel=2,
        )
