"""LoRAs of several ranks cut from a run's adapter, and what they lose of its task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from smoa import SmoaConfig
from smoa.conversion import RankRule
from smoa.errors import ConfigError
from smoa_lab import convert as convert_module
from smoa_lab.config.run import check_config
from smoa_lab.convert import Converter, convert_run
from smoa_lab.training.run_folder import RunFolder
from tests.support import lab

ADAPTER = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run's config."""
    return lab.tiny_run(
        tmp_path, monkeypatch, train=10, test=5, training={}, adapter=ADAPTER, data={"tasks": ["arc_easy"]}
    )


def finished_run(values: dict[str, Any]) -> Path:
    """A folder as a run of that config leaves it, with an adapter of random factors."""
    run = RunFolder(Path(values["training"]["output_dir"]))
    base = LlamaForCausalLM.from_pretrained(values["model"]["name"])
    config = SmoaConfig(**ADAPTER, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(run.adapter)
    run.config.write_text(check_config(values).to_yaml())
    return run.path


def test_a_higher_rank_keeps_more_of_update_and_task(values: dict[str, Any], tmp_path: Path) -> None:
    converter = Converter(finished_run(values))
    before = converter.base_losses
    points = [converter.cut(RankRule(rank=rank), tmp_path / f"rank-{rank}") for rank in (1, 4, 32)]
    assert [point["rank"] for point in points][:2] == [1, 4]
    assert points[0]["error"] > points[1]["error"] > points[2]["error"]
    assert points[2]["error"] < 1e-6
    changes = [abs(point["loss"]["lora_change"]) for point in points]
    assert changes[2] < 1e-5 < changes[0]
    assert points[2]["loss"]["gain_kept"] == pytest.approx(1.0, abs=1e-3)
    assert converter._losses(converter.base) == before
    for spectrum in converter.spectra.layers.values():
        needed = [RankRule(error=error).choose(spectrum.values) for error in (0.5, 0.3, 0.1, 0.05)]
        assert needed == sorted(needed)
        assert len(spectrum.rows) == 2


def test_an_adapter_that_learned_nothing_has_no_gain_to_keep(values: dict[str, Any], tmp_path: Path) -> None:
    converter = Converter(finished_run(values))
    converter.adapter_losses = converter.base_losses
    assert converter.cut(RankRule(rank=2), tmp_path / "lora")["loss"]["gain_kept"] is None


def test_without_held_out_questions_the_task_is_not_scored(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"]["test_examples"] = 0
    report = convert_run(finished_run(values), tmp_path / "lora", RankRule(rank=2))
    assert report["loss"] is None
    assert report["rank"] == 2
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_scoring_can_be_left_out_and_a_local_base_is_named_in_the_loras_config_only(
    values: dict[str, Any], tmp_path: Path
) -> None:
    report = convert_run(finished_run(values), tmp_path / "lora", RankRule(error=0.1), score=False)
    assert report["loss"] is None
    assert report["error"] <= 0.1
    assert lab.files_with(tmp_path, tmp_path / "lora") == {"adapter_config.json"}


def test_a_packaged_base_is_named_by_what_it_was_made_from(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(values)
    file = RunFolder(run).adapter / "adapter_config.json"
    cached = tmp_path / "cache" / "models" / "gemma3-270m"
    cached.parent.mkdir(parents=True)
    Path(values["model"]["name"]).rename(cached)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(cached)}))
    convert_run(run, tmp_path / "lora", RankRule(rank=2), score=False)
    assert lab.files_with(tmp_path, tmp_path / "lora") == set()
    assert LoraConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == "google/gemma-3-270m"


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT looks where the base was
def test_another_base_takes_the_place_of_the_runs(values: dict[str, Any], tmp_path: Path) -> None:
    run = finished_run(values)
    Path(values["model"]["name"]).rename(tmp_path / "moved")
    report = convert_run(run, tmp_path / "lora", RankRule(rank=2), base=str(tmp_path / "moved"))
    assert report["loss"] is not None


def test_an_adapter_of_another_method_is_refused_by_its_type(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = LlamaForCausalLM.from_pretrained(values["model"]["name"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(convert_module, "load_base_model", pytest.fail)
    with pytest.raises(ConfigError, match="adapter: is an adapter of the type LORA; only SMoA's are converted"):
        convert_run(tmp_path / "adapter", tmp_path / "lora", RankRule(rank=2))
    assert not (tmp_path / "lora").exists()
