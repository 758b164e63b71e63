from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from smoa_lab.config.run_config import ModelSection, TaskSection
from smoa_lab.data.prompts import PromptEncoder
from smoa_lab.lessons.question_looks import QuestionLooks, written_answers
from smoa_lab.models.base_models import load_base_model
from smoa_lab.scoring.held_out import Outcome
from tests.support import lab

RECORDS = lab.questions(3, "test")


@pytest.fixture
def base(tmp_path: Path) -> tuple[PreTrainedModel, PromptEncoder]:
    model, tokenizer = load_base_model(ModelSection(name=str(lab.tiny_base(tmp_path))))
    return model, PromptEncoder(tokenizer)


def test_an_answer_is_one_line_of_what_the_model_writes(base: tuple[PreTrainedModel, PromptEncoder]) -> None:
    texts = written_answers(*base, RECORDS)
    assert len(texts) == 3
    assert all("\n" not in text for text in texts)


def test_a_sample_has_question_reference_and_what_was_written_at_each_stage(
    base: tuple[PreTrainedModel, PromptEncoder],
) -> None:
    model, encoder = base
    looks = QuestionLooks(encoder, RECORDS, TaskSection(samples=2), alone=True)
    looks.look(model, "after")
    assert len(looks.samples) == 2
    assert looks.samples[0].keys() == {"question", "reference", "after"}
    assert looks.samples[0]["reference"] == RECORDS[0].answer
    looks.look(model, "before")
    assert looks.samples[1]["before"] == looks.samples[1]["after"]
    assert looks.evaluation["before"] == looks.evaluation["after"]
    assert looks.gain == {"accuracy": 0.0, "accuracy_stderr": 0.0}


def test_without_records_or_among_several_processes_nothing_is_written(
    base: tuple[PreTrainedModel, PromptEncoder],
) -> None:
    model, encoder = base
    without = QuestionLooks(encoder, [], TaskSection(), alone=True)
    without.look(model, "before")
    assert (without.evaluation, without.samples, without.gain) == ({}, [], None)
    spread = QuestionLooks(encoder, RECORDS, TaskSection(), alone=False)
    spread.look(model, "before")
    assert spread.samples == []
    assert spread.evaluation["before"]["all"]["questions"] == 3


def test_the_gain_is_paired_by_question(base: tuple[PreTrainedModel, PromptEncoder]) -> None:
    looks = QuestionLooks(base[1], RECORDS, TaskSection(), alone=True)
    for stage, hits in (("before", (0, 1, 0)), ("after", (1, 1, 0))):
        looks.outcomes[stage] = [
            Outcome(one, 1.0, 1, bool(hit), bool(hit)) for one, hit in zip(RECORDS, hits, strict=True)
        ]
    assert looks.gain == pytest.approx({"accuracy": 1 / 3, "accuracy_stderr": (2 / 3 / 2 / 3) ** 0.5})
