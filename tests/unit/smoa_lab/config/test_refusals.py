"""What the lab refuses before it works, each in one message, and where it keeps its things."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TrainingArguments

from smoa.errors import ConfigError, DataError
from smoa_lab.cache import cache_folder
from smoa_lab.config.run_config import check_config
from smoa_lab.config.yaml_text import apply_overrides, parse_yaml
from smoa_lab.data.files import _json_row
from smoa_lab.inspection.layers import _blocks, _rank_bound, _weight_and_update
from smoa_lab.runs.budget_choices import _limit, budget, model_shapes
from smoa_lab.runs.evaluate_run import open_run
from smoa_lab.training import run_folder, train_run
from smoa_lab.training.progress import ProgressReport
from tests.support import lab, tiny_models


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"SMOA_CACHE": "/chosen"}, "/chosen"),
        ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/smoa"),
        ("linux", {}, "/home/me/.cache/smoa"),
        ("darwin", {}, "/home/me/Library/Caches/smoa"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/smoa/Cache"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SMOA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"run\.yaml, line 1: "),
        ("- a\n- b\n", r"run\.yaml: must hold the blocks"),
        ("", "must hold the blocks"),
    ],
)
def test_text_that_is_no_config_is_refused_with_its_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, Path("run.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [("training", "key.key=value"), ("=3", "key.key=value"), ("model.name.first=3", "name is no block of keys")],
)
def test_an_override_that_goes_nowhere_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"model": {"name": "base"}}, [override])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, r"model\.name: is missing"),
        ({"method": "full", "adapter": {"r": 4}}, "method full trains all weights and takes no adapter keys"),
        ({"training": 3}, "training"),
        ({"data": {"tasks": "arc_easy"}}, r"data\.tasks"),
        ({"data": 3}, "data"),
        ({"adapter": 3}, "adapter: should be a valid dictionary"),
        ({"model": {"name": "x", "dtype": "float99"}}, r"model\.dtype"),
    ],
)
def test_a_block_that_is_wrong_is_told_by_its_key(change: dict[str, Any], message: str) -> None:
    config = {"model": {"name": "x"}, "data": {"tasks": ["arc_easy"]}, "training": {"output_dir": "run"}}
    with pytest.raises(ConfigError, match=message):
        check_config(config | change)


def test_what_training_arguments_refuse_themselves_is_told_as_well() -> None:
    training = {"output_dir": "run", "eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "epoch"}
    with pytest.raises(ConfigError, match="training: "):
        check_config({"model": {"name": "x"}, "data": {"tasks": ["arc_easy"]}, "training": training})


@pytest.mark.parametrize(
    ("amount", "message"), [("0", "must lie between"), ("200%", "must lie between"), ("x", "neither")]
)
def test_a_budget_that_is_none_is_refused(amount: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _limit(amount, 1000)


def test_a_model_whose_shapes_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the config"):
        model_shapes(str(tmp_path), ("q_proj",))
    LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no linear layers named nowhere"):
        model_shapes(str(tmp_path), ("nowhere",))
    assert model_shapes(str(tmp_path), ("q_proj",))[0] == Counter({(8, 8): 1})


def test_a_budget_that_buys_nothing_is_told_what_the_least_is(tmp_path: Path) -> None:
    base = str(lab.tiny_base(tmp_path))
    with pytest.raises(ConfigError, match=r"budget: '1' buys nothing; the least is 256 parameters"):
        budget(base, "1", ("q_proj", "o_proj"))
    least = budget(base, "256", ("q_proj", "o_proj"))
    assert {(choice.r - choice.num_blocks, choice.parameters) for choice in least} == {(0, 256)}


def test_another_methods_layer_is_inspected_without_blocks() -> None:
    model = get_peft_model(tiny_models.build("llama"), LoraConfig(r=3, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight, update = _weight_and_update(layer, "default")
    assert weight.shape == update.shape
    assert _rank_bound(layer, "default") == 3
    assert _blocks(layer, "default") == {}


def test_a_place_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a config file nor the folder of a finished run"):
        open_run(tmp_path)


def test_a_bar_follows_the_run_on_a_terminal() -> None:
    report = ProgressReport()
    report.on_terminal = True
    arguments, state = (
        TrainingArguments(use_cpu=True),
        SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0),
    )
    report.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    state.global_step = 2
    report.on_step_end(arguments, state, None)  # type: ignore[arg-type]
    report.on_log(arguments, state, None, {"loss": 1.5})  # type: ignore[arg-type]
    assert report.bar.tasks[0].completed == 2
    assert report.bar.tasks[0].description == "loss 1.5"
    report.on_train_end(arguments, state, None)  # type: ignore[arg-type]
    assert not report.bar.live.is_started


def test_provenance_without_git_or_a_known_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*call: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_folder.subprocess, "run", missing)
    assert run_folder._git_state() == {"commit": None, "dirty": None}
    assert run_folder._version("no-such-package") is None
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert run_folder._processor()


def test_a_line_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="line 3 holds no object"):
        _json_row(3, "[1]")


def test_processes_that_accelerate_does_not_count_don_t_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_run, "is_distributed", lambda: True)
    monkeypatch.setattr(train_run.dist, "get_world_size", lambda: 2)
    arguments = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(ConfigError, match=r"accelerate counts 1 of 2 processes, .*; leave deepspeed out"):
        train_run.training_arguments(SimpleNamespace(training=arguments))


def test_a_processor_that_does_not_tell_its_model_is_told_by_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "processor : 0\nBogoMIPS : 50.00\n")
    monkeypatch.setattr(run_folder.platform, "processor", lambda: "aarch64")
    assert run_folder._processor() == "aarch64"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "processor : 0\nmodel name : A processor\n")
    assert run_folder._processor() == "A processor"
