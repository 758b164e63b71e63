"""All of vLLM that the plugin replaces or reads, none of which is a public interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config.compilation import CompilationConfig, CompilationMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.lora import worker_manager
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from smoa.adapter import check_base
from smoa.compat import PREFIX
from smoa.config import SmoaConfig
from smoa.errors import ConfigError, named
from smoa.kernels.plan import RowsBySlot
from smoa.vllm.saved import SavedLayer, is_smoa, read_layers
from smoa.vllm.slots import Slots
from smoa.vllm.weights import places_of_rank, totals_of, weight_of

OPERATOR = "vllm::smoa_add"
EXAMPLES = "smoa_examples"
"""Key of vLLM's `additional_config`: folders of adapters, for the largest of which memory is reserved."""


def install() -> None:
    """Replace two functions of vLLM, once."""
    if not hasattr(worker_manager.create_lora_manager, "__smoa__"):
        _add_operator()
        worker = worker_manager.WorkerLoRAManager
        worker_manager.create_lora_manager = _creates(worker_manager.create_lora_manager)
        worker._load_adapter = _loads(worker._load_adapter)


def _add_operator() -> None:
    """The operator of a LoRA layer with SMoA: it finds the layer when it runs. vLLM cuts compiled models at it."""

    def smoa_add(output: Tensor, x: Tensor, layer_name: str) -> None:
        get_forward_context().no_compile_layers[layer_name].add_adapters(x, output)

    name = OPERATOR.rpartition(":")[2]
    direct_register_custom_op(name, eager_break_during_capture(smoa_add), mutates_args=["output"])
    original = CompilationConfig.set_splitting_ops_for_v1

    @wraps(original)
    def set_splitting_ops(self: Any, *args: Any, **kwargs: Any) -> None:
        is_default = self.splitting_ops is None
        original(self, *args, **kwargs)
        if is_default and self.splitting_ops:  # which are then part of the key of vLLM's cache of compiled models
            self.splitting_ops.append(OPERATOR)

    CompilationConfig.set_splitting_ops_for_v1 = set_splitting_ops


def _creates(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_lora_manager(*args: Any, **kwargs: Any) -> Any:
        manager, config = original(*args, **kwargs), kwargs["vllm_config"]
        more = config.additional_config if isinstance(config.additional_config, dict) else {}
        manager.smoa_refusal, manager.smoa_templates, manager.smoa_adapters = _refusal(manager, config), [], set()
        if manager.smoa_refusal is None:
            more["smoa"] = True  # the key of vLLM's cache has it: a model compiled without the operator serves the base
            _give_slots(manager, config)
            manager.smoa_places = dict(_places(manager))
            manager.smoa_renamed = _renaming(manager)
        for folder in more.get(EXAMPLES, []):
            _reserve(manager, folder)
        return manager

    create_lora_manager.__smoa__ = True  # type: ignore[attr-defined]
    return create_lora_manager


def _refusal(manager: Any, config: Any) -> str | None:
    """Why this engine can't serve SMoA adapters; its LoRA layers are then left alone."""
    compilation, mode = config.compilation_config, CompilationMode.VLLM_COMPILE
    layers = manager.modules.values()
    reasons = {
        "CUDA graphs of whole models (give -cc.cudagraph_mode=PIECEWISE)":
            compilation.cudagraph_mode.has_full_cudagraphs(),
        f"splitting_ops that lack {OPERATOR} (add it, or leave -cc.splitting_ops out)":
            compilation.mode == mode and OPERATOR not in compilation.splitting_ops,
        "pipeline parallelism (give --pipeline-parallel-size 1)": config.parallel_config.pipeline_parallel_size > 1,
        "fully sharded LoRAs (leave --fully-sharded-loras out)": config.lora_config.fully_sharded_loras,
        "compiled or captured encoders (unset compile_mm_encoder and cudagraph_mm_encoder)":
            any(getattr(compilation, each, False) for each in ("compile_mm_encoder", "cudagraph_mm_encoder")),
        "a second stream for LoRA (unset VLLM_LORA_ENABLE_DUAL_STREAM)":
            any(getattr(layer, "_enable_aux_cuda_stream", False) for layer in layers),
        "layers that are given some tokens of a batch (leave --kv-sharing-fast-prefill out)":
            getattr(config.cache_config, "kv_sharing_fast_prefill", False),
    }  # fmt: skip
    return "; nor with ".join(reason for reason, holds in reasons.items() if holds) or None


def _give_slots(manager: Any, config: Any) -> None:
    """Let the LoRA layers of a model take SMoA adapters too."""
    layers = {
        name: layer
        for name, layer in manager.modules.items()
        if isinstance(layer, BaseLinearLayerWithLoRA)
        # a classification head has one of its own, for a row of each request in place of each token
        and type(layer)._apply_lora_to_output is BaseLinearLayerWithLoRA._apply_lora_to_output
    }
    with_smoa = {kind: _with_smoa(kind) for kind in {type(layer) for layer in layers.values()}}
    for name, layer in layers.items():
        count = len(manager.packed_modules.get(name, [name]))
        sizes = layer.output_slices if count > 1 else [sum(layer.output_slices)]
        own = partial(places_of_rank, layer) if layer.tp_size > 1 else None
        layer.smoa = Slots(sizes, own, partial(weight_of, layer, config.model_config.dtype), layer.device)
        layer.smoa_name = f"{name}.smoa"  # vLLM's prefix of a layer may be empty
        layer.__class__ = with_smoa[type(layer)]
        context = config.compilation_config.static_forward_context
        if context.setdefault(layer.smoa_name, layer) is not layer:
            raise ConfigError(f"{name}: vLLM has another layer of this name already; serve one model in a process")
    for wrapper in {id(layer.punica_wrapper): layer.punica_wrapper for layer in layers.values()}.values():
        _follow(wrapper, manager.smoa_adapters)
    remove_all_adapters, activate_adapter = manager.remove_all_adapters, manager.activate_adapter

    def remove_all() -> None:  # after vLLM has measured memory, or replaced the weights, of which slots keep blocks
        remove_all_adapters()
        for layer in layers.values():
            layer.smoa.clear()

    manager.remove_all_adapters = remove_all
    manager.activate_adapter = torch.inference_mode()(activate_adapter)  # vLLM calls it within and without
    if hasattr(manager.model, "load_weights"):
        manager.model.load_weights = _forgets(manager, manager.model.load_weights)


def _forgets(manager: Any, load_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Let new weights remove the adapters, which vLLM reads again for their next request, as its own reloading does."""

    @wraps(load_weights)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return load_weights(*args, **kwargs)
        finally:
            manager.remove_all_adapters()

    return load


@torch.inference_mode()
def _reserve(manager: Any, folder: str) -> None:
    """Take the memory of as many adapters like this one as there are slots, before vLLM measures what is free. It is
    given back with the first adapters that are removed, and vLLM has counted it."""
    place = get_adapter_absolute_path(folder)
    if not is_smoa(place):
        raise ConfigError(f"additional_config: {EXAMPLES} names {folder}, which has no SMoA adapter; name one that has")
    layers = _read(manager, place)
    for name, layer in manager.modules.items():
        parts = [layers.get(own) for own in manager.packed_modules.get(name, [name])]
        if any(parts):
            layer.smoa.reserve(parts, manager.lora_slots)


def _follow(wrapper: Any, of_smoa: set[int]) -> None:
    """Keep the slot of each token of a batch. On a CPU, vLLM would multiply logits by LoRA's zeros if it has none."""
    original, add_to_logits = wrapper.update_metadata, wrapper.add_lora_logits

    @wraps(original)
    def update_metadata(mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> Any:
        adapters, slot_of = mapping.index_mapping, {adapter: slot for slot, adapter in enumerate(lora_index_to_id)}
        wrapper.smoa_rows = cache(lambda: RowsBySlot([slot_of[own] if own > 0 else -1 for own in adapters]))
        has_lora = not on_cpu or any(own > 0 and own not in of_smoa for own in set(adapters))
        wrapper.add_lora_logits = add_to_logits if has_lora else lambda *args, **kwargs: None
        return original(mapping, lora_index_to_id, *args, **kwargs)

    wrapper.update_metadata, wrapper.smoa_rows = update_metadata, lambda: RowsBySlot([])
    on_cpu = current_platform.is_cpu()


def _with_smoa(of_vllm: Any) -> type:
    """vLLM's class of a LoRA layer, with SMoA beside LoRA."""
    on_cpu, operator = current_platform.is_cpu(), torch.ops.vllm.smoa_add

    class WithSmoa(of_vllm):  # type: ignore[misc]
        def reset_lora(self, index: int) -> None:
            if not on_cpu or index in self.smoa.others:  # on a GPU, vLLM's sleep may leave anything there
                super().reset_lora(index)
            self.smoa.reset(index)

        def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
            self.reset_lora(index)
            parts = lora_a if isinstance(lora_a, list) else [lora_a]
            if any(isinstance(part, SavedLayer) for part in parts):
                self.smoa.set(index, parts)
                return
            try:
                super().set_lora(index, lora_a, lora_b)
            finally:  # it may fail halfway
                self.smoa.others.add(index)

        def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
            if not on_cpu:  # vLLM's LoRA is operators of its own on a GPU, and Python on a CPU
                output = super()._apply_lora_to_output(x, output)
            if is_forward_context_available() and (not on_cpu or torch.compiler.is_compiling()):
                operator(output, x, self.smoa_name)
            else:  # of a vision tower, whose calls have none
                self.add_adapters(x, output)
            return output

        def add_adapters(self, x: Tensor, output: Tensor) -> None:
            rows = self.punica_wrapper.smoa_rows() if self.smoa.stacks else None
            if on_cpu and (rows is None or not self.smoa.others.isdisjoint(rows.of_slot)):
                super()._apply_lora_to_output(x, output)
            if rows is not None:
                self.smoa.add_to(output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), rows)

    WithSmoa.__name__ = WithSmoa.__qualname__ = of_vllm.__name__
    return WithSmoa


def _read(manager: Any, folder: str) -> dict[str, SavedLayer]:
    """The factors of an adapter, checked, by vLLM's name of each layer before layers are fused."""
    if manager.smoa_refusal is not None:
        raise ConfigError(f"{folder}: SMoA adapters can't be served with {manager.smoa_refusal}")
    places, renamed, known = manager.smoa_places, manager.smoa_renamed, manager.smoa_templates
    layers = read_layers(folder, lambda path: places.get(renamed(path), "no LoRA layer of this engine"), known)
    found = {renamed(path): factors for path, factors in layers.items()}
    with named(folder):
        _check_base(manager, found, SmoaConfig.from_pretrained(folder))
    return found


def _check_base(manager: Any, layers: dict[str, SavedLayer], config: SmoaConfig) -> None:
    """Compare the layers of an adapter with their weights. A rank of tensor parallelism has parts of blocks: none."""
    for name, layer in manager.modules.items():
        if not hasattr(layer, "smoa") or layer.tp_size > 1:
            continue
        names = manager.packed_modules.get(name, [name])
        stops = list(accumulate(layer.output_slices if len(names) > 1 else [sum(layer.output_slices)]))
        for own, start, stop in zip(names, [0, *stops], stops, strict=False):
            if own in layers and layers[own].B.any():
                part, rows = layers[own], slice(start, stop)
                with named(own):
                    partition = part.row_labels, part.col_labels, part.block_scale
                    check_base(config, partition, partial(_rows_of, layer.smoa, rows))


def _rows_of(slots: Any, rows: slice) -> Tensor:
    weight: Tensor = slots.weight()[0]
    return weight[rows]


def _loads(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def _load_adapter(worker: Any, lora_request: Any) -> Any:
        folder = get_adapter_absolute_path(lora_request.lora_path)
        worker._adapter_manager.smoa_adapters.discard(lora_request.lora_int_id)
        if not is_smoa(folder):
            return original(worker, lora_request)
        empty = torch.empty(0)
        # lora_b has the scale multiplied in, and is pinned, by the manager: nothing here
        layers = _read(worker._adapter_manager, folder).items()
        worker._adapter_manager.smoa_adapters.add(lora_request.lora_int_id)
        loras = {name: LoRALayerWeights(name, 1, 1, factors, empty, scaling=1) for name, factors in layers}
        return LoRAModel(lora_request.lora_int_id, 1, loras)

    return _load_adapter


def _places(manager: Any) -> Iterator[tuple[str, tuple[int, int] | str]]:
    """By vLLM's name of each layer, before layers are fused, its (out_features, in_features) or why there is none."""
    shards = getattr(getattr(manager.model, "hf_to_vllm_mapper", None), "orig_to_new_stacked", {})
    twice = [place for place, (_, parts) in shards.items() if isinstance(parts, list)]
    for name, layer in manager.modules.items():
        names = manager.packed_modules.get(name, [name])
        weight = getattr(layer.base_layer, "weight", None) if hasattr(layer, "smoa") else None
        # MLA's is read at load, and decoded without a call; a convolution's (Mamba's) by its mixer
        if name.split(".")[-1] == "kv_b_proj" or (weight is not None and weight.ndim > 2):
            yield from ((own, "a projection whose weight vLLM uses without calling the layer") for own in names)
            continue
        sizes, size = totals_of(layer) if hasattr(layer, "smoa") else ([], 0)
        for place, own in enumerate(names):
            if any(part in f"{own}." for part in twice):
                yield own, "a projection that vLLM has twice, in the place of another one too"
            elif not sizes:
                yield own, f"a {type(layer).__name__.removesuffix('WithLoRA')}"
            elif len(names) == 1 and (layer.n_slices == 1 or layer.tp_size == 1):
                yield own, (sum(sizes), size)
            elif len(names) == layer.n_slices:
                yield own, (sizes[place], size)
            else:
                yield own, f"fused into {name}, of whose {len(sizes)} slices it has several"


def _renaming(manager: Any) -> Callable[[str], str]:
    """vLLM's name of a layer, of its name in transformers, as for LoRA; a model for pooling has AutoModel's in
    `model`."""
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # without what fuses layers: 0.32, 0.27
        if hasattr(mapper, name):
            mapper = getattr(mapper, name)()
            break
    wrapped = "model." if getattr(manager, "is_pooling_model", False) else ""

    def renamed(path: str) -> str:
        name: str = parse_fine_tuned_lora_name(f"{PREFIX}{path}.lora_A.weight", mapper)[0]
        return f"{wrapped}{name}" if f"{wrapped}{name}" in manager.smoa_places else name

    return cache(renamed)
