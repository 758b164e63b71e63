"""SmoaModel: PEFT's tuner for SMoA."""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager
from typing import Any

from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from tqdm.auto import tqdm

from smoa.compat import refuse_names
from smoa.errors import named
from smoa.files.checks import checked_tensors
from smoa.files.loading import incoming, untouched
from smoa.files.names import (
    PREFIX,
    is_own,
    without_adapter,
)
from smoa.files.saving import adapter_tensors
from smoa.layers.by_name import call_by_names, rows_unknown
from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import SmoaLayer, smoa_layers
from smoa.layers.quantized import keep_unpacked
from smoa.maths.spectrum import check_partition
from smoa.tuner.combining import Combination, check_combination, check_layer, combined_config, fill_combined
from smoa.tuner.generation import watch_generate
from smoa.tuner.merged import check_layers, check_merge_allowed, check_unmerge, losses_reported
from smoa.tuner.targets import check_target, existing_wrapper, survey_targets
from smoa.tuner.tying import refuse_source, ties_more_than_ends


class SmoaModel(BaseTuner):
    """A model with SMoA adapters; made by `get_peft_model(model, SmoaConfig(...))`.

    Raises:
        UnsupportedModuleError: a target is of a kind that SMoA can't adapt (`smoa.layers.kinds`).
        PartitionError: a target's weight has NaN or infinite entries, or K is larger than a side of it, and
            `num_blocks_pattern` sets it.
        ConfigError: a name in `target_parameters` matches nothing, or settings contradict each other on this model.
    """

    prefix: str = "smoa_"
    tuner_layer_cls = SmoaLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `inject_adapter`, which decomposes no weight while a saved adapter is being loaded."""
        refuse_names(self.peft_config)
        file = incoming()
        given = kwargs.get("state_dict"), kwargs.get("low_cpu_mem_usage")
        self._loads_labels = any(given) or file is not None
        self._inject(model, adapter_name, *args, **kwargs)
        if file is not None and file.tensors is not None:
            self.model.peft_config = self.peft_config
            tensors = {key.removeprefix(PREFIX): tensor for key, tensor in file.tensors.items()}
            set_peft_model_state_dict(self.model, tensors, adapter_name, ignore_mismatched_sizes=file.skips)
        watch_generate(self.model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """As PEFT's, which wants targets, unless `target_parameters` names some (as in LoRA)."""
        known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._progress: tqdm[Any] = tqdm(disable=True)
        try:
            with untouched(model):  # PEFT would take layers that are left for those of a second adapter
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # PEFT takes its name out again after an Exception, but not after Ctrl-C
            if not any(adapter_name in layer.smoa_A for layer in smoa_layers(self.model).values()):
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._progress.close()
            del self._progress  # it holds the terminal, which can't be copied or pickled

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """PEFT's warning of tied layers, unless they are tied by `ensure_weight_tying`."""
        if not peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Those of which PEFT warns before a merge: none if they stay tied."""
        configs: Any = self.peft_config.values()
        return [] if any(config.ensure_weight_tying for config in configs) else super()._get_tied_target_modules(model)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Report all unsuitable targets at once, before any module is replaced."""
        if "bitsandbytes" in sys.modules and len(self.peft_config) == 1:  # later adapters find it done
            for module in model.modules():
                keep_unpacked(module)
        if not self._loads_labels and sum(other is peft_config for other in self.peft_config.values()) < 2:
            check_partition(peft_config.partition)  # another adapter of the same config gives its labels
        self._targets = survey_targets(model, peft_config, self._check_target_module_exists, self._loads_labels)
        if not self._loads_labels:
            peft_config.quantized_base = any(target.backend is not None for target in self._targets.values())
        hidden = True if self._loads_labels or peft_config.partition != "spectral" else None  # terminals only
        self._progress = tqdm(total=len(self._targets), desc="SMoA partitions", unit="layer", delay=1, disable=hidden)

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
        loads, kind, known = self._loads_labels, None, target if isinstance(target, SmoaLayer) else None
        if parameter_name is None:
            found = self._targets.get(current_key)
            kind, _, backend = found or check_target(current_key, target, peft_config, self.model)
            self._progress.update()
        else:
            known = existing_wrapper(self.model, current_key)
        with named(current_key):
            if known is not None:
                known.update_layer(adapter_name, peft_config, current_key, defer_partition=loads)
                return
            if kind is None:
                layer: SmoaLayer = ParamWrapper(target, adapter_name, peft_config, current_key, defer_partition=loads)
            else:
                transposed = kind.fan_in_fan_out
                layer = kind.layer_class(target, adapter_name, peft_config, current_key, transposed, loads, backend)
                layer.rows_unknown = rows_unknown(self.model, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if not self.training:  # nor does a new layer's dropout act in a model that evaluates
            layer.eval()
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A SMoA layer is on its device already. PEFT would move it, which fails on the meta device, and assign the
        # child's weight, which may not be a parameter, or not be there (HQQ, experts).
        setattr(parent, child_name, new_module)

    # What PEFT calls on this class to save and load.
    is_own = staticmethod(is_own)
    _get_adapter_state_dict: Any = staticmethod(adapter_tensors)
    _remove_adapter_name_from_key: Any = staticmethod(without_adapter)
    _remap_adapter_state_dict_for_load: Any = staticmethod(checked_tensors)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's `merge_adapter`. All layers are checked before the first is changed, with `safe_merge` for NaN too."""
        check_layers(self.model, adapter_names, safe_merge)
        with losses_reported(self.model):
            super().merge_adapter(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """PEFT's `unmerge_adapter`. All layers are checked before the first one is changed."""
        check_unmerge(self.model)
        super().unmerge_adapter()  # type: ignore[no-untyped-call]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's `set_adapter`, which unmerges what is merged: all layers are checked before the first one."""
        check_unmerge(self.model)
        super().set_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        if merge:
            check_layers(self.model, adapter_names, safe_merge)
            refuse_source(self.model)
        stays_tied = ties_more_than_ends(self.model)
        with losses_reported(self.model), warnings.catch_warnings():
            if stays_tied:
                warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            unloaded: Any = super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        if stays_tied and not unloaded.config.tie_word_embeddings:
            unloaded.config.tie_word_embeddings = True
            warnings.warn(
                "the merged end has a weight of its own. config.tie_word_embeddings stays true, by which a saved model "
                "is loaded with all its ties; tie_weights, resize_token_embeddings and programs that read the config "
                "alone would tie the merged end again",
                stacklevel=2,
            )
        return unloaded

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
        self._loads_labels = True  # they come from the parts
        with untouched(self):
            self.peft_config[adapter_name] = config
            self._inject(self.model, adapter_name)
            for layer in layers.values():
                fill_combined(layer, adapters, weights, adapter_name, combination_type)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]  # PEFT leaves it without types
        check_merge_allowed(self.model)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return call_by_names(self, kwargs)
