"""The path of `make demo`, with the demo's own config, on a tiny random model: two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from smoa.errors import DataError
from smoa_lab.cli.main import app
from smoa_lab.config.run import RunConfig, load_config
from smoa_lab.training import loaded_run
from tests.support import lab

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What turns the demo into two steps on a tiny model."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    lab.fill_cache(tmp_path / "cache", lab.questions(24, "train", "csqa"), lab.questions(8, "test", "csqa"), "csqa")
    base = lab.tiny_base(tmp_path / "base")
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 1, "use_cpu": True}
    return [
        f"model.name={base}",
        f"training.output_dir={tmp_path / 'run'}",
        "task.max_length=256",
        *(f"training.{key}={value}" for key, value in small.items()),
    ]


@pytest.fixture
def finished(overrides: list[str], tmp_path: Path) -> tuple[str, Path]:
    """What the demo printed, and its run folder."""
    result = CliRunner().invoke(app, ["demo", str(DEMO), *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, tmp_path / "run"


def test_the_demo_trains_scores_reloads_merges_and_says_where_things_lie(finished: tuple[str, Path]) -> None:
    output, run = finished
    assert "before" in output
    assert "after" in output
    assert "trainable parameters" in output
    assert "they agree" in output
    assert str(run / "adapter") in output
    assert {"adapter", "config.yaml", "metrics.json", "loss_curve.png", "loss_curve.svg", "train.log"} <= {
        f.name for f in run.iterdir()
    }


def test_the_demo_needs_no_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[RunConfig] = []

    def prepare(config: RunConfig) -> None:
        started.append(config)
        raise DataError("far enough")

    monkeypatch.setattr(loaded_run, "load_run", prepare)
    monkeypatch.chdir(tmp_path)
    assert "far enough" in CliRunner().invoke(app, ["demo"]).output
    assert started == [load_config(DEMO)]


def test_its_metrics_say_where_they_come_from(finished: tuple[str, Path]) -> None:
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 2
    assert metrics["parameters"]["trainable"] > 0
    assert metrics["parameters"]["adapter_bytes"] > 4 * metrics["parameters"]["trainable"]
    assert {"commit", "dirty", "versions", "device", "seed"} <= metrics["provenance"].keys()
    assert metrics["data"]["used"]["test"]["examples"] == 8
    assert metrics["evaluation"]["after"]["all"]["questions"] == 8


def test_a_second_demo_leaves_the_first_as_it_is(finished: tuple[str, Path], overrides: list[str]) -> None:
    first = (finished[1] / "metrics.json").read_bytes()
    result = CliRunner().invoke(app, ["demo", str(DEMO), *overrides], catch_exceptions=False)
    assert result.exit_code == 0
    assert "run-2" in result.output
    assert (finished[1] / "metrics.json").read_bytes() == first


def test_training_into_a_finished_run_is_refused(finished: tuple[str, Path], overrides: list[str]) -> None:
    result = CliRunner().invoke(app, ["train", str(DEMO), *overrides])
    assert result.exit_code == 1
    assert "contains a finished run" in result.output


def test_a_config_written_by_a_run_starts_the_same_run(finished: tuple[str, Path], tmp_path: Path) -> None:
    written = yaml.safe_load((finished[1] / "config.yaml").read_text())
    written["training"]["output_dir"] = str(tmp_path / "again")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(written))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "again.yaml"), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    first = json.loads((finished[1] / "metrics.json").read_text())
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["evaluation"] == first["evaluation"]
