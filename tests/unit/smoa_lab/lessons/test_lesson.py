from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.config.run_config import check_config
from smoa_lab.lessons import lesson
from smoa_lab.training.train_run import train
from tests.support import lab
from tests.support.kills import killed_after_saving


def test_processes_that_accelerate_does_not_count_don_t_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson, "is_distributed", lambda: True)
    monkeypatch.setattr(lesson.dist, "get_world_size", lambda: 2)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match=r"accelerate counts 1 of 2 processes, .*; leave deepspeed out"):
        lesson.checked_arguments(arguments)


def test_a_run_that_was_killed_after_its_last_step_takes_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = lab.steps(3, save_steps=1, learning_rate=0.1, lr_scheduler_type="polynomial")  # divides by the steps
    values = lab.tiny_run(tmp_path, monkeypatch, train=20, test=2, training=training, forgetting={"tokens": 0})
    whole, killed = (
        check_config({**values, "training": {**values["training"], "output_dir": str(tmp_path / name)}})
        for name in ("whole", "killed")
    )
    expected = train(whole)
    with killed_after_saving(3, monkeypatch):
        train(killed)
    metrics = train(killed)
    assert metrics["training"]["resumed"]
    assert metrics["training"]["steps"] == expected["training"]["steps"] == 3
    adapters = [load_file(one.folder / "adapter" / "adapter_model.safetensors") for one in (whole, killed)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())
