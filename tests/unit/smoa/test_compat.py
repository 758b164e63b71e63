"""The stand-ins for what old versions of PEFT lack give what PEFT 0.21 gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load
from torch import Tensor, nn

from smoa import SmoaConfig, SmoaModel, UnsupportedModuleError, compat
from smoa.compat import BitsAndBytesBackend, StateDictHooks, find_quantization_backend
from smoa.files.names import without_id
from smoa.layers.quantized import find_backend
from tests.support import tiny_models
from tests.support.quantized import BITSANDBYTES, quantized_layer, stored_bits

ours: Any = StateDictHooks
pefts: Any = BaseTuner
needs_hooks = pytest.mark.skipif(not compat.HAS_STATE_DICT_HOOKS, reason="PEFT ≤ 0.20 has nothing to compare with")
needs_backends = pytest.mark.skipif(not compat.HAS_QUANTIZATION_BACKENDS, reason="PEFT ≤ 0.19 has none")


def model_of_two(**config: Any) -> PeftModel:
    """Two adapters of one prefix, a head that is trained besides, and token embeddings."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["query", "value"], "trainable_token_indices": [1, 2]}
    model = get_peft_model(tiny_models.build("bert"), SmoaConfig(**settings | config), "one")
    model.add_adapter("one_more", SmoaConfig(**settings | config))
    return model


@needs_hooks
@pytest.mark.parametrize(("bias", "inside"), [("none", False), ("none", True), ("all", False), ("smoa_only", True)])
def test_what_is_saved_and_how_it_is_named_are_pefts_choice(bias: str, inside: bool) -> None:
    if bias == "none":
        wrapped = model_of_two(modules_to_save=["classifier"])
    else:  # which PEFT grants to one adapter only
        config = SmoaConfig(r=4, target_modules=["query", "value"], bias=bias)
        wrapped = get_peft_model(tiny_models.build("bert"), config, "one")
    config, model = wrapped.peft_config["one"], wrapped.base_model.model if inside else wrapped
    state = {key: tensor for key, tensor in model.state_dict().items() if "one_more" not in key}
    answers = [hooks._get_adapter_state_dict(model, config, "one", state, ["one_more"]) for hooks in (ours, pefts)]
    assert answers[0].keys() == answers[1].keys()
    assert any("smoa_row_labels" in key for key in answers[0])
    saved = {"base_model.model." + key.removeprefix("base_model.model."): tensor for key, tensor in answers[0].items()}
    saved = {ours._remove_adapter_name_from_key(key, "one"): tensor for key, tensor in saved.items()}
    loaded = [hooks._remap_adapter_state_dict_for_load(model, config, "one_more", saved) for hooks in (ours, pefts)]
    assert loaded[0].keys() == loaded[1].keys()


@needs_hooks
@pytest.mark.parametrize("key", ["x.smoa_A.one.weight", "x.smoa_row_labels.one", "one", "x.one.weight.bias"])
def test_an_adapters_name_is_removed_as_peft_does(key: str) -> None:
    assert ours._remove_adapter_name_from_key(key, "one") == pefts._remove_adapter_name_from_key(key, "one")


def test_installing_twice_wraps_once() -> None:
    before = save_and_load.set_peft_model_state_dict
    compat.install_state_dict_hooks()
    now: Any = save_and_load.set_peft_model_state_dict
    assert hasattr(now, "__smoa_original__") is not compat.HAS_STATE_DICT_HOOKS
    assert compat.HAS_STATE_DICT_HOOKS is (now is before)
    assert not hasattr(getattr(now, "__smoa_original__", now), "__smoa_original__")


def test_the_wrappers_ask_the_model_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(SmoaModel):
        @classmethod
        def _get_adapter_state_dict(cls, *args: Any) -> dict[str, Tensor]:
            return {"a.smoa_A.default.weight": args[3]["a"]}

        @classmethod
        def _remap_adapter_state_dict_for_load(cls, *args: Any) -> dict[str, Tensor]:
            return {"base_model.model.b": args[3]["a"]}

    def original_loading(model: Any, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
        named: dict[str, Tensor] = naming(state, adapter_name, "smoa_")
        state.clear()
        return named

    monkeypatch.setitem(compat.PEFT_TYPE_TO_TUNER_MAPPING, "SMOA", Asked)
    naming = compat._naming(lambda state, adapter_name, parameter_prefix: state)
    model: Any = nn.Module()
    model.peft_config = {"default": SmoaConfig(), "other": SimpleNamespace(peft_type="LORA")}
    state = {"a": torch.ones(1), "x.smoa_A.default.weight": torch.ones(1)}
    table = dict(compat.PEFT_TYPE_TO_PREFIX_MAPPING)

    def original_saving(model: Any, state: dict[str, Tensor], *_: Any, **__: Any) -> dict[str, Tensor]:
        assert table == compat.PEFT_TYPE_TO_PREFIX_MAPPING  # which other threads read
        return {**state, "head": state["a"]}

    saving = compat._saving(original_saving)
    assert list(saving(model, state)) == ["a.smoa_A.weight", "a", "head"]
    assert list(saving(model, state, "other")) == [*state, "head"]
    del state["x.smoa_A.default.weight"]
    assert list(compat._loading(original_loading)(model, state)) == ["b"]
    assert list(state) == ["a"]
    assert list(compat._loading(naming_of(naming))(model, state, "other")) == ["a"]


def naming_of(naming: Any) -> Any:
    """A loader that names the tensors and does nothing else."""
    return lambda model, state, adapter_name: naming(state, adapter_name, "lora_")


@pytest.mark.parametrize("kind", BITSANDBYTES)
@needs_backends
def test_bitsandbytes_layers_are_read_and_written_as_by_peft(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, bytes]] = []
    for there in (True, False):
        monkeypatch.setattr(compat, "HAS_QUANTIZATION_BACKENDS", there)
        torch.manual_seed(1)
        base = quantized_layer(kind)
        backend: Any = find_quantization_backend(base, base)
        assert isinstance(backend, BitsAndBytesBackend) is not there
        layer: Any = SimpleNamespace(get_base_layer=lambda base=base: base)
        backend.set_base_weight(layer, backend.get_base_weight(base) * 1.5 + 0.01)
        assert isinstance(base.weight, (bnb.nn.Int8Params, bnb.nn.Params4bit))
        written += [stored_bits(base)]
    assert written[0] == written[1]


@pytest.mark.parametrize("library", ["hqq", "torchao"])
def test_what_an_old_peft_can_not_quantize_again_is_refused_by_name(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "HAS_QUANTIZATION_BACKENDS", False)
    kind = type("Packed", (nn.Module,), {"__module__": f"{library}.core"})
    with pytest.raises(UnsupportedModuleError, match=r"Packed: HQQ and torchao need PEFT 0.20 or newer, found"):
        find_backend(kind(), nn.Module())


def test_a_plain_layer_has_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "HAS_QUANTIZATION_BACKENDS", False)
    assert find_quantization_backend(nn.Linear(2, 2), nn.Module()) is None


def test_an_adapter_is_loaded_into_an_injected_model() -> None:
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False)
    wrapped = get_peft_model(tiny_models.build("llama"), config)
    saved = save_and_load.get_peft_model_state_dict(wrapped)
    torch.manual_seed(5)
    injected = inject_adapter_in_model(config, tiny_models.build("llama"))
    save_and_load.set_peft_model_state_dict(injected, saved)
    for key, tensor in without_id(save_and_load.get_peft_model_state_dict(injected)).items():
        assert torch.equal(tensor, saved["base_model.model." + key])
