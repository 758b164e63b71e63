from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from smoa.errors import ConfigError
from smoa_lab.config.rows_config import load_any_config
from smoa_lab.config.run_config import ModelSection, adapter_rate, load_config, native_dtype

CONFIGS = Path(__file__).parents[4] / "configs"
SIZES = {"gemma3-270m": 268_098_176, "smollm2-135m": 134_515_008}
"""Parameters of the packaged models."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_ready_config_is_valid(path: Path) -> None:
    # Without use_cpu a config for a GPU is refused where there is none, as it should be.
    assert load_any_config(path, ["training.use_cpu=true"]).data


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_ready_config_with_the_default_scale_has_the_settings_that_init_proposes(path: Path) -> None:
    config = load_any_config(path, ["training.use_cpu=true"])
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
    monkeypatch.setattr("smoa_lab.config.run_config.cpu_multiplies_bfloat16", lambda: True)
    assert ModelSection(name="base").dtype == "bfloat16"
    monkeypatch.setattr("smoa_lab.config.run_config.cpu_multiplies_bfloat16", lambda: False)
    assert ModelSection(name="base").dtype == "float32"


def test_an_override_changes_one_value(file: Path) -> None:
    config = load_config(file, ["training.learning_rate=3e-3", "data.tasks=[piqa, boolq]"])
    assert config.training["learning_rate"] == 0.003
    assert config.data.tasks == ["piqa", "boolq"]


@pytest.mark.parametrize("key", ["trust_remote_code", "options.trust_remote_code", "options.allow_all_kernels"])
def test_a_file_or_an_override_cannot_let_a_repository_run_its_code(file: Path, key: str) -> None:
    refused = rf"model\.{re.escape(key)}: a file can't allow a repository to run its code; .* --trust-remote-code"
    with pytest.raises(ConfigError, match=refused):
        load_config(file, [f"model.{key}=true"])
    *parents, last = key.split(".")
    value = f"{{name: base, options: {{{last}: yes}}}}" if parents else f"{{name: base, {last}: true}}"
    file.write_text(file.read_text().replace("{name: base}", value))
    with pytest.raises(ConfigError, match=f"line 2: {refused}"):
        load_any_config(file)


def test_the_command_lets_a_repository_run_its_code_and_the_runs_config_says_so(file: Path) -> None:
    config = load_config(file, trust_remote_code=True)
    assert config.model.trust_remote_code
    file.write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=r"trust_remote_code: a file can't allow"):
        load_config(file)
    assert load_config(file, trust_remote_code=True) == config
    assert not load_config(file, ["model.trust_remote_code=false"]).model.trust_remote_code


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("model: {name: größe}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read as text in UTF-8"):
        load_config(file)


def test_a_command_for_questions_says_what_a_config_for_rows_is(file: Path) -> None:
    file.write_text("model: {name: x}\ndata: {train: chats.jsonl}\n")
    with pytest.raises(ConfigError, match=r"trains on rows \(data\.train or data\.hub\); this command takes questions"):
        load_config(file)
