"""The same for vLLM's manager, on its stand-in (tests/support/fakes.py): slots, eviction, activations that fail."""

import atexit
import importlib
import shutil
import tempfile
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from peft import get_peft_model
from torch import Tensor

from smoa import SmoaConfig
from smoa.vllm import register
from tests.lives.facts import Facts, delta, of_file
from tests.support import fakes, tiny
from tests.support.fakes import import_with_stubs

SLOTS = 3
SHARED: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_weights": False}
KINDS: dict[str, dict[str, Any]] = {
    "anna": {"r": 4, "num_blocks": 2},
    "ben": {"r": 2, "num_blocks": 2, "alpha": 9.0},  # of the same partition
    "cleo": {"r": 4, "num_blocks": 2, "partition": "contiguous"},
    "dora": {"r": 4, "num_blocks": 2, "modulation": "none", "target_modules": ["down_proj"]},
    "emil": {"r": 6, "num_blocks": 3, "target_modules": ["v_proj", "down_proj"]},
}


@cache
def adapters() -> dict[str, tuple[str, Facts, dict[str, Tensor]]]:
    """Folder, tensors, and the oracle's ΔW of each layer."""
    room = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    found, base = {}, tiny.build("llama").double()
    for name, settings in KINDS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(tiny.build("llama"), SmoaConfig(**SHARED | settings))
            model.save_pretrained(f"{room}/{name}")
        facts, _ = of_file(f"{room}/{name}", SHARED | settings)
        weights = {layer: base.get_submodule(layer).weight.detach() for layer in facts.layers}
        deltas = {layer: delta("", weights[layer], own, facts.config).float() for layer, own in facts.layers.items()}
        found[name] = f"{room}/{name}", facts, deltas
    return found


class Served(RuleBasedStateMachine):
    """A worker with slots; `held` says which adapter each number is, `slots` which number a slot has."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        import_with_stubs(self.patch, "smoa.vllm.plugin", fakes.stubs())

    @initialize(same_prefix=st.booleans(), reserved=st.sets(st.sampled_from(sorted(KINDS)), max_size=3))
    def begin(self, same_prefix: bool, reserved: set[str]) -> None:
        note(f"same_prefix={same_prefix}, reserved={sorted(reserved)}")
        if same_prefix:
            made = fakes.BaseLinearLayerWithLoRA.__init__

            def without_prefix(layer: Any, *args: Any, **kwargs: Any) -> None:
                made(layer, *args, **kwargs)
                layer.base_layer.prefix = ""

            self.patch.setattr(fakes.BaseLinearLayerWithLoRA, "__init__", without_prefix)
        module: Any = importlib.import_module("vllm.lora.worker_manager")
        register()
        self.worker = module.WorkerLoRAManager()
        folders = [adapters()[name][0] for name in sorted(reserved)]
        config = fakes.engine_config(additional_config={"smoa_examples": folders})
        self.manager = module.create_lora_manager(tiny.build("llama"), SLOTS, vllm_config=config)
        self.worker._adapter_manager = self.manager
        self.layers = {name: own for name, own in self.manager.modules.items() if hasattr(own, "smoa")}
        self.slots, self.held, self.number = dict[int, int](), dict[int, str](), 0

    def check(self) -> None:
        active = [own for own in self.manager.lora_index_to_id if own is not None]
        tokens = [0, *active, *active, 0]
        self.manager.map_tokens(tokens)
        operator = torch.ops.vllm.smoa_add
        for name, layer in self.layers.items():
            names = self.manager.packed_modules.get(name, [name])
            torch.manual_seed(0)
            x = torch.randn(len(tokens), layer.input_size)
            expected = layer.base_layer.packed.new_zeros(len(tokens), sum(layer.output_slices))
            for row, number in enumerate(tokens):
                parts = []
                for own, size in zip(
                    names, layer.output_slices if len(names) > 1 else [expected.shape[1]], strict=True
                ):
                    found = adapters()[self.held[number]][2].get(own) if number else None
                    parts.append(torch.zeros(size) if found is None else found @ x[row])
                expected[row] = torch.cat(parts)
            for by_operator in (False, True):
                output = torch.zeros_like(expected)
                with torch.no_grad():
                    if by_operator:
                        operator(output, x, layer.smoa_name)
                    else:
                        layer.add_adapters(x, output)
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)

    def load(self, name: str) -> Any:
        self.number += 1
        self.held[self.number] = name
        return self.worker._load_adapter(SimpleNamespace(lora_path=adapters()[name][0], lora_int_id=self.number))

    def free(self, slot: int) -> None:
        if slot in self.slots:
            self.manager.lora_index_to_id[slot] = None
            for layer in self.layers.values():
                layer.reset_lora(slot)
            del self.slots[slot]

    @rule(name=st.sampled_from(sorted(KINDS)), slot=st.integers(0, SLOTS - 1))
    def activate(self, name: str, slot: int) -> None:
        note(f"activate({name!r}, {slot})")
        self.free(slot)
        adapter = self.load(name)
        self.manager.activate(adapter, slot)
        self.slots[slot] = adapter.id
        self.check()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def evict(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        note(f"evict({slot})")
        self.free(slot)
        self.check()

    @rule()
    def clear(self) -> None:
        note("remove_all_adapters()")
        for slot in [*self.slots]:
            self.free(slot)
        self.manager.remove_all_adapters()
        self.check()

    def teardown(self) -> None:
        self.patch.undo()
