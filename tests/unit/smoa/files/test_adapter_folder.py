"""Folders with missing, damaged or foreign files are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from smoa import AdapterFileError, ConfigError, SmoaConfig
from tests.support import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny_models.build("llama"), config).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **kwargs: Any) -> PeftModel:
    return PeftModel.from_pretrained(tiny_models.build("llama"), folder, **kwargs)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"adapter_config\.json"):
        load(folder)


def test_a_folder_without_the_adapter_file_is_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=folder.name):  # PEFT's own: it looks for the file on the hub
        load(folder)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_adapter_file_is_refused(folder: Path, kept: int) -> None:
    file = folder / "adapter_model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|safetensor") as caught:
        load(folder)
    assert type(caught.value).__name__ in {"SafetensorError", "AdapterFileError"}


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "SMOA", "r": ')
    with pytest.raises(json.JSONDecodeError):
        load(folder)


def test_a_config_with_a_broken_rule_is_refused(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": -4}))
    with pytest.raises(ConfigError, match=r"r=-4"):
        load(folder)


def test_a_file_of_another_method_under_our_config_is_refused(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("lora")
    get_peft_model(tiny_models.build("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(other)
    (other / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"smoa_A"):
        load(folder)


def test_our_file_under_the_config_of_another_method_does_not_pass_for_it(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("lora")
    get_peft_model(tiny_models.build("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(other)
    (folder / "adapter_model.safetensors").rename(other / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        load(other)
