"""The path of `make demo`, with the demo's own config, on a tiny random model: two steps."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from tests.support import lab

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What turns the demo into two steps on a tiny model."""
    room = tmp_path_factory.mktemp("room")
    base = lab.tiny_base(room / "base")
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 1, "use_cpu": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        yield [
            f"model.name={base}",
            f"training.output_dir={room / 'run'}",
            "data.max_length=512",
            "data.train_examples=24",
            "data.test_examples=8",
            *(f"training.{key}={value}" for key, value in small.items()),
        ]


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> tuple[str, Path]:
    """What the demo's commands printed, and its run folder."""
    run = Path(overrides[1].partition("=")[2])
    told = ""
    for words in (["train", str(DEMO), *overrides], ["merge", str(run), str(run / "merged")], ["verify", str(run)]):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        told += result.output
    return told, run


def test_the_demo_trains_scores_merges_and_verifies(finished: tuple[str, Path]) -> None:
    output, run = finished
    for said in ("before", "after", "trainable parameters", "agrees  merged", str(run)):
        assert said in output
    assert {"adapter", "config.yaml", "metrics.json", "loss_curve.png", "train.log"} <= {
        file.name for file in run.iterdir()
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 2
    assert metrics["parameters"]["adapter_bytes"] > 4 * metrics["parameters"]["trainable"] > 0
    assert {"commit", "dirty", "versions", "device", "seed"} <= metrics["provenance"].keys()
    assert metrics["data"]["parts"] == {"train": 24, "validation": 64, "test": 8}
    assert metrics["evaluation"]["after"]["rows"] == 8
