from __future__ import annotations

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig

from smoa.errors import ConfigError
from smoa_lab.basics.positions import check_positions, positions_of, prompt_room


def test_positions_are_the_configs_own_or_not_limited() -> None:
    assert positions_of(GPT2Config(n_positions=100)) == 100
    assert positions_of(LlamaConfig(max_position_embeddings=100)) == 100
    assert positions_of(BloomConfig()) is None


def test_more_tokens_than_positions_are_refused() -> None:
    check_positions(GPT2Config(n_positions=100), "task.max_length", 100, "questions")
    check_positions(BloomConfig(), "task.max_length", 10**6, "questions")
    with pytest.raises(
        ConfigError,
        match=r"^task\.max_length: questions of up to 1,001 tokens would be given to this model, which has 1,000 "
        r"positions; set it to 1000$",
    ):
        check_positions(GPT2Config(n_positions=1000), "task.max_length", 1001, "questions")


@pytest.mark.parametrize(("positions", "new_tokens", "room"), [(100, 24, (76, 24)), (100, 99, (50, 50))])
def test_prompt_and_answer_share_the_positions(positions: int, new_tokens: int, room: tuple[int, int]) -> None:
    assert prompt_room(GPT2Config(n_positions=positions), new_tokens) == room


def test_without_limit_a_prompt_may_be_of_any_length() -> None:
    assert prompt_room(BloomConfig(), 24) == (None, 24)
