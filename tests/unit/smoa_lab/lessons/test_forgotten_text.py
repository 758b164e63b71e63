from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from smoa_lab.config.run_config import ForgettingSection
from smoa_lab.lessons.forgotten_text import ForgottenText
from tests.support import lab


def test_what_is_forgotten_is_the_change_of_the_loss_on_the_same_text(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    forgotten = ForgottenText(ForgettingSection(tokens=600), lab.byte_tokenizer(), model.config)
    forgotten.look(model, "before")
    assert forgotten.metrics is None
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every byte is as likely as any other
    forgotten.look(model, "after")
    found = forgotten.metrics
    assert found is not None
    assert found["after"] == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=1e-5)
    assert found["change"] == pytest.approx(found["after"] - found["before"])
    assert (found["passages"], found["tokens"]) == (3, 3 * 255)  # 256 tokens each, and the first is given
    assert found["text"] == "Jules and Michel Verne, In the Year 2889"
    assert found["stderr"] > 0


def test_a_model_of_few_positions_reads_more_passages(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.tiny_gpt2(tmp_path, positions=101))
    forgotten = ForgottenText(ForgettingSection(tokens=600), lab.byte_tokenizer(), model.config)
    forgotten.look(model, "before")
    forgotten.look(model, "after")
    found = forgotten.metrics
    assert found is not None
    assert (found["passages"], found["tokens"]) == (6, 6 * 100)


def test_nothing_is_measured_where_no_tokens_are_asked_for() -> None:
    forgotten = ForgottenText(ForgettingSection(text="no/such/file", tokens=0), lab.byte_tokenizer(), GPT2Config())
    forgotten.look(None, "before")
    forgotten.look(None, "after")
    assert forgotten.metrics is None
