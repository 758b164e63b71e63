import copy
import importlib
import json
import pickle
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, save_and_load
from torch import nn

import smoa
from smoa import (
    ConfigError,
    SmoaConfig,
    SmoaModel,
    UnsupportedModuleError,
    UnsupportedVersionError,
    compat,
    registration,
)
from smoa.compat import BitsAndBytesBackend, find_quantization_backend
from smoa.quantized import find_backend
from smoa.registration import check_peft_version, ensure_peft_type, register
from tests.support import tiny_models
from tests.support.layers import stored_bits
from tests.support.quantized import BITSANDBYTES, quantized_layer

CONFIG = SmoaConfig(r=7, num_blocks=3, alpha=2.5, target_modules=["q_proj", "v_proj"], smoa_dropout=0.1)


def test_smoa_is_a_member_of_pefts_enum() -> None:
    member = PeftType("SMOA")
    assert member is PeftType.SMOA is PeftType["SMOA"]
    assert member in list(PeftType)
    assert (member.name, member.value, {"SMOA": 1}[member]) == ("SMOA", "SMOA", 1)
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SmoaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SmoaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "smoa_"


def test_reloading_smoa_keeps_one_member() -> None:
    member = PeftType.SMOA
    importlib.reload(smoa)
    assert PeftType.SMOA is member
    assert [m.name for m in PeftType].count("SMOA") == 1


def test_another_method_of_the_same_name_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = type("ForeignModel", (), {"__module__": "peft.tuners.smoa.model"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.SMOA, foreign)
    with pytest.raises(UnsupportedVersionError, match=r"peft\.tuners\.smoa"):
        register(SmoaConfig, SmoaModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SMOA] is foreign


@pytest.mark.parametrize("again", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_survives_copying_and_pickling(again: Callable[[SmoaConfig], SmoaConfig]) -> None:
    assert again(CONFIG) == CONFIG
    assert again(CONFIG).peft_type is PeftType.SMOA


@pytest.mark.parametrize("loader", [SmoaConfig, PeftConfig])
def test_a_config_survives_saving(tmp_path: Path, loader: type[PeftConfig]) -> None:
    CONFIG.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert isinstance(again, SmoaConfig)
    assert again.to_dict() == {**CONFIG.to_dict(), "inference_mode": again.inference_mode}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SMOA"


def test_an_enum_that_takes_no_member_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(StrEnum):
        SMOA = "another value"

        @classmethod
        def _missing_(cls, value: object) -> "Changed":
            return cls.SMOA

    monkeypatch.setattr(registration, "PeftType", Changed)
    with pytest.raises(UnsupportedVersionError, match="PEFT has changed its enum"):
        ensure_peft_type()


def test_old_versions_of_peft_are_refused_and_newer_ones_tried_with_a_warning() -> None:
    for version in ("0.18.1", "0.20.0", "0.21.99", "0.21.1.dev0"):
        check_peft_version(version)
    for version in ("0.18.0", "0.9.1"):
        with pytest.raises(UnsupportedVersionError, match=rf"(?s)>=0\.18\.1.*{version}"):
            check_peft_version(version)
    for version in ("0.22.0.dev0", "1.0.0"):
        with pytest.warns(UserWarning, match=rf"tested with peft .*, found {version}"):
            check_peft_version(version)


# versions of PEFT


ours: Any = SmoaModel
pefts: Any = BaseTuner


def test_a_name_that_older_peft_would_take_for_a_part_of_a_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "HAS_STATE_DICT_HOOKS", False)
    model = get_peft_model(tiny_models.build("llama"), SmoaConfig(modules_to_save=["lm_head"]))
    for name in ("weight", "smoa_B"):
        with pytest.raises(ConfigError, match=f"adapter '{name}': PEFT .* takes this name for a part"):
            model.add_adapter(name, SmoaConfig())
    assert [*model.peft_config] == ["default"]


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
    name = [*wrapped.peft_config][-1]
    loaded = [hooks._remap_adapter_state_dict_for_load(model, config, name, saved) for hooks in (ours, pefts)]
    assert loaded[0].keys() == loaded[1].keys()


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
    for key, tensor in save_and_load.get_peft_model_state_dict(injected).items():
        assert torch.equal(tensor, saved["base_model.model." + key])
