from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import LlamaConfig

from smoa.errors import ConfigError, DataError
from smoa_lab.runs.budget_choices import _limit, budget_choices, model_shapes
from tests.support import lab


@pytest.mark.parametrize(
    ("amount", "message"), [("0", "must be more than 0"), ("200%", "must be more than 0"), ("x", "neither")]
)
def test_a_budget_that_is_none_is_refused(amount: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _limit(amount, 1000)


def test_a_model_whose_shapes_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the config"):
        model_shapes(str(tmp_path), ("q_proj",))
    LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no linear layers named nowhere"):
        model_shapes(str(tmp_path), ("nowhere",))
    assert model_shapes(str(tmp_path), ("q_proj",))[0] == Counter({(8, 8): 1})


def test_a_budget_that_buys_nothing_is_told_what_the_least_is(tmp_path: Path) -> None:
    base = str(lab.tiny_base(tmp_path))
    with pytest.raises(ConfigError, match=r"budget: '1' is too small; the smallest adapter has 256 parameters"):
        budget_choices(base, "1", ("q_proj", "o_proj"))
    least = budget_choices(base, "256", ("q_proj", "o_proj"))
    assert {(choice.r - choice.num_blocks, choice.parameters) for choice in least} == {(0, 256)}
