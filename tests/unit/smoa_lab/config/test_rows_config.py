from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig, SFTConfig

from smoa.errors import ConfigError
from smoa_lab.config.rows_config import (
    RowsConfig,
    check_rows_config,
    check_training_keys,
    load_any_config,
    training_class,
)
from smoa_lab.config.run_config import RunConfig

RUN = """
model: {name: base}
adapter: {r: 4, num_blocks: 2, target_modules: [q_proj]}
data:
  train: rows.jsonl
training:
  max_steps: 3
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A run's YAML file, without a mistake."""
    file = tmp_path / "mine.yaml"
    file.write_text(RUN)
    return file


def problems(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_any_config(file, list(overrides))
    return str(caught.value)


def test_data_decide_what_a_run_learns_from(rows: Path, tmp_path: Path) -> None:
    assert isinstance(load_any_config(rows), RowsConfig)
    (tmp_path / "hub.yaml").write_text(RUN.replace("train: rows.jsonl", "hub: {name: owner/rows}"))
    assert isinstance(load_any_config(tmp_path / "hub.yaml"), RowsConfig)
    (tmp_path / "tasks.yaml").write_text(RUN.replace("train: rows.jsonl", "tasks: [arc_easy]"))
    assert isinstance(load_any_config(tmp_path / "tasks.yaml"), RunConfig)


def test_defaults_are_those_of_training_an_adapter_on_conversations(rows: Path) -> None:
    config = load_any_config(rows)
    wanted = {"bf16": False, "assistant_only_loss": True, "report_to": "none", "max_steps": 3}
    assert wanted.items() <= config.training.items()
    assert config.folder == Path("runs/mine")


def test_a_saved_config_is_read_as_the_same_run(rows: Path) -> None:
    config = load_any_config(rows, ["early_stopping=2", "training.eval_strategy=epoch"])
    rows.write_text(config.to_yaml())
    assert load_any_config(rows) == config


def test_an_unknown_key_is_told_the_nearest(rows: Path) -> None:
    found = problems(rows, "data.chat_templat=alpaca", "training.max_lenght=3", "early_stoping=3")
    for said in ("did you mean 'chat_template'", "did you mean 'max_length'", "did you mean 'early_stopping'"):
        assert said in found
    assert "3 problems" in found
    assert "did you mean 'revision'" in problems(rows, "data.hub={name: a/b, revison: x}", "data.train=null")


def test_an_unknown_format_is_told_the_nearest(rows: Path) -> None:
    assert "data.format: " in problems(rows, "data.format=message")
    assert "did you mean 'messages'" in problems(rows, "data.format=message")


def test_rows_come_from_one_place(rows: Path) -> None:
    for changes in (["data.hub={name: owner/rows}"], ["data.hub=null", "data.train=null"]):
        assert "give either train, a file or a folder, or hub, a data set of the Hub" in problems(rows, *changes)


@pytest.mark.parametrize("change", ["test_part=1", "validation_part=-0.1", "samples=-1", "train_examples=0"])
def test_shares_and_numbers_are_within_bounds(change: str, rows: Path) -> None:
    assert f"data.{change.partition('=')[0]}: " in problems(rows, f"data.{change}")


def test_preferences_are_trained_by_dpo_where_format_or_keys_say_so() -> None:
    assert training_class({}, prefers=True) is DPOConfig
    assert training_class({"beta": 0.1}, prefers=False) is DPOConfig
    assert training_class({"packing": True}, prefers=False) is SFTConfig
    assert training_class({}, prefers=False) is SFTConfig


def test_keys_of_dpo_are_known(rows: Path) -> None:
    config = load_any_config(rows, ["data.format=preference", "training.beta=0.3"])
    assert config.training["beta"] == 0.3
    assert "assistant_only_loss" not in config.training
    assert "training.packing: DPOConfig has no such key" in problems(
        rows, "data.format=preference", "training.packing=true"
    )


def test_values_of_the_wrong_type_are_refused(rows: Path) -> None:
    assert "training.packing: " in problems(rows, "training.packing=7")
    assert "training: " in problems(rows, "training=7")


def test_the_keys_of_a_trainer_are_picked_and_others_are_refused() -> None:
    training = {"bf16": False, "assistant_only_loss": True, "max_steps": 3}
    assert check_training_keys(training, SFTConfig, "text") == training
    assert check_training_keys(training, DPOConfig, "preference") == {"bf16": False, "max_steps": 3}
    with pytest.raises(ConfigError, match="beta, loss_weights is not for SFTConfig, which trains rows of the format"):
        check_training_keys({"beta": 1, "loss_weights": [1]}, SFTConfig, "messages")
    with pytest.raises(ConfigError, match=r"training\.chat_template_path: .* data\.chat_template; leave it out"):
        check_training_keys({"chat_template_path": "x"}, SFTConfig, "messages")
    with pytest.raises(ConfigError, match=r"training\.model_init_kwargs: .* model\.options; leave it out"):
        check_training_keys({"model_init_kwargs": {}}, DPOConfig, "preference")


def stopping(**training: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": {"name": "base"}, "data": {"train": "rows.jsonl"}, "training": training}
    return check_rows_config(values | {"early_stopping": 3, "method": "full"}).training


def test_early_stopping_keeps_a_checkpoint_of_each_evaluation() -> None:
    found = stopping(eval_strategy="steps", eval_steps=7)
    assert found["load_best_model_at_end"] is True
    assert (found["save_strategy"], found["save_steps"]) == ("steps", 7)
    assert stopping(eval_strategy="epoch")["save_strategy"] == "epoch"
    assert "save_steps" not in stopping(eval_strategy="epoch")
    assert stopping(eval_strategy="steps", eval_steps=2, save_steps=4)["save_steps"] == 4


@pytest.mark.parametrize(("training", "steps"), [({}, 10), ({"logging_steps": 7}, 7), ({"eval_steps": None}, 10)])
def test_early_stopping_evaluates_and_saves_as_often_as_it_logs_unless_told(
    training: dict[str, Any], steps: int
) -> None:
    found = SFTConfig(**stopping(eval_strategy="steps", use_cpu=True, **training))
    assert (found.logging_steps, found.eval_steps, found.save_steps) == (steps, steps, steps)


def test_early_stopping_needs_validation() -> None:
    with pytest.raises(ConfigError, match="early_stopping: needs the loss on validation rows; set training"):
        stopping()


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_early_stopping_counts_evaluations(value: str, rows: Path) -> None:
    assert "early_stopping: " in problems(rows, f"early_stopping={value}", "training.eval_strategy=epoch")
