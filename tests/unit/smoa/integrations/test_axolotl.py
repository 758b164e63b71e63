from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from smoa import ConfigError, SmoaConfig
from tests.support import tiny_models
from tests.support.stubs import import_with_stubs


class Settings(dict[str, Any]):
    """axolotl's DictDefault, as far as the plugin uses it: keys are attributes, and a missing one is None."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return Settings(value) if isinstance(value, dict) else value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


def load_lora(model: Any, cfg: Settings, inference: bool = False, config_only: bool = False) -> tuple[None, LoraConfig]:
    assert config_only
    return None, LoraConfig(r=cfg.lora_r, lora_alpha=64, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    base = {"BasePlugin": type("BasePlugin", (), {}), "AdapterCapabilities": AdapterCapabilities}
    stubs = {"axolotl.integrations.base": base, "axolotl.loaders.adapter": {"load_lora": load_lora}}
    return import_with_stubs(monkeypatch, "smoa.integrations.axolotl", stubs)


def registered(axolotl: ModuleType, **keys: Any) -> Settings:
    """A file with `adapter: smoa` after the plugin has seen it."""
    cfg = Settings({"adapter": "smoa", "lora_r": 8, **keys})
    axolotl.SmoaPlugin().register(cfg)
    return cfg


def test_the_plugin_adds_the_adapter_and_its_block(axolotl: ModuleType) -> None:
    plugin = axolotl.SmoaPlugin()
    assert plugin.get_adapter_capabilities() == [AdapterCapabilities("smoa")]
    assert plugin.get_input_args() == "smoa.integrations.axolotl.SmoaArgs"
    assert axolotl.SmoaArgs(smoa={"num_blocks": 4}).model_dump() == {"smoa": {"num_blocks": 4}}


def test_axolotls_keys_and_the_block_make_the_adapter(axolotl: ModuleType) -> None:
    cfg = registered(axolotl, smoa={"num_blocks": 4})
    model, config = axolotl.SmoaPlugin().load_adapter(tiny_models.build("llama"), cfg)
    assert isinstance(model, PeftModel)
    assert (config.peft_type, config.r, config.num_blocks, config.alpha) == ("SMOA", 8, 4, 64)
    assert model.peft_config["default"].target_modules == {"q_proj"}


def test_a_seed_makes_the_same_adapter_again(axolotl: ModuleType) -> None:
    cfg = registered(axolotl, seed=7)
    first, second = (axolotl.SmoaPlugin().load_adapter(tiny_models.build("llama"), cfg)[0] for _ in range(2))
    weights = [dict(model.named_parameters()) for model in (first, second)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_the_adapter_can_stay_in_half_precision(axolotl: ModuleType) -> None:
    half = tiny_models.build("llama").half()
    model, _ = axolotl.SmoaPlugin().load_adapter(half, registered(axolotl, peft_autocast_adapter_dtype=False))
    assert {parameter.dtype.itemsize for parameter in model.parameters() if parameter.requires_grad} == {2}


@pytest.mark.parametrize("inference", [True, False])
def test_a_saved_adapter_is_loaded(axolotl: ModuleType, tmp_path: Path, inference: bool) -> None:
    saved = SmoaConfig(r=6, target_modules=["v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_models.build("llama"), saved).save_pretrained(tmp_path)
    cfg = registered(axolotl, lora_model_dir=str(tmp_path))
    model, _ = axolotl.SmoaPlugin().load_adapter(tiny_models.build("llama"), cfg, inference=inference)
    assert model.peft_config["default"].r == 6
    assert any(parameter.requires_grad for parameter in model.parameters()) is not inference


def test_a_trainer_that_adapts_by_itself_gets_the_config_only(axolotl: ModuleType) -> None:
    model, config = axolotl.SmoaPlugin().load_adapter(tiny_models.build("llama"), registered(axolotl), config_only=True)
    assert model is None
    assert isinstance(config, SmoaConfig)


def test_other_adapters_are_left_alone(axolotl: ModuleType) -> None:
    cfg = registered(axolotl, adapter="lora", load_in_4bit=True)
    assert cfg == {"adapter": "lora", "lora_r": 8, "load_in_4bit": True}
    axolotl.SmoaPlugin().pre_lora_load(cfg, None)
    assert axolotl.SmoaPlugin().load_adapter(None, cfg) is None


@pytest.mark.parametrize(("bits", "name"), [("load_in_4bit", "qlora"), ("load_in_8bit", "lora")])
def test_a_quantized_base_is_loaded_under_the_name_that_axolotl_quantizes_for(
    axolotl: ModuleType, bits: str, name: str
) -> None:
    cfg = registered(axolotl, **{bits: True})
    axolotl.SmoaPlugin().register(cfg)  # again changes nothing
    assert cfg.adapter == name
    assert {kernel: cfg[kernel] for kernel in axolotl.KERNELS} == dict.fromkeys(axolotl.KERNELS, False)
    axolotl.SmoaPlugin().pre_lora_load(cfg, None)
    assert cfg.adapter == "smoa"


def test_the_block_alone_chooses_smoa(axolotl: ModuleType) -> None:
    cfg = registered(axolotl, adapter="lora", smoa={"num_blocks": 4})
    axolotl.SmoaPlugin().pre_lora_load(cfg, None)
    assert cfg.adapter == "smoa"


def test_merging_is_by_the_model_in_memory(axolotl: ModuleType) -> None:
    assert registered(axolotl).merge_method == "legacy"
    with pytest.raises(ConfigError, match=r"^merge_method: memory_efficient merges LoRA only; write legacy"):
        registered(axolotl, merge_method="memory_efficient")


@pytest.mark.parametrize("name", ["relora", "lora_mlp_kernel"])
def test_what_only_lora_has_is_refused(axolotl: ModuleType, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^smoa: {name}: a setting of LoRA that SMoA does not have"):
        registered(axolotl, **{name: True})
