"""SmoaModel: PEFT's tuner for SMoA."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from smoa.adapter_names import call_by_names
from smoa.combining import Combination, check_combination, check_layer, combined_config, fill_combined
from smoa.config import SmoaConfig
from smoa.conv import Convolution
from smoa.embedding import Embedding
from smoa.errors import UnsupportedModuleError
from smoa.experts import ParamWrapper, warn_of_experts, wrapper_of
from smoa.generation import watch_generate
from smoa.layer import SmoaLayer, around_adapters, smoa_layers
from smoa.linear import Linear
from smoa.quantized import QuantizedLinear, find_backend, keep_unpacked

LAYERS: dict[type[nn.Module], type[SmoaLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
}
"""The adapted layer of each class, and of its subclasses."""


class SmoaModel(BaseTuner):
    """A model with SMoA adapters; made by `get_peft_model(model, SmoaConfig(...))`."""

    prefix: str = "smoa_"
    tuner_layer_cls = SmoaLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _add_modules_to_save_to_tie: Any = getattr(LoraModel, "_add_modules_to_save_to_tie", None)  # not in 0.18

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `inject_adapter`, which decomposes no weight if labels will be loaded."""
        config: Any = self.peft_config[adapter_name]
        given = kwargs.get("state_dict"), kwargs.get("low_cpu_mem_usage"), config.inference_mode, config.was_saved
        self._defers = any(given)
        if not self._defers and len(self.peft_config) == 1:
            warn_of_experts(model, config)
        with tqdm(desc="SMoA partitions", unit="layer", delay=1, leave=False, disable=self._defers or None) as bar:
            self._count = bar.update
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                del self._count  # it holds the terminal, which can't be copied
        watch_generate(self.model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """As PEFT's, which wants targets, unless `target_parameters` names some (as in LoRA)."""
        known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if "bitsandbytes" in sys.modules and len(self.peft_config) == 1:  # later adapters find it done
            for module in model.modules():
                keep_unpacked(module)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        of = adapter_name, peft_config, current_key
        known = target if parameter_name is None else wrapper_of(target, parameter_name)
        if isinstance(known, SmoaLayer):
            known.update_layer(*of, defer_partition=self._defers)
            return
        if is_piece(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target):
            raise UnsupportedModuleError(
                f"{current_key}: tensor parallelism gives each process a piece of the weight, and blocks span all of "
                "it; load the model without tp_plan (FSDP works)"
            )
        if parameter_name is None:
            layer: SmoaLayer = adapted(target, self.model, *of, self._defers)
        else:
            layer = ParamWrapper(target, *of, defer_partition=self._defers)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if not self.training:  # nor does a new layer's dropout act in a model that evaluates
            layer.eval()
        self._replace_module(parent, target_name, layer, target)
        self._count()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # it is on its device already; PEFT would move it to the meta device of an offloaded weight, and, as it unloads,
        # look for the weight of a wrapper of experts
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: Combination = "cat"
    ) -> None:
        """Add the adapter `adapter_name` = Σ weights·adapters, negative weights included.

        Args:
            combination_type: "cat" is exact and sums the ranks; "linear" keeps the rank and is approximate.

        Raises:
            MergeError: an adapter is unknown or trains more than layers, or the adapters don't share partition,
                modulation and layers.
        """
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type)
        config = combined_config([self.peft_config[name] for name in adapters], combination_type)  # type: ignore[misc]
        layers = {n: layer for n, layer in smoa_layers(self.model).items() if {*adapters} & {*layer.smoa_A}}
        for name, layer in layers.items():
            check_layer(name, layer, adapters)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            fill_combined(layer, adapters, weights, adapter_name, combination_type)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        modules = around_adapters(self.model) if kwargs.get("adapter_names") is not None else ()
        return call_by_names(self, [each for _, each in modules if isinstance(each, AuxiliaryTrainingWrapper)], kwargs)


def adapted(
    target: nn.Module, model: nn.Module, adapter_name: str, config: SmoaConfig, name: str, defers: bool
) -> SmoaLayer:
    """A module of a model, perhaps with adapters of another method, with a new adapter of this name and config."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = find_backend(base, model, tuple(LAYERS))
    if backend is not None:
        kind: type[SmoaLayer] | None = QuantizedLinear
    else:
        kind = next((own for known, own in LAYERS.items() if isinstance(base, known)), None)
    if kind is None:
        known = ", ".join(f"torch.nn.{each.__name__}" for each in LAYERS if each is not Conv1D)
        raise UnsupportedModuleError(
            f"{name}: Target module {type(base).__name__} is not supported. SMoA adapts {known}, transformers' Conv1D, "
            "linear layers quantized by bitsandbytes, torchao or HQQ, and parameters of experts (target_parameters)"
        )
    return kind(target, adapter_name, config, name, isinstance(base, Conv1D), defers, backend)


def is_piece(module: nn.Module) -> bool:
    """Whether tensor parallelism has given each process a piece of a module's weights. FSDP2 gathers its own first."""
    weights = [each for each in module.parameters(recurse=False) if isinstance(each, DTensor)]
    is_sharded = any(place.is_shard() for each in weights for place in each.placements)
    has_hooks = bool(module._forward_pre_hooks or module._forward_hooks) and "FSDP" not in type(module).__name__
    return getattr(module, "_hf_tp_plan", None) is not None or (is_sharded and has_hooks)
