from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from smoa.errors import DataError
from smoa_lab.data.prompts import PromptEncoder
from smoa_lab.data.records import Record
from tests.support import lab, tiny_models


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder(lab.byte_tokenizer())


def test_free_answers_are_refused_by_their_task(encoder: PromptEncoder) -> None:
    harness = pytest.importorskip("smoa_lab.scoring.harness")
    records = [*lab.questions(1, "test"), Record("gsm8k", "1", "How many?", "7")]
    with pytest.raises(DataError, match="gsm8k: has free answers"):
        harness.evaluate_with_harness(tiny_models.build("llama"), encoder, records)


def test_a_single_question_is_scored_without_a_standard_error(encoder: PromptEncoder, tmp_path: Path) -> None:
    harness = pytest.importorskip("smoa_lab.scoring.harness")
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    (scores,) = harness.evaluate_with_harness(model, encoder, lab.questions(1, "test")).values()
    assert scores["acc"] in (0.0, 1.0)
    assert (scores["acc_stderr"], scores["acc_norm_stderr"]) == (None, None)


def test_what_is_no_scoring_of_answers_is_left_to_lm_eval(encoder: PromptEncoder) -> None:
    harness = pytest.importorskip("smoa_lab.scoring.harness")
    model = harness.AnswerLM(tiny_models.build("llama"), encoder)
    for method in (model.loglikelihood_rolling, model.generate_until):
        with pytest.raises(NotImplementedError, match="use lm-eval's HFLM"):
            method([])
