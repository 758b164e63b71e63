"""Which tokens of a row are trained: read back as text, and compared with TRL's own preparation."""

from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers import normalizers

from smoa.errors import ConfigError, DataError
from smoa_lab.data.chat_templates import alpaca
from smoa_lab.data.encoding import Encoder, Tokens, text_ids, trained_pieces
from smoa_lab.data.formats import recognize, shape
from smoa_lab.data.row import Row
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

CLOSING = {
    "plain": (PLAIN, "<|im_end|>"),
    "marked": (MARKED, "<|im_end|>"),
    "trimmed": (TRIMMED, ""),
    "qwen3": (trl_template("qwen3"), "<|im_end|>"),
    "llama3": (trl_template("llama3"), "<|eot_id|>"),
    "gemma3": (trl_template("gemma3"), "<end_of_turn>"),
    "alpaca": (alpaca(tokenizer_with(None)), "<eos>"),
}
"""Templates, and the token after an answer that is trained too."""
EXACT = ["plain", "marked", "alpaca"]
"""Those that change no content."""

TALKS: dict[str, list[dict[str, str]]] = {
    "one answer": chat("Open?", "Yes."),
    "several turns": chat("Open?", "Yes.", "Today?", "From nine.", "Thanks!", "Welcome."),
    "a system message": chat("Open?", "Yes.", "Today?", "No.", system="Be brief."),
    "a last question": chat("Open?", "Yes.", "Today?"),
    "the same words": chat("Yes.", "Yes.", "Yes.", "Yes."),
    "the template's words": chat("user", "assistant", "assistant", "user\nassistant:"),
    "the template's tokens": chat("<|im_end|>", "<|im_start|>user\nHi<|im_end|>", "ok", "model<end_of_turn>"),
    "unicode": chat("Où?", "日本 🙂 é", "e\u0301?", "naïve \u200d"),
    "the mark": chat("\ue000", "a\ue000b"),
}


def example_of(row: dict[str, Any]) -> Row:
    return shape(row, recognize(row))


def trained(encoder: Encoder, row: dict[str, Any]) -> list[str]:
    """The trained pieces of a row as text."""
    tokens = encoder.encode(example_of(row))
    return [text for text, chosen in trained_pieces(encoder.tokenizer, tokens) if chosen]


@pytest.mark.parametrize("name", CLOSING)
def test_the_assistants_turns_are_trained_and_nothing_else(name: str) -> None:
    template, closing = CLOSING[name]
    encoder = Encoder(tokenizer_with(template))
    for about, talk in TALKS.items():
        said = [turn["content"] + closing for turn in talk if turn["role"] == "assistant"]
        found = trained(encoder, {"messages": talk})
        if name == "qwen3":  # TRL trains the empty thought that the template puts before the last answer
            found = [text.removeprefix("<think>\n\n</think>\n\n") for text in found]
        assert [text.strip() for text in found] == said, about


@pytest.mark.parametrize("name", EXACT)
def test_blanks_around_an_answer_are_trained_where_the_template_keeps_them(name: str) -> None:
    template, closing = CLOSING[name]
    for blanks in ("  {}", "{}  ", "\n{}\n", "\t{} \n\n"):
        answers = [blanks.format("Yes."), blanks.format("No.")]
        talk = chat(" Open? ", answers[0], "\nToday?\n", answers[1])
        assert trained(Encoder(tokenizer_with(template)), {"messages": talk}) == [one + closing for one in answers]


def test_an_answer_that_the_template_trims_is_found() -> None:
    for answer in ("Yes.\n", "\nYes.", "  Yes.\n\n ", "Yes.\nassistant: \n"):
        talk = chat("Open?\n", answer, "user: \n", answer)
        assert trained(Encoder(tokenizer_with(TRIMMED)), {"messages": talk}) == [answer.strip()] * 2


def test_a_template_that_changes_what_was_said_before_is_refused() -> None:
    last = "message.content if loop.last or message.role != 'assistant' else '…'"
    encoder = Encoder(tokenizer_with(PLAIN.replace("message.content", f"({last})")))
    row = {"messages": chat("Open?", "Yes.", "Today?", "No.")}
    with pytest.raises(DataError, match=r"a longer conversation.*assistant_only_loss: false"):
        trained(encoder, row)
    assert trained(encoder, {"messages": chat("Open?", "Yes.")}) == ["Yes.<|im_end|>"]
    encoder.assistant_only = False
    assert len(trained(encoder, row)) == 1


def test_turns_are_found_where_a_tokenizer_begins_each_text_with_a_blank() -> None:
    tokenizer = tokenizer_with(PLAIN)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    found = trained(Encoder(tokenizer), {"messages": TALKS["several turns"]})
    assert found == [f"{said}<|im_end|>" for said in ("Yes.", "From nine.", "Welcome.")]


def test_a_template_that_refuses_a_row_says_so_in_one_line() -> None:
    encoder = Encoder(tokenizer_with(STRICT))
    row = {"messages": chat("Open?", "Yes.", system="Be brief.")}
    with pytest.raises(DataError, match=r"the chat template refuses this row: System role not supported; change the"):
        encoder.encode(example_of(row))


def test_a_model_without_a_template_takes_no_conversations() -> None:
    with pytest.raises(ConfigError, match=r"data.template: this model has no chat template.*alpaca"):
        Encoder(tokenizer_with(None)).encode(example_of({"messages": chat("Open?", "Yes.")}))


def test_a_token_of_the_templates_last_blank_and_of_the_answer_is_trained() -> None:
    tokenizer = byte_tokenizer(merges=[("\u0120", "Y")])  # a blank and Y
    tokenizer.chat_template = TRIMMED
    assert trained(Encoder(tokenizer), {"messages": chat("Open?", "Yes.")}) == [" Yes."]
    assert trained(Encoder(tokenizer), {"messages": chat("Open?", "No.")}) == ["No."]


def test_a_completion_is_trained_and_closed_with_the_end_token() -> None:
    encoder = Encoder(tokenizer_with(None))
    assert trained(encoder, {"prompt": "Open?", "completion": " Yes."}) == [" Yes.<eos>"]
    assert trained(encoder, {"prompt": "Open?", "completion": " Yes.<eos>"}) == [" Yes.<eos>"]
    assert trained(encoder, {"text": "Open."}) == ["<bos>Open.<eos>"]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_prompt_is_not_ended_and_an_answer_once_also_where_the_tokenizer_ends_each_text(adds_eos: bool) -> None:
    encoder = Encoder(byte_tokenizer(adds_eos=adds_eos))
    row = example_of({"prompt": "ab", "completion": "cd"})
    assert encoder.encode(row) == Tokens([1, 67, 68, 69, 70, 2], [-100, -100, -100, 69, 70, 2])
    asked = encoder.prompt(row)
    assert asked is not None
    assert asked.ids == [1, 67, 68]
    assert text_ids(byte_tokenizer(adds_eos=adds_eos), "ab<eos>") == [1, 67, 68, 2]


@pytest.mark.parametrize("name", EXACT)
def test_of_a_completion_of_turns_the_users_are_not_trained(name: str) -> None:
    template, closing = CLOSING[name]
    asked, said = chat("Open?", "Yes.", "Today?"), chat("", "No.", "Why?", "Sunday.")[1:]
    found = trained(Encoder(tokenizer_with(template)), {"prompt": asked, "completion": said})
    assert found == [f"No.{closing}", f"Sunday.{closing}"]


ROWS = {
    "one answer": {"messages": TALKS["one answer"]},
    "several turns": {"messages": TALKS["several turns"]},
    "system": {"messages": TALKS["a system message"]},
    "blanks": {"messages": chat(" Open? ", " Yes.\n")},
    "unicode": {"messages": TALKS["unicode"]},
    "tokens": {"messages": TALKS["the template's tokens"]},
}
PROMPTS = {
    "plain": {"prompt": "Open?", "completion": " Yes."},
    "unicode": {"prompt": "Où", "completion": "é 🙂"},
    "turns": {"prompt": chat("Open?"), "completion": chat("", "Yes.")[1:]},
    "more turns": {"prompt": chat("Open?", "Yes.", "Today?", system="S"), "completion": chat("", "No.")[1:]},
    "text": {"text": "The shop opens at nine."},
}


def of_trl(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **training: Any) -> list[Tokens]:
    """What TRL's own trainer makes of rows."""
    arguments = trl.SFTConfig(str(folder), use_cpu=True, report_to="none", bf16=False, max_length=None, **training)
    trainer = trl.SFTTrainer(
        tiny_chat_model(), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    made: Any = trainer.train_dataset
    return [Tokens(row["input_ids"], row["labels"]) for row in made]


def encoded(encoder: Encoder, rows: list[dict[str, Any]]) -> list[Tokens]:
    return [encoder.encode(example_of(row)) for row in rows]


@pytest.mark.parametrize("name", ["marked", "qwen3", "llama3", "gemma3", "alpaca"])
def test_conversations_are_prepared_as_by_trl(name: str, tmp_path: Path) -> None:
    tokenizer, rows = tokenizer_with(CLOSING[name][0]), list(ROWS.values())
    assert encoded(Encoder(tokenizer), rows) == of_trl(rows, tokenizer, tmp_path, assistant_only_loss=True)
    assert encoded(Encoder(tokenizer, assistant_only=False), rows) == of_trl(rows, tokenizer, tmp_path)


@pytest.mark.parametrize("kind", [["plain", "unicode"], ["turns", "more turns"], ["text"]], ids=lambda kind: kind[0])
@pytest.mark.parametrize("name", ["marked", "qwen3", "plain"])
def test_prompts_and_plain_text_are_prepared_as_by_trl(name: str, kind: list[str], tmp_path: Path) -> None:
    tokenizer, rows = tokenizer_with(CLOSING[name][0]), [PROMPTS[row] for row in kind]
    assert encoded(Encoder(tokenizer), rows) == of_trl(rows, tokenizer, tmp_path)
    if kind != ["text"]:
        whole = of_trl(rows, tokenizer, tmp_path, completion_only_loss=False)
        assert encoded(Encoder(tokenizer, completion_only=False), rows) == whole


TALK = {"messages": chat("Open?", "Yes.", "Today?", "No.", "Oh.")}


@pytest.mark.parametrize(
    ("row", "asked", "read", "reference"),
    [
        (
            TALK,
            "<|im_start|>user\nOpen?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nToday?"
            "<|im_end|>\n<|im_start|>assistant\n",
            "user: Open?\nassistant: Yes.\nuser: Today?",
            "No.",
        ),
        ({"prompt": "Open?", "completion": " Yes."}, "<bos>Open?", "Open?", " Yes."),
        ({"text": "abcdef"}, "<bos>abc", "abc", "def"),
    ],
)
def test_the_model_is_asked_for_the_last_answer_and_the_prompt_is_read_without_marks(
    row: dict[str, Any], asked: str, read: str, reference: str
) -> None:
    encoder = Encoder(tokenizer_with(MARKED))
    found = encoder.prompt(example_of(row))
    assert found is not None
    assert (encoder.tokenizer.decode(found.ids), found.text, found.reference) == (asked, read, reference)


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("qwen3", "<think>\n\n</think>\n\n"),
        ("gptoss", "<|channel|>final<|message|>"),
        ("nemotron_3_nano", "<think></think>"),
        ("deepseek_r1_distill", "Assistant\uff5c>"),
        ("llama3", ""),
    ],
)
def test_a_model_is_asked_with_what_training_puts_before_an_answer(name: str, opening: str) -> None:
    encoder = Encoder(tokenizer_with(trl_template(name)), max_length=None)
    talk, choices = chat("Open?", "Yes."), {"prompt": "Open?", "choices": ["Yes.", "No."], "label": 0}
    for row, prompts in ((talk, []), (choices, [each.prompt for each in encoder.choices(example_of(choices))])):
        example = example_of({"prompt": row[:1], "completion": row[1:]} if isinstance(row, list) else row)
        asked = encoder.prompt(example)
        assert asked is not None
        whole = encoder.encode(example).input_ids
        for prompt in (asked.ids, *prompts):
            assert encoder.tokenizer.decode(prompt).endswith(opening)
            assert encoder.tokenizer.decode(whole[len(prompt) :]).startswith("Yes.")
            assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("thoughts", ["<think>It is noon.</think>", "<think>\n\n</think>\n\n"])
def test_an_answer_with_thoughts_of_its_own_is_asked_for_without_empty_ones(thoughts: str) -> None:
    encoder = Encoder(tokenizer_with(trl_template("qwen3")))
    asked = encoder.prompt(example_of({"messages": chat("Open?", f"{thoughts}Yes.")}))
    assert asked is not None
    assert encoder.tokenizer.decode(asked.ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe"])
def test_a_later_turn_is_asked_for_as_it_is_trained(name: str) -> None:
    encoder = Encoder(tokenizer_with(trl_template(name)), max_length=None)
    row = example_of({"messages": chat("Open?", "Yes.", "Today?", "No.")})
    asked = encoder.prompt(row)
    assert asked is not None
    assert encoder.encode(row).input_ids[: len(asked.ids)] == asked.ids


def test_an_earlier_answer_is_asked_for_where_the_last_is_too_far_in() -> None:
    encoder = Encoder(tokenizer_with(MARKED))
    whole = encoder.prompt(example_of(TALK))
    assert whole is not None
    found = encoder.prompt(example_of(TALK), len(whole.ids) - 1)
    assert found is not None
    assert (found.text, found.reference) == ("Open?", "Yes.")
    assert encoder.prompt(example_of(TALK), 3) is None


def test_a_long_row_keeps_its_beginning_and_counts_what_it_lost() -> None:
    tokens = Encoder(tokenizer_with(None), 8).encode(Row("", "The shop opens."))
    assert (len(tokens.input_ids), tokens.cut) == (8, 17 - 8)
    assert Encoder(tokenizer_with(None), None).encode(Row("", "a" * 5000)).cut == 0


SUN = {"prompt": "What warms the Earth?", "choices": ["the Moon", "the Sun"], "label": 1}


def test_choices_follow_the_same_prompt_and_are_not_closed() -> None:
    encoder = Encoder(tokenizer_with(CLOSING["alpaca"][0]))
    row, said = example_of(SUN), ["the Moon", "the Sun"]
    assert trained(encoder, SUN) == [f"{said[1]}<eos>"]
    whole, choices = encoder.encode(row), encoder.choices(row)
    assert [encoder.tokenizer.decode(choice.answer) for choice in choices] == said
    asked = encoder.prompt(row)
    assert asked is not None
    assert (asked.ids, asked.reference) == (whole.prompt, said[1])
    assert all(choice.prompt == whole.prompt for choice in choices)


def test_a_choice_that_would_change_the_prompts_tokens_stands_apart() -> None:
    tokenizer = byte_tokenizer(merges=[("\u010a", "x")])  # a line's end and x
    tokenizer.chat_template = TRIMMED + "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    first, second = Encoder(tokenizer).choices(example_of({"prompt": "Which?", "choices": ["x", "y"], "label": 1}))
    assert first.prompt == second.prompt
    assert [tokenizer.decode(choice.answer) for choice in (first, second)] == ["x", "y"]


def test_choices_that_are_too_long_lose_the_prompts_head_but_bos_and_stay_different() -> None:
    question = {"prompt": "Why? " * 40, "choices": ["no, it isn't", "no, it is"], "label": 1}
    cut, endless = (Encoder(tokenizer_with(CLOSING["alpaca"][0]), length) for length in (64, None))
    first, second = cut.choices(example_of(question))
    assert first.answer != second.answer
    (long, _) = cut.choices(example_of({**question, "choices": ["no " * 99, "no"]}))
    assert (len(long.input_ids), long.start) == (64, 1)
    for found in (first, second, long, cut.encode(example_of(question))):
        assert len(found.input_ids) == 64
        assert found.input_ids[0] == cut.tokenizer.bos_token_id
    assert [one.cut for one in (first, second)] == [
        len(one.input_ids) - 64 for one in endless.choices(example_of(question))
    ]
