from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.training import run_folder
from smoa_lab.training.run_folder import RunFolder


def test_provenance_without_git_or_a_known_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*call: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_folder.subprocess, "run", missing)
    assert run_folder._git_state() == {"commit": None, "dirty": None}
    assert run_folder._version("no-such-package") is None
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert run_folder._processor()


def test_a_processor_that_does_not_tell_its_model_is_told_by_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "processor : 0\nBogoMIPS : 50.00\n")
    monkeypatch.setattr(run_folder.platform, "processor", lambda: "aarch64")
    assert run_folder._processor() == "aarch64"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "processor : 0\nmodel name : A processor\n")
    assert run_folder._processor() == "A processor"


def test_half_a_checkpoint_is_removed_and_the_whole_one_before_it_is_taken(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (3, '{"epoch": 1.'), (4, None)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").touch()
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    assert RunFolder(tmp_path).start("method: smoa\n") == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_unfinished_run_is_resumed_by_the_same_config_in_other_words(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text("method: smoa\ntraining: {eval_strategy: 'no', learning_rate: 1.0e-05}\n")
    assert run.start("method: smoa\ntraining:\n  eval_strategy: no\n  learning_rate: 1e-05\n") is None
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ConfigError, match="unfinished run of another config"):
        run.start("method: smoa\ntraining:\n  eval_strategy: no\n  learning_rate: 1e-04\n")


def test_a_run_that_has_no_checkpoint_yet_gives_way_to_another_config(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.start("method: smoa\n")
    assert run.start("method: lora\n") is None
    assert run.config.read_text() == "method: lora\n"
