"""What a saved adapter must hold before a tensor of it reaches the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import AdapterFileError, PartitionError
from .layer import SmoaLayer
from .spectrum import check_labels

LABELS = ("smoa_row_labels", "smoa_col_labels")
FACTORS = ("smoa_A", "smoa_B")


def check_adapter_state(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Check the tensors about to be loaded, keyed as in the model, against the layers that have the adapter.

    Raises:
        AdapterFileError: a factor or label vector is missing, superfluous, of a wrong shape or dtype or not finite, or
            the labels are not a partition of their layer.
    """
    expected = dict(_expected_tensors(model, adapter_name))
    found = {key for key in state_dict if ".smoa_" in key}
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or extra:
        raise AdapterFileError(_difference("lacks", missing) + _difference("has unknown", extra))
    for key, (layer, name) in expected.items():
        _check_tensor(key, state_dict[key], layer, name, adapter_name)


def _expected_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, tuple[SmoaLayer, str]]]:
    for module_name, layer in model.named_modules():
        if isinstance(layer, SmoaLayer) and adapter_name in layer.smoa_A:
            module_name = module_name.removeprefix("_fsdp_wrapped_module.")
            for name in FACTORS:
                yield f"{module_name}.{name}.{adapter_name}.weight", (layer, name)
            for name in LABELS:
                yield f"{module_name}.{name}.{adapter_name}", (layer, name)


def _difference(verb: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"the adapter file {verb} {len(keys)} tensor(s): {', '.join(keys[:3])}{more}; "


def _check_tensor(key: str, tensor: Tensor, layer: SmoaLayer, name: str, adapter_name: str) -> None:
    layout = layer.layout[adapter_name]
    if name in LABELS:
        size = layout.out_features if name == "smoa_row_labels" else layout.in_features
        if tensor.shape != (size,):
            raise AdapterFileError(f"{key}: shape {tuple(tensor.shape)} doesn't fit the layer, expected ({size},)")
        try:
            check_labels(tensor, layout.num_blocks, key)
        except PartitionError as error:
            raise AdapterFileError(f"{error}; the adapter was made for another layer or num_blocks") from None
        return
    shape = layout.shape_A if name == "smoa_A" else layout.shape_B
    if tensor.shape != shape or not tensor.is_floating_point():
        raise AdapterFileError(f"{key}: {tensor.dtype} {tuple(tensor.shape)} found, floating point {shape} expected")
    if not torch.isfinite(tensor).all():
        raise AdapterFileError(f"{key}: holds NaN or infinite values; the adapter is broken")
