from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftConfig
from trl import DPOConfig

from smoa import ConfigError, SmoaConfig
from smoa_lab.config.methods import find_method, method_names
from smoa_lab.config.run import ModelSection, adapter_rate, check_config, load_config, native_dtype
from smoa_lab.config.yaml_text import apply_overrides, parse_yaml, to_yaml

ROWS = """
model: {name: base}
adapter: {r: 4, num_blocks: 2, target_modules: [q_proj]}
data:
  train: rows.jsonl
training:
  max_steps: 3
"""
CONFIGS = Path(__file__).parents[4] / "configs"
SIZES = {"gemma3-270m": 268_098_176, "smollm2-135m": 134_515_008}
"""Parameters of the packaged models."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_ready_config_is_valid_and_with_the_default_scale_has_the_settings_that_init_proposes(path: Path) -> None:
    # Without use_cpu a config for a GPU is refused where there is none, as it should be.
    config = load_config(path, ["training.use_cpu=true"])
    if "scale" not in config.adapter:
        part = 0.5 if path.stem == "demo" else 1  # as its comment says
        assert config.training["learning_rate"] == part * adapter_rate(SIZES[config.model.name])
        assert (config.adapter["num_blocks"], config.adapter["alpha"]) == (4, 2 * config.adapter["r"])


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(22e6, 2e-3), (3e8, 2e-3), (5e8, 7.5e-4), (math.sqrt(3e17), 6.3e-4), (1e9, 2e-4), (7e10, 2e-4)],
)
def test_the_learning_rate_falls_with_the_models_size(parameters: float, rate: float) -> None:
    assert adapter_rate(int(parameters)) == rate


def test_a_model_is_loaded_in_what_the_machine_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelSection(name="base").dtype == native_dtype()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: True)
    assert ModelSection(name="base").dtype == "bfloat16"
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: False)
    assert ModelSection(name="base").dtype == "float32"


@pytest.mark.parametrize("key", ["trust_remote_code", "options.trust_remote_code", "options.allow_all_kernels"])
def test_a_file_or_an_override_cannot_let_a_repository_run_its_code(file: Path, key: str) -> None:
    refused = rf"model\.{re.escape(key)}: a file can't allow a repository to run its code; .* --trust-remote-code"
    with pytest.raises(ConfigError, match=refused):
        load_config(file, [f"model.{key}=true"])
    *parents, last = key.split(".")
    value = f"{{name: base, options: {{{last}: yes}}}}" if parents else f"{{name: base, {last}: true}}"
    file.write_text(file.read_text().replace("{name: base}", value))
    with pytest.raises(ConfigError, match=f"line 2: {refused}"):
        load_config(file)


@pytest.mark.parametrize("key", ["token", "hub_token", "my_access_token", "api_key", "wandb_api_key", "password"])
def test_a_file_or_an_override_cannot_hold_a_secret(file: Path, key: str) -> None:
    refused = rf"model\.options\.{key}: a config can't hold a secret; leave it out, and set HF_TOKEN"
    with pytest.raises(ConfigError, match=refused) as caught:
        load_config(file, [f"model.options.{key}=hf_one"])
    assert "hf_one" not in str(caught.value)
    file.write_text(file.read_text().replace("{name: base}", f"{{name: base, options: {{{key}: hf_one}}}}"))
    with pytest.raises(ConfigError, match=f"line 2: {refused}"):
        load_config(file)


@pytest.mark.parametrize("option", ["pad_token=<pad>", "eos_token=</s>", "num_tokens=2", "token=true"])
def test_a_tokenizers_own_tokens_and_counts_are_no_secrets(file: Path, option: str) -> None:
    assert option.partition("=")[0] in load_config(file, [f"model.options.{option}"]).model.options


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    file = tmp_path / "latin.yaml"
    file.write_bytes("model: {name: größe}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read as text in UTF-8"):
        load_config(file)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A run's YAML file, without a mistake."""
    file = tmp_path / "mine.yaml"
    file.write_text(ROWS)
    return file


def problems(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, list(overrides))
    return str(caught.value)


def test_data_decide_what_a_run_learns_from(rows: Path, tmp_path: Path) -> None:
    config = load_config(rows)
    assert config.rows.train == "rows.jsonl"
    with pytest.raises(ConfigError, match=r"data: names rows \(data\.train or data\.hub\); this takes questions"):
        assert config.questions
    (tmp_path / "hub.yaml").write_text(ROWS.replace("train: rows.jsonl", "hub: {name: owner/rows}"))
    assert load_config(tmp_path / "hub.yaml").has_rows
    (tmp_path / "tasks.yaml").write_text(ROWS.replace("train: rows.jsonl", "tasks: [arc_easy]"))
    config = load_config(tmp_path / "tasks.yaml")
    assert config.questions.tasks == ["arc_easy"]
    with pytest.raises(ConfigError, match=r"data: names questions \(data\.tasks\); this takes rows"):
        assert config.rows


def test_what_serves_questions_alone_is_refused_and_left_out_for_rows(rows: Path, file: Path) -> None:
    assert "task: is for questions" in problems(rows, "task.max_length=100")
    assert "task" not in load_config(rows).model_dump()
    assert "early_stopping" not in load_config(file).model_dump()


def test_a_saved_config_is_read_as_the_same_run(rows: Path) -> None:
    config = load_config(rows, ["early_stopping=2", "training.eval_strategy=epoch"])
    rows.write_text(config.to_yaml())
    assert load_config(rows) == config


def test_an_unknown_key_is_told_the_nearest(rows: Path) -> None:
    found = problems(rows, "data.chat_templat=alpaca", "training.max_lenght=3", "early_stoping=3")
    for said in ("did you mean 'chat_template'", "did you mean 'max_length'", "did you mean 'early_stopping'"):
        assert said in found
    assert "3 problems" in found
    assert "did you mean 'messages'" in problems(rows, "data.format=message")
    assert "did you mean 'revision'" in problems(rows, "data.hub={name: a/b, revison: x}", "data.train=null")


def test_rows_come_from_one_place(rows: Path) -> None:
    for changes in (["data.hub={name: owner/rows}"], ["data.hub=null", "data.train=null"]):
        assert "give either train, a file or a folder, or hub, a data set of the Hub" in problems(rows, *changes)


def test_shares_and_numbers_are_within_bounds(rows: Path) -> None:
    for change in ("test_part=1", "validation_part=-0.1", "samples=-1", "train_examples=0"):
        assert f"data.{change.partition('=')[0]}: " in problems(rows, f"data.{change}")
    for value in ("0", "1.5"):
        assert "early_stopping: " in problems(rows, f"early_stopping={value}", "training.eval_strategy=epoch")
    assert "training.packing: " in problems(rows, "training.packing=7")
    assert "training: " in problems(rows, "training=7")


@pytest.mark.parametrize(
    ("changes", "name"),
    [(["data.format=preference"], "DPOConfig"), (["training.beta=0.1"], "DPOConfig"), ([], "SFTConfig")],
)
def test_preferences_are_trained_by_dpo_where_format_or_keys_say_so(changes: list[str], name: str, rows: Path) -> None:
    assert f"training.max_lenght: {name} has no such key" in problems(rows, *changes, "training.max_lenght=3")


def test_the_keys_of_a_trainer_are_picked_and_others_are_refused(rows: Path) -> None:
    arguments: Any = load_config(rows, ["training.use_cpu=true"]).arguments("preference")
    assert isinstance(arguments, DPOConfig)
    assert arguments.max_steps == 3
    with pytest.raises(ConfigError, match="beta, ld_alpha is not for SFTConfig, which trains rows of the format text"):
        load_config(rows, ["training.beta=1.0", "training.ld_alpha=0.5", "training.use_cpu=true"]).arguments("text")
    with pytest.raises(ConfigError, match=r"training\.chat_template_path: .* data\.chat_template; leave it out"):
        load_config(rows, ["training.chat_template_path=x", "training.use_cpu=true"]).arguments("messages")


def test_tokens_that_are_cut_and_labeled_are_left_to_the_trainer_as_they_are(rows: Path) -> None:
    for changes, length in (([], None), (["training.packing=true", "training.max_length=64"], 64)):
        arguments: Any = load_config(rows, ["training.use_cpu=true", *changes]).arguments("messages")
        assert (arguments.assistant_only_loss, arguments.max_length) == (False, length)
        assert arguments.gradient_checkpointing


def stopping(**training: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": {"name": "base"}, "data": {"train": "rows.jsonl"}, "training": training}
    return check_config(values | {"early_stopping": 3, "method": "full"}).training


def test_early_stopping_keeps_a_checkpoint_of_each_evaluation() -> None:
    found = stopping(eval_strategy="steps", eval_steps=7)
    assert found["load_best_model_at_end"] is True
    assert (found["save_strategy"], found["save_steps"]) == ("steps", 7)
    assert stopping(eval_strategy="epoch")["save_strategy"] == "epoch"
    assert "save_steps" not in stopping(eval_strategy="epoch")
    assert stopping(eval_strategy="steps", eval_steps=2, save_steps=4)["save_steps"] == 4


def test_early_stopping_needs_validation() -> None:
    with pytest.raises(ConfigError, match="early_stopping: needs the loss on validation rows; set training"):
        stopping()


@pytest.mark.parametrize(
    ("override", "message"),
    [("training", "key.key=value"), ("=3", "key.key=value"), ("model.name.first=3", "name is not a block of keys")],
)
def test_an_override_that_goes_nowhere_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"model": {"name": "base"}}, [override])


def test_numbers_in_exponent_notation_are_numbers_and_no_is_a_word(file: Path) -> None:
    training = load_config(file, ["training.eval_strategy=no", "training.bf16=false"]).training
    assert (training["learning_rate"], training["eval_strategy"], training["bf16"]) == (0.01, "no", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1"),
        ("- 1", r"run\.yaml: must contain blocks"),
        ("", "must contain blocks"),
        ("model: 1\nmodel: 2", 'line 2: found duplicate key "model"'),
        ("a: 2020-99-99", "month must be in 1..12"),
    ],
)
def test_text_that_is_no_config_is_refused_with_its_place(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_what_is_not_yaml_is_a_text_in_an_override() -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, ["a.b=[1, 2]", "a.c=[1", "a.d=1e-3"])
    assert values == {"a": {"b": [1, 2], "c": "[1", "d": 0.001}}


def test_what_is_written_is_read_again_as_it_was() -> None:
    values = {"b": {"text": "1e-3", "word": "no", "number": 1e-5, "none": None, "empty": {}, "list": [1, "é"]}, "a": 1}
    text = to_yaml(values)
    assert parse_yaml(text, Path("run.yaml")) == values
    assert text.index("b:") < text.index("a:")
    assert to_yaml({"train": "a long path " * 50}).count("\n") == 1


@pytest.mark.filterwarnings("ignore:Bone will be removed")  # of PEFT 0.18
@pytest.mark.parametrize("name", method_names())
def test_every_method_makes_a_config_for_causal_language_models(name: str) -> None:
    config = find_method(name).peft_config({"total_step": 10} if name == "adalora" else {})
    if name == "full":
        assert config is find_method(name).config_class is None
    else:
        assert isinstance(config, PeftConfig)
        assert config.task_type == "CAUSAL_LM"


def test_a_method_of_peft_is_found_by_its_name_in_any_case() -> None:
    assert find_method("IA3").config_class is IA3Config
    assert find_method("DoRA") is find_method("dora")
    assert (find_method("waveft").budget_key, find_method("lora").budget_key) == ("n_frequency", "r")
    assert find_method("ia3").budget_key is find_method("full").budget_key is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smao",
            r"method: there is no method 'smao'; did you mean 'smoa'\? PEFT .* and smoa have adalora, .*, waveft; ",
        ),
        ("???", r"no method '\?\?\?'; PEFT .* have adalora, "),
        ("prompt_tuning", "method: prompt_tuning trains virtual tokens before the text.*choose another"),
        ("poly", "method: poly chooses among its parameters by task ids"),
    ],
)
def test_a_method_that_no_run_can_train_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_method(name)
    assert name not in method_names()


def test_a_preset_wins_over_the_block_and_the_block_over_the_task_type() -> None:
    config = find_method("melora").peft_config({"partition": "spectral", "task_type": "SEQ_CLS"})
    assert isinstance(config, SmoaConfig)
    assert (config.partition, config.modulation, config.task_type) == ("contiguous", "none", "SEQ_CLS")
