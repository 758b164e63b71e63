"""What lies in a place that a command is given: a run, a config file, an adapter, a model."""

import json
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.utils import CONFIG_NAME

from smoa.errors import ConfigError
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.open_run import open_place
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run as train
from tests.support import lab
from tests.support.lab import MARKED


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The config of an adapter that lies in no run."""
    folder = tmp_path / "mine"
    LoraConfig(base_model_name_or_path="its/base", revision="v2").save_pretrained(folder)
    return folder


def finished_run(folder: Path, method: str = "smoa") -> RunFolder:
    """A run's folder without weights."""
    run = RunFolder(folder)
    run.adapter.mkdir(parents=True)
    settings = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj"]} if method == "smoa" else {}
    values = {"model": {"name": "its/base", "dtype": "bfloat16"}, "method": method, "adapter": settings}
    config = check_config({**values, "data": {"train": "rows.jsonl"}, "training": {"output_dir": str(folder)}})
    run.config.write_text(config.to_yaml())
    run.metrics.write_text("{}")
    return run


def test_a_place_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contains neither a finished run \(metrics\.json\), an adapter"):
        open_place(tmp_path)


def test_the_recorded_base_is_loaded_in_the_recorded_revision_and_another_is_not(adapter: Path) -> None:
    recorded = ModelSection(name="its/base", options={"revision": "v2"})
    assert open_place(adapter).model.section == open_place(adapter, "its/base").model.section == recorded
    assert open_place(adapter, "another/base").model.section == ModelSection(name="another/base")
    assert open_place(adapter.parent / "mine").adapter == adapter
    LoraConfig(target_modules=["q_proj"]).save_pretrained(adapter)
    with pytest.raises(ConfigError, match=r"adapter_config\.json: records no base model; name it with --base"):
        open_place(adapter)


def test_a_run_is_opened_by_its_folder_or_its_adapter_and_gives_both_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run")
    section = ModelSection(name="its/base", dtype="bfloat16")
    for place in (run.path, run.adapter):
        opened = open_place(place)
        assert (opened.name, opened.adapter, opened.model.section) == ("run", run.adapter, section)
        monkeypatch.chdir(place)
        assert open_place(".").name == "run"
    assert open_place(run.path, "moved").with_changes("float16", "alpaca").model.section == ModelSection(
        name="moved", dtype="float16"
    )
    full = finished_run(tmp_path / "full", "full")
    assert open_place(full.path).model.section.name == str(full.adapter)
    with pytest.raises(ConfigError, match="contains no adapter"):
        _ = open_place(full.path).adapter


def test_a_model_is_opened_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for place in ("smollm2-135m", "google/gemma-3-270m", str(tmp_path / "model.gguf")):
        opened = open_place(place)
        assert (opened.model.section, opened.config) == (ModelSection(name=place), None)


def test_a_base_on_the_hub_is_that_of_the_commit_that_was_trained_on(tmp_path: Path) -> None:
    run, commit = finished_run(tmp_path / "run"), "0123456789abcdef" * 2 + "01234567"
    run.inputs.write_text(json.dumps({"data": "x", "base": commit}))
    for place in (run.path, run.adapter):
        assert open_place(place).model.section.options == {"revision": commit}
        assert open_place(place, "another/base").model.section.options == {}


def test_a_run_is_scored_by_the_template_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(2, save_strategy="no"))
    template = tmp_path / "own.jinja"
    written = re.sub(r"<\|im_(start|end)\|>", "#", MARKED)
    template.write_text(written)
    values["data"]["template"] = str(template)
    metrics = train(check_config(values))
    template.write_text(written.replace("#", "+"))
    found = evaluate_run(open_place(tmp_path / "run"))
    assert found["scores"]["loss"] == pytest.approx(metrics["evaluation"]["after"]["loss"], abs=1e-6)
    assert found["digests"]["encoder"] == metrics["digests"]["encoder"]
    opened = open_place(tmp_path / "run", overrides=[f"data.template={template}"])
    assert opened.config is not None
    assert opened.config.data.template == str(template)
    assert "was trained on another model" not in caplog.text
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    (tmp_path / "other/generation_config.json").write_text("{}")
    assert open_place(tmp_path / "run", base=str(tmp_path / "other"))
    assert "was trained on another model than" in caplog.text


def test_a_config_that_peft_cannot_read_is_pefts_error(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"peft_type": "NOPE"}')
    with pytest.raises((KeyError, ValueError), match="NOPE"):
        open_place(tmp_path)
