import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftConfig, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, save_and_load
from torch import nn

from smoa import (
    SmoaConfig,
    SmoaModel,
    compat,
)
from smoa.compat import BitsAndBytesBackend, find_quantization_backend
from smoa.quantized import find_backend
from tests.support import tiny
from tests.support.layers import BITSANDBYTES, quantized_layer, stored_bits

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


# versions of PEFT


needs_backends = pytest.mark.skipif(not compat.HAS_QUANTIZATION_BACKENDS, reason="PEFT ≤ 0.19 has none")


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
    with pytest.raises(ValueError, match=r"HQQ and torchao need PEFT 0\.20 or newer, found"):
        find_backend(kind(), nn.Module())


def test_a_plain_layer_has_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "HAS_QUANTIZATION_BACKENDS", False)
    assert find_quantization_backend(nn.Linear(2, 2), nn.Module()) is None


def test_an_adapter_is_loaded_into_an_injected_model() -> None:
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False)
    wrapped = get_peft_model(tiny.build("llama"), config)
    saved = save_and_load.get_peft_model_state_dict(wrapped)
    torch.manual_seed(5)
    injected = inject_adapter_in_model(config, tiny.build("llama"))
    save_and_load.set_peft_model_state_dict(injected, saved)
    for key, tensor in save_and_load.get_peft_model_state_dict(injected).items():
        assert torch.equal(tensor, saved["base_model.model." + key])
