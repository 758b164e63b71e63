"""`smoa train` killed for real (SIGKILL) while it writes, then started again: the result is the uninterrupted run's."""

import errno
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTTrainer

from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run as train
from tests.support import lab
from tests.support.lab import killed_at

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.usefixtures("quick_pictures"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


@pytest.fixture(scope="module")
def settings(room: Path) -> Iterator[dict[str, Any]]:
    """A run of four steps that saves after each of them."""
    saving = {"save_steps": 1, "save_total_limit": 1}
    adapter = {"r": 4, "num_blocks": 2, "smoa_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    training = lab.steps(4, learning_rate=0.01, **saving)
    scoring = {"before": False}
    with pytest.MonkeyPatch.context() as patch:
        yield lab.tiny_run(room, patch, train=40, test=3, training=training, adapter=adapter, scoring=scoring)


def config_in(settings: dict[str, Any], folder: Path) -> RunConfig:
    """The run in another folder."""
    return check_config(settings | {"training": {**settings["training"], "output_dir": str(folder)}})


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], room: Path) -> Path:
    """The folder of the run that nobody killed."""
    train(config_in(settings, room / "whole"))
    return room / "whole"


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter and the scores of a finished run."""
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return adapter, json.loads((folder / "metrics.json").read_text())["evaluation"]


def assert_same_result(folder: Path, other: Path) -> None:
    (ours, our_scores), (theirs, their_scores) = result(folder), result(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert our_scores == their_scores


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([29, 95], id="few"),
        pytest.param([2, 10, 17, 40, 60, 75, 110, 125, 140, 155, 170], id="many", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_anywhere_and_started_again_ends_in_the_same_bits(
    settings: dict[str, Any], whole: Path, tmp_path: Path, calls: list[int]
) -> None:
    killed = []
    for number in calls:
        folder = tmp_path / f"killed-{number}"
        config = config_in(settings, folder)
        killed.append(killed_at(number, partial(train, config), partial(touches, folder)))
        if not RunFolder(folder).finished:
            assert killed[-1]
            train(config)
        assert_same_result(folder, whole)
    assert all(killed[: 2 * len(killed) // 3])


def touches(folder: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call has to do with the folder."""
    return str(folder) in str(arguments)


def test_a_disk_that_fills_up_ends_the_run_with_a_clear_error_and_it_goes_on_later(
    settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(settings, tmp_path / "run")
    save = SFTTrainer._save_optimizer_and_scheduler

    def full(self: SFTTrainer, output_dir: str) -> None:
        if self.state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", output_dir)
        save(self, output_dir)

    monkeypatch.setattr(SFTTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"No space left on device.*checkpoint-3"):
        train(config)
    run = RunFolder(config.folder)
    assert not run.finished
    assert not run.adapter.exists()
    monkeypatch.setattr(SFTTrainer, "_save_optimizer_and_scheduler", save)
    assert train(config)["training"]["resumed"]
    assert_same_result(run.path, whole)
