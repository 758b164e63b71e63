"""LLaMA-Factory: `python -m smoa.integrations.llamafactory train.yaml` trains SMoA where the file says LoRA.

LLaMA-Factory's `finetuning_type` is a closed list. The file says `lora`, its `smoa:` block has the settings that LoRA
lacks, and the one function that would make the LoRA makes a SMoA adapter instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.hparams.parser import read_args
from llamafactory.model import adapter
from llamafactory.train.tuner import run_exp
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import PreTrainedModel

from smoa import ConfigError
from smoa.integrations.lora_settings import check_settings, refuse, smoa_config

PLACE = "smoa"
ONLY_LORA = ("use_unsloth", "use_kt", "loraplus_lr_ratio", "pissa_init", "use_dora")


def train(args: Mapping[str, Any]) -> None:
    """Run LLaMA-Factory's training with these arguments of its own and a block `smoa`.

    Raises:
        ConfigError: an argument has no counterpart in SMoA, or a wrong value.
    """
    settings = args.get("smoa") or {}
    check_settings(settings, PLACE)
    method = args.get("finetuning_type", "lora")
    if method != "lora":
        raise ConfigError(f"finetuning_type: {method}: SMoA takes the place of LoRA; write `lora`, or remove the line")
    refuse([name for name in ONLY_LORA if args.get(name)], PLACE)

    def get_smoa_model(model: PreTrainedModel, config: LoraConfig) -> PeftModel | PeftMixedModel:
        return get_peft_model(model, smoa_config(config, settings, PLACE))

    adapter.get_peft_model = get_smoa_model
    run_exp({name: value for name, value in args.items() if name != "smoa"})


def main() -> None:
    """Read a YAML or JSON file and `key=value` pairs from the command line, as `llamafactory-cli train` does.

    Raises:
        ConfigError: the first word is not such a file.
    """
    args = read_args()
    if not isinstance(args, dict):
        raise ConfigError(f"{' '.join(args) or 'no arguments'}: name a .yaml or .json file, then key=value pairs")
    train(args)


if __name__ == "__main__":
    main()
