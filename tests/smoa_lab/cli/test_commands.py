"""Every command of the lab on a tiny random model, and what must hold between them."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_lab.basics import files
from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.training.train import run as train
from tests.support import lab

# Not ours: a deprecation between transformers and peft.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.usefixtures("quick_pictures"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run of four steps."""
    adapter = {"r": 4, "num_blocks": 2, "smoa_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    training = lab.steps(4, learning_rate=0.01, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        room = tmp_path_factory.mktemp("room")
        yield lab.tiny_run(room, patch, train=40, test=6, training=training, adapter=adapter)


@pytest.fixture(scope="module")
def run(config: dict[str, Any]) -> Path:
    """A finished run's folder, which no test changes."""
    train(check_config(config))
    return Path(config["training"]["output_dir"])


def invoke(*arguments: object) -> str:
    """The output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_scores_are_printed_even_if_their_file_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(files, "write_whole", full)
    done = CliRunner().invoke(app, ["eval", str(run), "--output", str(tmp_path / "scores.json")])
    assert done.exit_code == 1
    assert "accuracy" in done.stdout
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    "command", [f"{name} RUN/config.yaml training.output_dir=PLACE/x" for name in ("train", "tune")]
)
def test_the_place_of_a_run_is_tried_before_training(command: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa_lab.training.train.fit", pytest.fail)
    words = command.replace("RUN", str(run)).replace("PLACE", str(run / "metrics.json")).split()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "Not a directory" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("eval RUN --output FILE", "merge RUN FILE", "convert RUN FILE --rank 1"),
    ],
)
def test_no_output_replaces_a_file_that_is_there(command: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.html"
    file.write_text("mine")
    done = CliRunner().invoke(app, command.replace("RUN", str(run)).replace("FILE", str(file)).split())
    assert done.exit_code == 1
    assert "exists" in done.stderr
    assert file.read_text() == "mine"


def test_convert_and_inspect_tell_what_they_found(run: Path, tmp_path: Path) -> None:
    assert "LoRA of rank 1" in invoke("convert", run, tmp_path / "small", "--rank", 1)
    found = json.loads(invoke("convert", run / "adapter", tmp_path / "other", "--energy", 0.5, "--json"))
    assert 0 < found["error"] < 1
    lora = json.loads(invoke("eval", run, "--adapter", tmp_path / "small", "--json"))
    assert lora["adapter"] == str(tmp_path / "small")
    assert "stable rank" in invoke("inspect", run)
    both = json.loads(invoke("inspect", run, run / "adapter", "--picture", tmp_path / "moved.png", "--json"))
    assert [len(layers) for layers in both.values()] == [4, 4]
    assert (tmp_path / "moved.png").is_file()


def test_budget_tells_what_fits(config: dict[str, Any]) -> None:
    base = config["model"]["name"]
    assert "blocks" in invoke("budget", base, "20%")
    sized = json.loads(invoke("budget", base, "20%", "--json"))
    assert [one["adapter"]["num_blocks"] for one in sized][:2] == [1, 2]
    assert "trains all weights" in invoke("budget", base, "lora:2", "--method", "full")


def test_convert_wants_one_rule(run: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--rank", "1", "--energy", "0.1"]):
        refused = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "lora"), *arguments])
        assert refused.exit_code == 1
        assert "give --rank or --energy" in refused.output
