"""Runs on questions that a model or their data do not allow: refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run_config import check_config
from smoa_lab.training.train_run import train
from tests.support import lab


def values_of(
    room: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], *, train: int = 15, **training: Any
) -> dict[str, Any]:
    """A run of one step."""
    training = lab.steps(1, save_strategy="no", **training)
    values = lab.tiny_run(room, monkeypatch, train=train, test=2, training=training, forgetting={"tokens": 0})
    return {**values, "data": {"tasks": ["arc_easy"], **data}}


def learned(room: Path, monkeypatch: pytest.MonkeyPatch, max_length: int) -> dict[str, Any]:
    """The metrics of a run on a model of 128 positions."""
    values = values_of(room, monkeypatch, {})
    base = {"model": {"name": str(lab.tiny_gpt2(room / "gpt2", positions=128))}}
    adapter = {"adapter": {"r": 4, "num_blocks": 2, "target_modules": ["c_attn"]}}
    return train(check_config({**values, **base, **adapter, "task": {"max_length": max_length, "samples": 2}}))


def test_questions_beyond_the_models_positions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^task\.max_length: questions of up to 129 tokens .* set it to 128$"):
        learned(tmp_path, monkeypatch, 129)
    assert not (tmp_path / "run").exists()


def test_questions_of_all_the_models_positions_are_trained_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = learned(tmp_path, monkeypatch, 128)
    assert metrics["data"]["truncation"]["prompts_cut"] == 15  # so each has as many tokens as there are positions
    assert [set(sample) for sample in metrics["samples"]] == [{"question", "reference", "before", "after"}] * 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, r"^data\.validation_part: 0\.05 of the questions are none, and training\.eval_strategy needs some"),
        ({"validation_examples": 0}, r"^data\.validation_examples: 0 of the questions are none"),
    ],
)
def test_validation_without_validation_questions_is_refused(
    data: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of(tmp_path, monkeypatch, data, eval_strategy="epoch")
    with pytest.raises(ConfigError, match=said):
        train(check_config(values))
    assert not (tmp_path / "run").exists()
