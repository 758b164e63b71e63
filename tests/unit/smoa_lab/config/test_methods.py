from __future__ import annotations

import re

import peft
import pytest
from packaging.version import Version
from peft import PeftConfig

from smoa import ConfigError, SmoaConfig
from smoa_lab.config.methods import METHODS, Method
from tests.support.peft_versions import METHODS_SINCE, installed


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_config_for_causal_language_models_or_is_refused_by_name(name: str) -> None:
    block = {"target_modules": ["q_proj"], **({"total_step": 10} if name == "adalora" else {})}
    if installed() < Version(METHODS_SINCE.get(name, "0")):
        with pytest.raises(ConfigError, match=rf" is not in PEFT {re.escape(peft.__version__)}; run: pip install -U"):
            METHODS[name].peft_config(block)
        return
    config = METHODS[name].peft_config(block)
    if name == "full":
        assert config is METHODS[name].config_class is None
    else:
        assert isinstance(config, PeftConfig)
        assert config.task_type == "CAUSAL_LM"


def test_a_method_that_the_installed_peft_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"NoSuchConfig is not in PEFT \d"):
        _ = Method("peft:NoSuchConfig").config_class


def test_what_the_installed_peft_cannot_do_after_training_is_refused_before() -> None:
    with pytest.raises(ConfigError, match=r"reduce_all is not in PEFT \d"):
        _ = Method("peft:LoraConfig", then="peft.tuners.lora.no_module:reduce_all").config_class


def test_a_preset_wins_over_the_block_and_the_block_over_the_task_type() -> None:
    config = METHODS["melora"].peft_config({"partition": "spectral", "task_type": "SEQ_CLS"})
    assert isinstance(config, SmoaConfig)
    assert (config.partition, config.modulation, config.task_type) == ("contiguous", "none", "SEQ_CLS")
