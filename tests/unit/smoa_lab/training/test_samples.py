from __future__ import annotations

from pathlib import Path

from smoa_lab.config.run_config import ModelSection
from smoa_lab.data.prompts import PromptEncoder
from smoa_lab.training.base_models import load_base_model
from smoa_lab.training.samples import samples, written_answers
from tests.support import lab


def test_an_answer_is_one_line_of_what_the_model_writes(tmp_path: Path) -> None:
    model, tokenizer = load_base_model(ModelSection(name=str(lab.tiny_base(tmp_path))))
    encoder = PromptEncoder(tokenizer)
    records = lab.questions(3, "test")
    texts = written_answers(model, encoder, records)
    assert len(texts) == 3
    assert all("\n" not in text for text in texts)


def test_a_sample_holds_question_reference_and_both_answers(tmp_path: Path) -> None:
    _, tokenizer = load_base_model(ModelSection(name=str(lab.tiny_base(tmp_path))))
    encoder = PromptEncoder(tokenizer)
    (record,) = lab.questions(1, "test")
    assert samples(encoder, [record], ["old"], ["new"]) == [
        {"question": record.prompt, "reference": record.answer, "before": "old", "after": "new"}
    ]
    assert "before" not in samples(encoder, [record], [], ["new"])[0]
