from pathlib import Path

import pytest
from transformers import GenerationConfig

from smoa.errors import ConfigError
from smoa_lab.data.chat_templates import (
    alpaca,
    set_chat_template,
    stop_at_turns_end,
    training_template,
)
from tests.support.lab import (
    MARKED,
    PLAIN,
    STRICT,
    TRIMMED,
    byte_tokenizer,
    chat,
    tiny_chat_model,
    tokenizer_with,
    trl_template,
)


def test_a_template_may_lie_in_a_file_and_without_a_name_the_models_own_stays(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(PLAIN)
    assert tokenizer.chat_template == PLAIN
    file = tmp_path / "own.jinja"
    file.write_text(TRIMMED)
    set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == TRIMMED


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3"])
def test_a_template_of_trl_is_given_with_its_marks(name: str) -> None:
    tokenizer = tokenizer_with(None)
    set_chat_template(tokenizer, name)
    assert tokenizer.chat_template == trl_template(f"{name}_training")
    assert training_template(tokenizer) == tokenizer.chat_template


def test_an_unknown_name_is_told_the_nearest() -> None:
    for name, near in (("alpacca", "alpaca"), ("qwen33", "qwen3")):
        with pytest.raises(ConfigError, match=f"there is no template '{name}'; did you mean '{near}'"):
            set_chat_template(tokenizer_with(None), name)


def test_a_template_whose_tokens_the_model_lacks_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(
        ConfigError, match=r"qwen3 has the tokens <\|im_end\|>, <\|im_start\|>, which .* lacks; use alp"
    ):
        set_chat_template(tokenizer, "qwen3")
    assert tokenizer.chat_template is None


def test_the_template_to_train_with_is_the_models_or_trls_for_it() -> None:
    assert training_template(tokenizer_with(MARKED)) == MARKED
    assert training_template(tokenizer_with(trl_template("qwen3"))) == trl_template("qwen3_training")
    for unknown in (PLAIN, TRIMMED, STRICT, "{{ broken", "{{ raise_exception('no') }}"):
        assert training_template(tokenizer_with(unknown)) is None


def test_generation_stops_at_the_token_that_ends_a_turn() -> None:
    model, tokenizer = tiny_chat_model(), tokenizer_with(MARKED)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _ in range(2):
        stop_at_turns_end(model, tokenizer)
        assert model.generation_config.eos_token_id == [2, end]
    model.generation_config = GenerationConfig()
    stop_at_turns_end(model, tokenizer)
    assert model.generation_config.eos_token_id == [end]


@pytest.mark.parametrize("template", [TRIMMED, "{{ raise_exception('no') }}"])
def test_without_such_a_token_generation_stops_where_it_did(template: str) -> None:
    model = tiny_chat_model()
    stop_at_turns_end(model, tokenizer_with(template))
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("adds_bos", [True, False])
def test_alpaca_puts_a_question_as_the_reference_does(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos)
    tokenizer.chat_template = alpaca(tokenizer)
    asked = tokenizer.apply_chat_template(chat("Open?"), tokenize=False)
    assert asked == "<bos>" * adds_bos + ALPACA.format(instruction="Open?")
    talk = tokenizer.apply_chat_template(chat("Open?", "Yes.", "Today?", system="Be brief."), tokenize=False)
    _, turn = ALPACA.split("\n\n", 1)
    first, later = (f"\n\n{turn.format(instruction=question)}" for question in ("Open?", "Today?"))
    assert talk == "<bos>" * adds_bos + f"Be brief.{first}Yes.<eos>{later}"
