from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from smoa import ConfigError
from tests.support import tiny_models
from tests.support.stubs import import_with_stubs

Factory = Callable[[Any], ModuleType]


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Factory:
    """The module, for what the command line contains. Its `run_exp` keeps the arguments, and adapts a model as LoRA."""

    def run_exp(args: dict[str, Any]) -> None:
        lora = LoraConfig(r=args["lora_rank"], lora_alpha=64, target_modules=["q_proj"], task_type="CAUSAL_LM")
        loaded.adapter.seen = args
        loaded.adapter.model = loaded.adapter.get_peft_model(tiny_models.build("llama"), lora)

    def load(command_line: Any) -> ModuleType:
        nonlocal loaded
        stubs: dict[str, dict[str, Any]] = {
            "llamafactory.hparams.parser": {"read_args": lambda: command_line},
            "llamafactory.model.adapter": {"get_peft_model": get_peft_model},
            "llamafactory.train.tuner": {"run_exp": run_exp},
        }
        loaded = import_with_stubs(monkeypatch, "smoa.integrations.llamafactory", stubs)
        return loaded

    loaded: ModuleType
    return load


def test_the_file_is_trained_with_smoa_where_it_says_lora(factory: Factory) -> None:
    module = factory({"stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "smoa": {"num_blocks": 4}})
    module.main()
    config = module.adapter.model.peft_config["default"]
    assert (config.peft_type, config.r, config.num_blocks, config.alpha) == ("SMOA", 8, 4, 64)
    assert module.adapter.seen == {"stage": "sft", "finetuning_type": "lora", "lora_rank": 8}


def test_the_block_may_be_absent(factory: Factory) -> None:
    module = factory({"lora_rank": 8, "smoa": None})
    module.main()
    assert module.adapter.model.peft_config["default"].num_blocks == 2


def test_another_method_is_refused(factory: Factory) -> None:
    with pytest.raises(ConfigError, match=r"^finetuning_type: full: SMoA takes the place of LoRA"):
        factory({"finetuning_type": "full"}).main()


@pytest.mark.parametrize("name", ["use_unsloth", "pissa_init"])
def test_what_only_lora_has_is_refused(factory: Factory, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^smoa: {name}: a setting of LoRA that SMoA does not have"):
        factory({name: 2}).main()


@pytest.mark.parametrize(("words", "shown"), [([], "no arguments"), (["--stage", "sft"], "--stage sft")])
def test_words_that_name_no_file_are_refused(factory: Factory, words: list[str], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"^{shown}: name a .yaml or .json file"):
        factory(words).main()
