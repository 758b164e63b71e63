from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from smoa.errors import ConfigError
from smoa_lab.cli.main import app
from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.trials import Trial
from smoa_lab.study.tune_run import tune_run
from tests.support import lab
from tests.support.own_rows import chats, pairs, rows_base, rows_config, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    lab.fill_cache(tmp_path / "cache", lab.questions(40, "train"), lab.questions(6, "test"))
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
    return {
        "model": {"name": str(lab.tiny_base(tmp_path / "base")), "dtype": "float32"},
        "adapter": {"r": 4, "num_blocks": 2, "target_modules": ["q_proj"]},
        "data": {"tasks": ["arc_easy"], "train_examples": 4, "validation_examples": 2},
        "training": {**training, "learning_rate": 0.01, "output_dir": str(tmp_path / "run")},
    }


@pytest.fixture
def config(values: dict[str, Any]) -> RunConfig:
    return check_config(values)


def test_the_search_finds_the_lowest_loss_and_keeps_its_runs(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def trial(self: Comparison, job: Trial) -> dict[str, Any]:
        tried.append(job.learning_rate)
        loss = abs(math.log(job.learning_rate / 0.016))
        scores = {"all": {"gold_loss": loss, "accuracy": 0.0}}
        return {"questions": {"nll": [loss]}, "scores": scores, "seconds": 1.0}

    monkeypatch.setattr(Comparison, "perform", trial)
    found = tune_run(config)
    assert tried == [0.01, 0.003, 0.03, 0.006, 0.02]
    assert found.learning_rate == 0.02
    assert found.interior


def test_a_search_on_questions_stops_as_early_as_the_run(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[int | None] = []

    def tune(self: Comparison, name: str) -> None:
        patience.append(self.runner.config(self.study.entries[name], 0.01, 0).early_stopping)

    monkeypatch.setattr(Comparison, "tune", tune)
    values["training"] |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    tune_run(check_config({**values, "early_stopping": 2}))
    assert patience == [2]


def test_a_run_without_a_validation_part_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"]["validation_examples"] = 0
    with pytest.raises(ConfigError, match=r"^data: leaves no validation questions, .* set data\.validation_examples"):
        tune_run(check_config(values))
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"Line {i}."} for i in range(6)])
    with pytest.raises(ConfigError, match=r"^data: leaves no validation rows, .* larger data\.validation_part"):
        tune_run(rows_config(tmp_path, file, Path(values["model"]["name"]), data={"validation_part": 0}))


def test_the_command_prints_the_line_for_the_config(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["tune", str(file), "--max-runs", "3"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "validation loss" in result.output
    assert "learning_rate: 0.0" in result.output.splitlines()[-1]
    assert len(list((tmp_path / "run-tuning").rglob("lr-*.json"))) == 3
    again = CliRunner().invoke(app, ["tune", str(file), "--max-runs", "3", "--json"], catch_exceptions=False)
    assert '"interior"' in again.output


@pytest.mark.parametrize("rows", [chats(10), pairs(10)], ids=["conversations", "preferences"])
def test_rows_are_compared_by_the_trainers_own_loss_on_those_held_out(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    file, base = write_rows(tmp_path / "rows.jsonl", rows), rows_base(tmp_path / "base")
    config = rows_config(tmp_path, file, base, data={"validation_part": 0.2}, training={"learning_rate": 1e-2})
    found = tune_run(config, max_runs=3)
    assert {1e-2, 3e-3, 3e-2} <= found.losses.keys()
    assert all(loss is not None and loss > 0 for loss in found.losses.values())
    assert len(set(found.losses.values())) == len(found.losses)
    monkeypatch.setattr("smoa_lab.study.tune_run.load_run", None)  # the runs are stored
    assert tune_run(config, max_runs=3) == found
