from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel

from smoa import ConfigError
from tests.support import tiny_models
from tests.support.stubs import import_with_stubs

ARGUMENTS = {
    "model_kwargs": {"smoa": {"num_blocks": 4}},
    "lorap_lr_ratio": None,
    "task_type": "causal_lm",
    "lora_rank": 8,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "lora_bias": "none",
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "modules_to_save": [],
    "use_rslora": False,
    "use_dora": False,
    "init_weights": True,
}
"""What swift 4.6 gives a tuner, as far as the LoRA of its own reads it."""


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, where swift has its own tuners only."""
    tuner = {
        "get_target_modules": lambda args, model: args.target_modules,
        "get_modules_to_save": lambda args, model, task: args.modules_to_save,
    }
    plugin = {"PeftTuner": type("PeftTuner", (), {}), "tuners_map": {"ia3": object}}
    stubs = {"swift.pipelines.train.tuner": tuner, "swift.tuner_plugin": plugin}
    return import_with_stubs(monkeypatch, "smoa.integrations.swift", stubs)


def adapted(swift: ModuleType, **changed: Any) -> Any:
    model = swift.tuners_map["smoa"].prepare_model(
        SimpleNamespace(**{**ARGUMENTS, **changed}), tiny_models.build("llama")
    )
    assert isinstance(model, PeftModel)
    return model.peft_config["default"]


def test_importing_the_module_adds_the_tuner_type(swift: ModuleType) -> None:
    assert swift.tuners_map.keys() == {"ia3", "smoa"}
    assert issubclass(swift.tuners_map["smoa"], swift.PeftTuner)


def test_swifts_arguments_and_the_block_make_the_adapter(swift: ModuleType) -> None:
    config = adapted(swift)
    assert (config.r, config.alpha, config.num_blocks, config.task_type) == (8, 64, 4, "CAUSAL_LM")
    assert config.target_modules == {"q_proj"}


def test_a_task_that_peft_does_not_name_has_none(swift: ModuleType) -> None:
    assert adapted(swift, task_type="embedding").task_type is None


@pytest.mark.parametrize("model_kwargs", [None, {"max_pixels": 1}])
def test_the_block_may_be_absent(swift: ModuleType, model_kwargs: dict[str, Any] | None) -> None:
    assert adapted(swift, model_kwargs=model_kwargs).num_blocks == 2


def test_a_block_that_is_no_mapping_is_refused(swift: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"--model_kwargs: smoa='4' is not a mapping; write e.g."):
        adapted(swift, model_kwargs={"smoa": "4"})


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"lorap_lr_ratio": 16.0}, "lorap_lr_ratio"), ({"init_weights": "pissa"}, "init_lora_weights")],
)
def test_what_only_lora_has_is_refused(swift: ModuleType, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^--model_kwargs: smoa: {named}: a setting of LoRA"):
        adapted(swift, **changed)
