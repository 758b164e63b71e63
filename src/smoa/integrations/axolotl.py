"""axolotl: the plugin that adds `adapter: smoa`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import PreTrainedModel, set_seed

from smoa import ConfigError
from smoa.integrations.lora_settings import check_settings, refuse, smoa_config

NAME = "smoa"
CAST = "autocast_adapter_dtype"
ONLY_LORA = ("loraplus_lr_ratio", "relora", "lora_fp32_gradients", "peft_use_dora")
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class SmoaArgs(BaseModel):
    """The keys that the plugin adds to axolotl's file."""

    smoa: dict[str, Any] | None = None
    """Settings of SmoaConfig, in addition to axolotl's `lora_*`."""


class SmoaPlugin(BasePlugin):  # type: ignore[misc]  # axolotl has no type information
    """Adapts a model as axolotl's LoRA does, by the same keys; the block `smoa` has the others."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SmoaArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=NAME)]

    def register(self, cfg: Any) -> None:
        """Check the file's keys before axolotl does, and call the adapter by the name under which axolotl quantizes.

        Raises:
            ConfigError: a key has no counterpart in SMoA, or a wrong value.
        """
        if cfg.get("adapter") != NAME and cfg.get(NAME) is None:
            return
        cfg[NAME] = cfg.get(NAME) or {}
        check_settings(cfg[NAME], NAME)
        refuse([name for name in (*ONLY_LORA, *KERNELS) if cfg.get(name)], NAME)
        if cfg.get("merge_method") == "memory_efficient":
            raise ConfigError("merge_method: memory_efficient merges LoRA only; write legacy, or remove the line")
        cfg["merge_method"] = "legacy"
        cfg.update(dict.fromkeys(KERNELS, False))
        if cfg.get("load_in_4bit") or cfg.get("load_in_8bit"):
            cfg["adapter"] = "qlora" if cfg.get("load_in_4bit") else "lora"

    def pre_lora_load(self, cfg: Any, model: PreTrainedModel) -> None:
        """The weights are quantized: from here on the adapter has its own name."""
        if cfg.get(NAME) is not None:
            cfg["adapter"] = NAME

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | PeftMixedModel | None, PeftConfig] | None:
        """The model with a new adapter or that of `lora_model_dir`, and the config; None for another plugin's.

        Raises:
            ConfigError: a key has no counterpart in SMoA.
        """
        if cfg.adapter != NAME:
            return None
        _, lora = load_lora(model, cfg, config_only=True)
        config = smoa_config(lora, cfg.smoa.to_dict(), NAME)
        if config_only:
            return None, config
        cast = {} if cfg.peft_autocast_adapter_dtype is None else {CAST: cfg.peft_autocast_adapter_dtype}
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **cast), config
        if cfg.seed is not None:
            set_seed(cfg.seed)  # axolotl 0.19 has drawn random numbers by now, and 0.21 seeds here for LoRA
        return get_peft_model(model, config, **cast), config
