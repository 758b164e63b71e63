"""SMoA in training frameworks, which stubs stand for: axolotl, LLaMA-Factory, ms-swift."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from smoa import ConfigError, SmoaConfig
from smoa.integrations.lora_settings import check_settings, smoa_config
from tests.support import tiny
from tests.support.fakes import import_with_stubs


def test_what_both_methods_have_is_taken_over() -> None:
    both: dict[str, Any] = {"r": 12, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    both |= {"layers_to_transform": [1], "use_rslora": True, "task_type": "SEQ_CLS"}
    both |= {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3.0}}
    lora = LoraConfig(**both, lora_alpha=96, lora_dropout=0.25, bias="lora_only")
    config = smoa_config(lora, {}, "here")
    assert (config.r, config.alpha, config.smoa_dropout, config.bias) == (12, 96, 0.25, "smoa_only")
    assert config.use_rslora
    assert (config.target_modules, config.modules_to_save) == ({"q_proj", "v_proj"}, ["score"])
    assert (config.layers_to_transform, config.rank_pattern) == ([1], {"q_proj": 8})
    assert (config.alpha_pattern, config.task_type, config.peft_type) == ({"q_proj": 3.0}, "SEQ_CLS", "SMOA")


def test_the_block_adds_and_wins() -> None:
    block = {"num_blocks": 4, "lora_alpha": 512, "scale": "layer"}  # under LoRA's names too
    config = smoa_config(LoraConfig(r=8, lora_alpha=16, loftq_config={}), block, "here")
    assert (config.r, config.num_blocks, config.alpha, config.scale) == (8, 4, 512, "layer")


def test_settings_that_the_framework_leaves_unset_have_smoas_defaults() -> None:
    lora = LoraConfig()
    lora.r = lora.lora_alpha = None  # type: ignore[assignment]  # as axolotl passes them
    config = smoa_config(lora, {}, "here")
    assert (config.r, config.alpha) == (16, None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [(0, 1)], "use_dora": True}, "layer_replication, use_dora"),
    ],
)
def test_what_only_lora_has_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^file.yaml: {named}: a setting of LoRA that SMoA does not have; remove it"):
        smoa_config(LoraConfig(**changed), {}, "file.yaml")


def test_a_wrong_setting_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^file.yaml: SmoaConfig: .*num_blocks=0"):
        check_settings({"num_blocks": 0}, "file.yaml")


# axolotl


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
    model, config = axolotl.SmoaPlugin().load_adapter(tiny.build("llama"), cfg)
    assert isinstance(model, PeftModel)
    assert (config.peft_type, config.r, config.num_blocks, config.alpha) == ("SMOA", 8, 4, 64)
    assert model.peft_config["default"].target_modules == {"q_proj"}


@pytest.mark.parametrize("inference", [True, False])
def test_a_saved_adapter_is_loaded(axolotl: ModuleType, tmp_path: Path, inference: bool) -> None:
    saved = SmoaConfig(r=6, target_modules=["v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny.build("llama"), saved).save_pretrained(tmp_path)
    cfg = registered(axolotl, lora_model_dir=str(tmp_path))
    model, _ = axolotl.SmoaPlugin().load_adapter(tiny.build("llama"), cfg, inference=inference)
    assert model.peft_config["default"].r == 6
    assert any(parameter.requires_grad for parameter in model.parameters()) is not inference


@pytest.mark.parametrize("block", [{}, {"smoa": {"num_blocks": 4}}], ids=str)  # L22: one that was left over
@pytest.mark.parametrize("adapter", ["lora", None])
def test_other_adapters_are_left_alone(axolotl: ModuleType, adapter: str | None, block: dict[str, Any]) -> None:
    cfg = registered(axolotl, adapter=adapter, load_in_4bit=True, **block)
    axolotl.SmoaPlugin().pre_lora_load(cfg, None)
    assert {**cfg, "smoa": None} == {"adapter": adapter, "lora_r": 8, "load_in_4bit": True, "smoa": None}
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


def test_merging_is_by_the_model_in_memory(axolotl: ModuleType) -> None:
    assert registered(axolotl).merge_method == "legacy"
    with pytest.raises(ConfigError, match=r"^merge_method: memory_efficient merges LoRA only; write legacy"):
        registered(axolotl, merge_method="memory_efficient")


# LLaMA-Factory


Factory = Callable[[Any], ModuleType]


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Factory:
    """The module, for what the command line contains. Its `run_exp` keeps the arguments, and adapts a model as LoRA."""

    def run_exp(args: dict[str, Any]) -> None:
        lora = LoraConfig(r=args["lora_rank"], lora_alpha=64, target_modules=["q_proj"], task_type="CAUSAL_LM")
        loaded.adapter.seen = args
        loaded.adapter.model = loaded.adapter.get_peft_model(tiny.build("llama"), lora)

    def load(command_line: Any) -> ModuleType:
        nonlocal loaded
        stubs: dict[str, dict[str, Any]] = {
            "llamafactory.hparams.parser": {
                "read_args": lambda: command_line,
                "get_ray_args": lambda args: SimpleNamespace(use_ray=args.get("use_ray", False)),
            },
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
    assert module.adapter.get_peft_model is get_peft_model  # a later training of LoRA in this process is one


def test_a_training_in_rays_workers_is_refused(factory: Factory) -> None:
    with pytest.raises(ConfigError, match=r"^USE_RAY: the workers of Ray would train LoRA"):
        factory({"use_ray": True}).main()


def test_another_method_is_refused(factory: Factory) -> None:
    with pytest.raises(ConfigError, match=r"^finetuning_type: full: SMoA takes the place of LoRA"):
        factory({"finetuning_type": "full"}).main()


def test_what_only_lora_has_is_refused_in_llamafactorys_file(factory: Factory) -> None:
    with pytest.raises(ConfigError, match=r"^smoa: use_unsloth: a setting of LoRA that SMoA does not have"):
        factory({"use_unsloth": 2}).main()


@pytest.mark.parametrize(("words", "shown"), [([], "no arguments"), (["--stage", "sft"], "--stage sft")])
def test_words_that_name_no_file_are_refused(factory: Factory, words: list[str], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"^{shown}: name a .yaml or .json file"):
        factory(words).main()


# ms-swift


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
"""What swift 4.6 gives a tuner, as far as its LoRA reads it."""


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


def swift_config(swift: ModuleType, **changed: Any) -> Any:
    model = swift.tuners_map["smoa"].prepare_model(SimpleNamespace(**{**ARGUMENTS, **changed}), tiny.build("llama"))
    assert isinstance(model, PeftModel)
    return model.peft_config["default"]


def test_swifts_arguments_and_the_block_make_the_adapter(swift: ModuleType) -> None:
    config = swift_config(swift)
    assert (config.r, config.alpha, config.num_blocks, config.task_type) == (8, 64, 4, "CAUSAL_LM")
    assert config.target_modules == {"q_proj"}


@pytest.mark.parametrize("model_kwargs", [None, {"max_pixels": 1}])
def test_model_kwargs_may_be_absent(swift: ModuleType, model_kwargs: dict[str, Any] | None) -> None:
    assert swift_config(swift, model_kwargs=model_kwargs).num_blocks == 2


def test_a_block_that_is_no_mapping_is_refused(swift: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"--model_kwargs: smoa='4' is not a mapping; write e.g."):
        swift_config(swift, model_kwargs={"smoa": "4"})


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"lorap_lr_ratio": 16.0}, "lorap_lr_ratio"), ({"init_weights": "pissa"}, "init_lora_weights")],
)
def test_what_only_lora_has_is_refused_in_swifts_arguments(
    swift: ModuleType, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^--model_kwargs: smoa: {named}: a setting of LoRA"):
        swift_config(swift, **changed)
