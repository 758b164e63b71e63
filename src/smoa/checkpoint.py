"""What a saved adapter must hold before a tensor of it reaches the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import SmoaConfig
from .errors import AdapterFileError, PartitionError
from .layer import SmoaLayer
from .spectrum import check_labels

LABELS = ("smoa_row_labels", "smoa_col_labels")
FACTORS = ("smoa_A", "smoa_B")
FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_adapter_state(model: nn.Module, config: SmoaConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Check the tensors about to be loaded, keyed as in the model, against the layers that have the adapter.

    Raises:
        AdapterFileError: a factor or label vector is missing, superfluous, of a wrong shape or dtype or not finite, the
            labels are not a partition of their layer, a tensor would replace one that is not the adapter's, or the
            file it all came from is not the one that was saved.
    """
    try:
        _check_state(model, config, adapter_name, state_dict)
    except AdapterFileError as error:
        place = "" if config.weights_file is None else f"{config.weights_file}: "
        raise AdapterFileError(f"{place}{error}" + ("" if config.damage is None else f"; {config.damage}")) from None
    if config.damage is not None:
        raise AdapterFileError(f"{config.weights_file}: {config.damage}")
    config.weights_file = None  # what is loaded next may come from elsewhere


def _check_state(model: nn.Module, config: SmoaConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    expected = dict(_expected_tensors(model, adapter_name))
    found = {key for key in state_dict if ".smoa_" in key}
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    extra += sorted(_foreign_keys(model, config, state_dict.keys() - found))
    if missing or extra:
        raise AdapterFileError(_difference("lacks", missing) + _difference("has unknown", extra))
    for key, tensor in state_dict.items():
        if key in expected:
            _check_tensor(key, tensor, *expected[key], adapter_name)
        else:
            _check_finite(key, tensor)


def _foreign_keys(model: nn.Module, config: SmoaConfig, keys: Iterable[str]) -> Iterator[str]:
    """Keys of neither the adapter nor what PEFT saves beside it; PyTorch would write them over the base, or drop them.

    PEFT saves trained biases, modules_to_save and token embeddings (both inside wrappers of its own) and, where the
    vocabulary was resized, the embeddings.
    """
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    embeddings = [getter() for getter in getters if getter is not None]
    saved = tuple(
        name.removeprefix("_fsdp_wrapped_module.") + "."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or any(module is embedding for embedding in embeddings)
    )
    for key in keys:
        is_bias = config.bias != "none" and (key == "bias" or key.endswith(".bias"))
        if not is_bias and not key.startswith(saved):
            yield key


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
    if tensor.shape != shape or tensor.dtype not in FACTOR_DTYPES:
        raise AdapterFileError(f"{key}: {tensor.dtype} {tuple(tensor.shape)} found, floating point {shape} expected")
    _check_finite(key, tensor.to(layer.factors(adapter_name)[0].dtype))


def _check_finite(key: str, tensor: Tensor) -> None:
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # PyTorch can't tell for all of the 8-bit formats
    if tensor.is_floating_point() and not torch.isfinite(wide).all():
        raise AdapterFileError(f"{key}: holds NaN or infinite values; the adapter is broken")
