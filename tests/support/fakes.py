"""Modules of packages that are not installed, for tests of code that imports them."""

import copy
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Modules of packages that are not installed, for tests of code that imports them.


def import_with_stubs(
    monkeypatch: pytest.MonkeyPatch, module: str, stubs: Mapping[str, Mapping[str, Any]]
) -> ModuleType:
    """The module, imported anew where the `stubs` (attributes by module) are all that exists of their packages."""
    for name, attributes in stubs.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            package = ".".join(parts[:length])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        stub = ModuleType(name)
        vars(stub).update(attributes)
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setitem(sys.modules, module, ModuleType(module))  # so that it is forgotten after the test
    del sys.modules[module]
    return importlib.import_module(module)


# What the plugin uses of vLLM, with the same names and signatures: LoRA layers with slots, a manager, a worker.


HEADS = {"qkv_proj": {1: 2, 2: 2}}
"""How many ranks may divide k and v."""
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class UnquantizedLinearMethod:
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ layer.packed.T


class BaseLinearLayerWithLoRA(nn.Module):
    """A rank's rows of each weight, or its columns. `sizes` are those of whole weights."""

    def __init__(self, weights: Sequence[Tensor], name: str, rank: int, ranks: int, packed: bool = True) -> None:
        super().__init__()
        self.n_slices, self.tp_rank, self.tp_size = len(weights), rank, ranks
        self.base_layer = nn.Module()
        self.base_layer.prefix = name  # type: ignore[assignment]
        self.base_layer.output_sizes = [len(own) for own in weights]  # type: ignore[assignment]
        self.base_layer.input_size = weights[0].shape[1]  # type: ignore[assignment]
        self.base_layer.output_size = sum(map(len, weights))  # type: ignore[assignment]
        parts = self._cut(list(weights))
        self.output_slices, self.input_size = tuple(len(own) for own in parts), parts[0].shape[1]
        weight = torch.cat(parts).detach().contiguous()
        self.base_layer.packed = weight
        self.base_layer.weight = weight.new_empty(0) if packed else weight
        self.base_layer.quant_method = UnquantizedLinearMethod()
        self.device = weight.device
        self.loras: dict[int, Any] = {}
        self.applied = 0

    def _cut(self, weights: list[Tensor]) -> list[Tensor]:
        """A rank's own of each weight."""
        raise NotImplementedError

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        self.reset_lora(index)
        self.loras[index] = lora_a

    def reset_lora(self, index: int) -> None:
        self.loras.pop(index, None)

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        self.applied += 1
        return output

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_lora_to_output(x, self.base_layer.quant_method.apply(self.base_layer, x))


class ColumnParallelLinearWithLoRA(BaseLinearLayerWithLoRA):
    def _cut(self, weights: list[Tensor]) -> list[Tensor]:
        cut = self.slice_lora_b(weights if len(weights) > 1 else weights[0])
        return cut if isinstance(cut, list) else [cut]

    def slice_lora_a(self, lora_a: Any) -> Any:
        return lora_a

    def slice_lora_b(self, lora_b: Any) -> Any:
        """Heads of k and v that there are fewer of than ranks are there several times."""
        own = lora_b if isinstance(lora_b, list) else [lora_b]
        groups = [
            min(self.tp_size, HEADS.get(self.base_layer.prefix[-8:], {}).get(place, 99)) for place in range(len(own))
        ]
        cut = [part.chunk(count)[self.tp_rank * count // self.tp_size] for part, count in zip(own, groups, strict=True)]
        return cut if isinstance(lora_b, list) else cut[0]


class RowParallelLinearWithLoRA(BaseLinearLayerWithLoRA):
    def _cut(self, weights: list[Tensor]) -> list[Tensor]:
        return [self.slice_lora_a(own) for own in weights]

    def slice_lora_a(self, lora_a: Any) -> Any:
        return lora_a.chunk(self.tp_size, 1)[self.tp_rank]

    def slice_lora_b(self, lora_b: Any) -> Any:
        return lora_b


class PunicaWrapperBase:
    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int
    ) -> None:
        self.tokens = mapping.index_mapping

    def add_lora_logits(self, y: Tensor, x: Tensor) -> None:
        y += 1


class LoRALayerWeights:
    def __init__(
        self, module_name: str, rank: int, lora_alpha: int, lora_a: Any, lora_b: Any, scaling: float | None = None
    ) -> None:
        self.lora_a, self.lora_b = lora_a, lora_b


class LoRAModel:
    def __init__(self, lora_model_id: int, rank: int, loras: dict[str, LoRALayerWeights]) -> None:
        self.id, self.rank, self.loras = lora_model_id, rank, loras


class Manager:
    """Makes LoRA layers of a transformers model's linear ones, and moves adapters into their slots."""

    def __init__(self, model: nn.Module, slots: int, rank: int = 0, ranks: int = 1) -> None:
        self.model, self.lora_slots, self.lora_index_to_id = model, slots, [None] * slots
        model.load_weights = self._load_weights  # type: ignore[assignment]
        self.adapters: dict[int, LoRAModel] = {}
        self.wrapper = PunicaWrapperBase()
        self.modules: dict[str, Any] = {"lm_head": nn.Identity()}
        self.packed_modules: dict[str, list[str]] = {}
        linear = {name: own for name, own in model.named_modules() if isinstance(own, nn.Linear) and name != "lm_head"}
        for name in linear:
            parent, _, last = name.rpartition(".")
            fused = next((fused for fused, names in FUSED.items() if last in names), last)
            names = [f"{parent}.{each}" for each in FUSED.get(fused, [last])]
            if name == names[0]:
                kind = RowParallelLinearWithLoRA if last in ("o_proj", "down_proj") else ColumnParallelLinearWithLoRA
                weights, place = [linear[each].weight for each in names], f"{parent}.{fused}"
                layer = kind(weights, place, rank, ranks, packed=last not in ("down_proj", "gate_proj"))
                layer.punica_wrapper = self.wrapper  # type: ignore[assignment]
                self.modules[f"{parent}.{fused}"] = layer
                if len(names) > 1:
                    self.packed_modules[f"{parent}.{fused}"] = names

    def _load_weights(self, factors: Sequence[float]) -> None:
        """The model's: multiplies the weights of all layers, in place."""
        for layer in self.modules.values():
            if hasattr(layer, "base_layer"):
                layer.base_layer.packed.mul_(factors[0])

    def activate(self, adapter: LoRAModel, slot: int) -> None:
        self.adapters[adapter.id], self.slot = adapter, slot
        self.activate_adapter(adapter.id)

    def activate_adapter(self, lora_id: int) -> bool:
        adapter, slot = self.adapters[lora_id], self.slot
        loras = copy.copy(adapter.loras)
        self.lora_index_to_id[slot] = adapter.id  # type: ignore[call-overload]
        for name, layer in self.modules.items():
            own = [loras.get(each) for each in self.packed_modules.get(name, [name])]
            if not any(own):
                if name != "lm_head":
                    layer.reset_lora(slot)
                continue
            parts = [each and each.lora_a for each in own]
            layer.set_lora(slot, parts if len(own) > 1 else parts[0], None)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        self.lora_index_to_id = [None if known == adapter_id else known for known in self.lora_index_to_id]
        return self.adapters.pop(adapter_id, None) is not None

    def map_tokens(self, adapters: Sequence[int]) -> None:
        mapping = SimpleNamespace(index_mapping=tuple(adapters))
        self.wrapper.update_metadata(mapping, self.lora_index_to_id, len(self.lora_index_to_id) + 1, 64)

    def remove_all_adapters(self) -> None:
        self.lora_index_to_id = [None] * len(self.lora_index_to_id)


class WorkerLoRAManager:
    _adapter_manager: Manager

    def _load_adapter(self, lora_request: Any) -> Any:
        folder = Path(lora_request.lora_path)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        return LoRAModel(
            lora_request.lora_int_id, 8, {"model.layers.0.mlp.down_proj": LoRALayerWeights("", 8, 8, 1, 1)}
        )


def create_lora_manager(model: nn.Module, slots: int, vllm_config: Any) -> Manager:
    own = vllm_config.parallel_config
    CONTEXT.no_compile_layers = vllm_config.compilation_config.static_forward_context
    return Manager(model, slots, own.tensor_parallel_rank, own.tensor_parallel_size)


def parse_fine_tuned_lora_name(name: str, weights_mapper: Any = None) -> tuple[str, bool]:
    path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    return (path if weights_mapper is None else weights_mapper(path)), True


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


class LoRAResolver:
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        raise NotImplementedError


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_supported_resolvers(self) -> set[str]:
        return set(self.resolvers)


def get_adapter_absolute_path(lora_path: str) -> str:
    return lora_path


class CompilationMode(Enum):
    NONE, VLLM_COMPILE = 0, 3


class CUDAGraphMode(Enum):
    NONE, PIECEWISE, FULL_AND_PIECEWISE = 0, 1, 2

    def has_full_cudagraphs(self) -> bool:
        return self.value == 2


class CompilationConfig:
    def __init__(self, mode: CompilationMode, cudagraph_mode: CUDAGraphMode, splitting_ops: list[str] | None) -> None:
        self.mode, self.cudagraph_mode, self.splitting_ops = mode, cudagraph_mode, splitting_ops
        self.static_forward_context: dict[str, Any] = {}

    def set_splitting_ops_for_v1(self) -> None:
        if self.splitting_ops is None:
            self.splitting_ops = ["vllm::unified_attention"] if self.mode == CompilationMode.VLLM_COMPILE else []


def engine_config(**settings: Any) -> Any:
    """vLLM's configuration, as far as the plugin reads it."""
    given = {
        "dtype": torch.float32,
        "tensor_parallel_rank": 0,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "fully_sharded_loras": False,
        "kv_sharing_fast_prefill": False,
        "additional_config": {},
        "mode": "NONE",
        "cudagraph_mode": "NONE",
        "splitting_ops": None,
    }
    own = SimpleNamespace(**given | settings)
    kind: Any = importlib.import_module("vllm.config.compilation").CompilationConfig
    compilation = kind(CompilationMode[own.mode], CUDAGraphMode[own.cudagraph_mode], own.splitting_ops)
    compilation.set_splitting_ops_for_v1()
    configs = dict.fromkeys(("model_config", "parallel_config", "lora_config", "cache_config"), own)
    return SimpleNamespace(**configs, compilation_config=compilation, additional_config=own.additional_config)


CONTEXT = SimpleNamespace(no_compile_layers={})
OPERATORS: dict[str, Callable[..., None]] = {}
LIBRARY = torch.library.Library("vllm", "FRAGMENT")


def direct_register_custom_op(op_name: str, op_func: Callable[..., None], mutates_args: list[str]) -> None:
    """PyTorch takes an operator once in a process, and each test makes its own."""
    if op_name not in OPERATORS:
        LIBRARY.define(op_name + torch.library.infer_schema(op_func, mutates_args=mutates_args))
        LIBRARY.impl(op_name, lambda *args: OPERATORS[op_name](*args), "CPU")
    OPERATORS[op_name] = op_func


def stubs() -> dict[str, dict[str, Any]]:
    """The modules of a fresh vLLM."""
    worker = type("WorkerLoRAManager", (), dict(vars(WorkerLoRAManager)))
    return {
        "vllm.compilation.breakable_cudagraph": {"eager_break_during_capture": lambda fn: fn},
        "vllm.config.compilation": {
            "CompilationConfig": type("CompilationConfig", (CompilationConfig,), {}),
            "CompilationMode": CompilationMode,
        },
        "vllm.forward_context": {
            "get_forward_context": lambda: CONTEXT,
            "is_forward_context_available": lambda: True,
        },
        "vllm.lora.layers.column_parallel_linear": {"ColumnParallelLinearWithLoRA": ColumnParallelLinearWithLoRA},
        "vllm.lora.layers.row_parallel_linear": {"RowParallelLinearWithLoRA": RowParallelLinearWithLoRA},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.utils.torch_utils": {
            "LayerNameType": str,
            "_encode_layer_name": lambda layer_name: layer_name,
            "_resolve_layer_name": lambda layer_name: layer_name,
            "direct_register_custom_op": direct_register_custom_op,
        },
        "vllm.lora.layers.base_linear": {"BaseLinearLayerWithLoRA": BaseLinearLayerWithLoRA},
        "vllm.lora.lora_model": {"LoRAModel": LoRAModel},
        "vllm.lora.lora_weights": {"LoRALayerWeights": LoRALayerWeights},
        "vllm.lora.punica_wrapper.punica_base": {"PunicaWrapperBase": PunicaWrapperBase},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": Registry()},
        "vllm.lora.utils": {
            "get_adapter_absolute_path": get_adapter_absolute_path,
            "parse_fine_tuned_lora_name": parse_fine_tuned_lora_name,
        },
        "vllm.lora.worker_manager": {"create_lora_manager": create_lora_manager, "WorkerLoRAManager": worker},
    }
