from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from smoa.errors import ConfigError
from smoa_lab.lessons import lesson


def test_processes_that_accelerate_does_not_count_don_t_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson, "is_distributed", lambda: True)
    monkeypatch.setattr(lesson.dist, "get_world_size", lambda: 2)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match=r"accelerate counts 1 of 2 processes, .*; leave deepspeed out"):
        lesson.checked_arguments(arguments)
