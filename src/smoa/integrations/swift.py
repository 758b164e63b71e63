"""ms-swift: the tuner type `smoa`. Import this module from a file that `--external_plugins` names."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from smoa import ConfigError
from smoa.integrations.lora_settings import refuse, smoa_config

PLACE = "--model_kwargs: smoa"
TASKS = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS", "reranker": "SEQ_CLS", "generative_reranker": "CAUSAL_LM"}
"""PEFT's name of a task of swift. Others, such as embeddings, have none."""


class SmoaTuner(PeftTuner):  # type: ignore[misc]  # swift has no type information
    """Adapts a model as swift's LoRA does, by the same arguments; `--model_kwargs '{"smoa": {…}}'` has the others."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """Adapt a new model.

        Raises:
            ConfigError: an argument has no counterpart in SMoA, or a wrong value.
        """
        settings = (args.model_kwargs or {}).get("smoa", {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{PLACE}={settings!r} is not a mapping; write e.g. {{'num_blocks': 4}}")
        refuse(["lorap_lr_ratio"] if args.lorap_lr_ratio else [], PLACE)
        return get_peft_model(model, smoa_config(_lora_config(args, model), settings, PLACE))


def _lora_config(args: Any, model: nn.Module) -> LoraConfig:
    """What swift would adapt a model with if the tuner type were LoRA."""
    task = TASKS.get(args.task_type)
    return LoraConfig(
        task_type=task,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=get_target_modules(args, model),
        target_parameters=args.target_parameters,
        modules_to_save=get_modules_to_save(args, model, task),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=args.init_weights,
    )


tuners_map["smoa"] = SmoaTuner
