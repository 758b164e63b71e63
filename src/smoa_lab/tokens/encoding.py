"""Turns rows into token ids, and marks which of them are trained: the assistant's turns, or the completion.

TRL's own preparation gives the same tokens wherever it can mark the assistant's turns: where the chat template has
``{% generation %}`` marks, or is one that TRL knows. For other templates the turns are found by what each adds to the
conversation before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from smoa.errors import DataError
from smoa_lab.data.prompts import IGNORED
from smoa_lab.tokens.chat_templates import require_chat_template, training_template
from smoa_lab.rows.formats import Conversation, Example, Message, Passage, Preference

SHOWN = 64
"""Tokens of a plain text that are given when the model is asked to go on."""


@dataclass(frozen=True)
class Tokens:
    """A row as the model sees it; ``labels`` are the ids where the loss is taken, and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens the loss is taken at."""
        return sum(label != IGNORED for label in self.labels)

    def cut(self, length: int | None) -> Tokens:
        """The first ``length`` tokens."""
        return self if length is None else Tokens(self.input_ids[:length], self.labels[:length])


class RowEncoder:
    """Tokens of rows by a tokenizer. ``assistant_only`` and ``completion_only`` are TRL's keys of almost these names:
    false means that everything is trained."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True, completion_only: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only
        self.completion_only = completion_only
        self.template = training_template(tokenizer) if tokenizer.chat_template else None
        self.eos = str(tokenizer.eos_token or "")

    def encode(self, example: Example) -> Tokens:
        """Token ids and labels; of a preference those of the chosen answer."""
        if isinstance(example, Preference):
            example = chosen_example(example)
        if isinstance(example, Passage):
            return self._passage(example)
        require_chat_template(self.tokenizer)
        if example.prompt_turns:
            return self._completion(example)
        return self._conversation(example.messages)

    def prompt(self, example: Example) -> tuple[list[int], str]:
        """What the model is given when it is asked to answer, and the reference answer: the last turn, the completion,
        or what follows the beginning of a plain text."""
        if isinstance(example, Preference):
            example = chosen_example(example)
        if isinstance(example, Conversation):
            last = max(place for place, one in enumerate(example.messages) if one.role == "assistant")
            return self._chat(example.messages[:last], add_generation_prompt=True), example.messages[last].content
        if example.prompt:
            return self._ids(example.prompt), example.text
        ids = self._ids(example.text)
        shown = min(SHOWN, len(ids) // 2 + 1)
        return ids[:shown], str(self.tokenizer.decode(ids[shown:]))

    def _passage(self, passage: Passage) -> Tokens:
        text = passage.prompt + passage.text
        ids = self._ids(text if text.endswith(self.eos) else text + self.eos)
        start = len(commonprefix([self._ids(passage.prompt), ids])) if passage.prompt and self.completion_only else 0
        return _trained_from(ids, start)

    def _completion(self, talk: Conversation) -> Tokens:
        ids = self._chat(talk.messages)
        prompt = self._chat(talk.messages[: talk.prompt_turns], add_generation_prompt=True)
        return _trained_from(ids, len(commonprefix([prompt, ids])) if self.completion_only else 0)

    def _conversation(self, messages: Sequence[Message]) -> Tokens:
        if not self.assistant_only:
            ids = self._chat(messages)
            return Tokens(ids, list(ids))
        if self.template is None:
            return self._by_turns(messages)
        found = self._apply(messages, chat_template=self.template, return_assistant_tokens_mask=True)
        ids = list(found["input_ids"])
        marks = zip(ids, found["assistant_masks"], strict=True)
        return Tokens(ids, [token if trained else IGNORED for token, trained in marks])

    def _by_turns(self, messages: Sequence[Message]) -> Tokens:
        """For a template without marks: an assistant's turn is what it adds to the conversation before it."""
        ids = self._chat(messages)
        labels = [IGNORED] * len(ids)
        for place, message in enumerate(messages):
            if message.role == "assistant":
                before = self._chat(messages[:place], add_generation_prompt=True)
                through = self._chat(messages[: place + 1])
                if ids[: len(through)] != through or through[: len(before)] != before:
                    raise DataError(
                        "data.chat_template: this model's template renders a turn differently once others follow, so "
                        "the assistant's turns cannot be told apart; name another template, or set "
                        "training.assistant_only_loss: false to train on whole conversations"
                    )
                end = self._without_blank_end(ids, len(before), len(through))
                labels[len(before) : end] = ids[len(before) : end]
        return Tokens(ids, labels)

    def _without_blank_end(self, ids: list[int], start: int, end: int) -> int:
        """The end of a turn, less the line break that templates put after the token that ends it."""
        while end - start > 1 and not self.tokenizer.decode(ids[end - 1]).strip():
            end -= 1
        return end

    def _chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self._apply(messages, **options)["input_ids"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            [asdict(one) for one in messages], tokenize=True, return_dict=True, **options
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


def chosen_example(pair: Preference) -> Conversation | Passage:
    """The prompt of a preference with its chosen answer."""
    if isinstance(pair.prompt, str):
        return Passage(str(pair.chosen), pair.prompt)
    return Conversation((*pair.prompt, *pair.chosen), prompt_turns=len(pair.prompt))


def _trained_from(ids: list[int], start: int) -> Tokens:
    return Tokens(ids, [IGNORED] * start + ids[start:])
