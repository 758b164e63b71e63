"""What the plugin uses of vLLM, with the same names and signatures: LoRA layers with slots, a manager, a worker.

It has no LoRA of its own: an output stays as it is, and `applied` counts the calls. tests/serve runs the real one.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class UnquantizedLinearMethod:
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ layer.packed.T


class BaseLinearLayerWithLoRA(nn.Module):
    def __init__(self, weights: Sequence[Tensor], packed: bool = True) -> None:
        super().__init__()
        weight = torch.cat(list(weights)).detach()
        self.base_layer = nn.Module()
        self.base_layer.packed = weight
        self.base_layer.weight = weight.new_empty(0) if packed else weight
        self.base_layer.quant_method = UnquantizedLinearMethod()
        self.output_slices, self.input_size = tuple(len(own) for own in weights), weight.shape[1]
        self.device = weight.device
        self.loras: dict[int, Any] = {}
        self.applied = 0

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


class PunicaWrapperBase:
    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int
    ) -> None:
        self.tokens = mapping.index_mapping


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

    def __init__(self, model: nn.Module, slots: int) -> None:
        self.model, self.lora_index_to_id = model, [None] * slots
        self.wrapper = PunicaWrapperBase()
        self.modules: dict[str, Any] = {"lm_head": nn.Identity()}
        self.packed_modules: dict[str, list[str]] = {}
        linear = {name: own for name, own in model.named_modules() if isinstance(own, nn.Linear) and name != "lm_head"}
        for name in linear:
            parent, _, last = name.rpartition(".")
            fused = next((fused for fused, names in FUSED.items() if last in names), last)
            names = [f"{parent}.{each}" for each in FUSED.get(fused, [last])]
            if name == names[0]:
                layer = BaseLinearLayerWithLoRA([linear[each].weight for each in names], packed=last != "down_proj")
                layer.punica_wrapper = self.wrapper  # type: ignore[assignment]
                self.modules[f"{parent}.{fused}"] = layer
                if len(names) > 1:
                    self.packed_modules[f"{parent}.{fused}"] = names

    def activate(self, adapter: LoRAModel, slot: int) -> None:
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
    return Manager(model, slots)


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


def engine_config(**settings: Any) -> Any:
    """vLLM's configuration, as far as the plugin reads it."""
    given = {
        "dtype": torch.float32,
        "enforce_eager": True,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "fully_sharded_loras": False,
    }
    every = SimpleNamespace(**given | settings)
    return SimpleNamespace(model_config=every, parallel_config=every, lora_config=every)


def stubs() -> dict[str, dict[str, Any]]:
    """The modules of a fresh vLLM."""
    worker = type("WorkerLoRAManager", (), dict(vars(WorkerLoRAManager)))
    return {
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
