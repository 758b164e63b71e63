from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from smoa_lab.scoring.evaluation import continue_prompts, ends_of
from tests.support import lab, tiny_models


def test_texts_come_back_in_order_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_models.build("llama").train(), lab.byte_tokenizer()

    def echo(input_ids: Tensor, **options: Any) -> Tensor:
        return torch.cat([input_ids, input_ids], dim=1)

    monkeypatch.setattr(model, "generate", echo)
    asked = ["word " * (i * 3 % 5) + "?" for i in range(7)]
    for size in (1, 3, 7):
        assert continue_prompts(model, tokenizer, [tokenizer(text)["input_ids"] for text in asked], 5, size) == asked
    assert model.training


def test_a_text_ends_at_the_tokenizers_end_and_at_those_of_the_model() -> None:
    model, tokenizer = tiny_models.build("llama"), lab.byte_tokenizer()
    for known, ends in ((None, [2]), (7, [2, 7]), ([2, 7], [2, 7])):
        model.generation_config.eos_token_id = known
        assert ends_of(model, tokenizer) == ends
    first = model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False, eos_token_id=[], pad_token_id=0)
    model.generation_config.eos_token_id = [int(first[0, -1])]
    (text,) = continue_prompts(model, tokenizer, [[3, 4]], new_tokens=5)
    assert text == tokenizer.decode(first[0, -1:]).strip()


def test_a_prompt_that_leaves_no_positions_for_an_answer_loses_its_head(tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path, positions=32))
    tokenizer = lab.byte_tokenizer()
    bare = list(range(3, 43))
    for long, tail in ((bare, bare[-24:]), ([1, *bare], [1, *bare[-23:]])):  # 1 is BOS, which stays
        texts = continue_prompts(model, tokenizer, [long, tail, bare[:5]], new_tokens=8)
        assert texts[0] == texts[1]
        assert texts[2] == continue_prompts(model, tokenizer, [bare[:5]], new_tokens=8)[0]


def test_an_answer_takes_at_most_half_of_the_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path, positions=32))
    whole, shapes = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **options: shapes.append(whole(**options).shape) or whole(**options))
    monkeypatch.setattr("smoa_lab.scoring.evaluation.ends_of", lambda *_: [])
    continue_prompts(model, lab.byte_tokenizer(), [list(range(3, 43))], new_tokens=128)
    assert shapes == [(1, 32)]
