from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from smoa_lab.data.rows import question
from smoa_lab.scoring import forgetting
from smoa_lab.scoring.forgetting import Forgetting, at_least, text_length, text_losses, whole_text
from tests.support import lab

TEXTS = ["A short text.", "A text that is rather longer than the others are.", "Another text."]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_every_token_of_a_text_is_scored(adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = lab.byte_tokenizer(adds_bos)
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path)).eval()
    found = text_losses(model, tokenizer, TEXTS)
    assert found.tokens == [len(text) - (not adds_bos) for text in TEXTS]  # a byte is a token
    for text, nll in zip(TEXTS, found.nll, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        assert nll == pytest.approx(float(cross_entropy(logits[:-1], ids[1:], reduction="sum")), rel=1e-4)


def test_a_long_text_is_cut_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "TEXT_TOKENS", 11)
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    tokenizer = lab.byte_tokenizer()
    found = text_losses(model, tokenizer, [TEXTS[1]])
    assert found.tokens == [10]  # beside the BOS token
    assert found.nll == pytest.approx(text_losses(model, tokenizer, [TEXTS[1][:10]]).nll)
    few: Any = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path / "gpt2", positions=10))
    assert text_losses(few, tokenizer, [TEXTS[1]]).tokens == [9]  # and at the model's positions
    assert (text_length(few.config), text_length(BloomConfig())) == (10, 11)


def test_the_whole_text_of_a_record_is_all_of_it() -> None:
    assert whole_text(question("prose", "0", "Rain", "It falls.")) == "Rain\nIt falls."
    assert whole_text(question("mine", "0", "Why?", "So.", context="A text.")) == "A text.\nWhy?\nSo."


def test_texts_are_taken_until_there_are_enough_tokens() -> None:
    tokenizer = lab.byte_tokenizer(adds_bos=False)
    assert at_least(tokenizer, TEXTS, 14, 256) == TEXTS[:2]  # the first has 13
    assert at_least(tokenizer, TEXTS, 13, 256) == TEXTS[:1]
    assert at_least(tokenizer, TEXTS, 13, 12) == TEXTS[:2]  # 12 of each
    assert at_least(tokenizer, TEXTS, 1000, 256) == TEXTS
    assert at_least(tokenizer, TEXTS, 0, 256) == []


def test_what_is_forgotten_is_the_change_of_the_loss_on_the_same_text(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    measured = Forgetting("packaged", 600, lab.byte_tokenizer(), model.config)
    measured.measure(model, "before")
    assert measured.metrics is None
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every byte is as likely as any other
    measured.measure(model, "after")
    found = measured.metrics
    assert found is not None
    assert found["after"] == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=1e-5)
    assert found["change"] == pytest.approx(found["after"] - found["before"])
    assert (found["passages"], found["tokens"]) == (3, 3 * 255)  # 256 tokens each, and the first is given
    assert found["text"] == "Jules and Michel Verne, In the Year 2889"
    assert found["stderr"] > 0


def test_a_model_of_few_positions_reads_more_passages(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.tiny_gpt2(tmp_path, positions=101))
    measured = Forgetting("packaged", 600, lab.byte_tokenizer(), model.config)
    measured.measure(model, "before")
    measured.measure(model, "after")
    found = measured.metrics
    assert found is not None
    assert (found["passages"], found["tokens"]) == (6, 6 * 100)


def test_nothing_is_measured_where_no_tokens_are_asked_for() -> None:
    measured = Forgetting("no/such/file", 0, lab.byte_tokenizer(), GPT2Config())
    measured.measure(None, "before")
    measured.measure(None, "after")
    assert measured.metrics is None
