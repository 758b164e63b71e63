from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.study.classification import ClassificationRunner
from smoa_lab.study.comparison import runner_of
from smoa_lab.study.study import Study
from tests.support.studies import entry


def test_the_untouched_model_of_a_quantized_study_is_described_without_training(study: Study) -> None:
    """Full fine-tuning of quantized weights is refused, and is not what is asked for."""
    in_4_bits = {"quantization_config": {"load_in_4bit": True}}
    shared = {**study.shared, "model": {"name": "base", "options": in_4_bits}}
    config = runner_of(study.model_copy(update={"shared": shared})).untouched_config(study.entries["ours"])
    assert (config.method, config.adapter, config.model.options) == ("full", {}, in_4_bits)
    assert "learning_rate" not in config.training


# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_an_entry_that_trains_more_than_it_declares_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smoa .* trains 512 parameters, not 400 to within 2%"):
        ClassificationRunner(shared).run(entry(parameters=400), 0.01, 0, "test", tmp_path / "work")
    assert not list((tmp_path / "work").glob("checkpoint*"))  # before the first step


def test_a_study_without_held_out_questions_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    shared["data"]["validation_examples"] = 0
    with pytest.raises(ConfigError, match=r"shared\.data\.validation_examples: a study needs a validation part"):
        ClassificationRunner(shared).run(entry(), 0.01, 0, "validation", tmp_path / "work")
