"""Turns rows into token ids, and marks which of them are trained: the assistant's turns, or the completion.

TRL's own preparation gives the same tokens wherever it can mark the assistant's turns: where the chat template has
``{% generation %}`` marks, or is one that TRL knows. For other templates the turns are found in the text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from smoa.errors import DataError
from smoa_lab.data.prompts import IGNORED
from smoa_lab.rows.formats import Conversation, Example, Passage, Preference
from smoa_lab.rows.turns import Message
from smoa_lab.tokens.chat_templates import require_chat_template, training_template

MARK = "\ue000"
"""Stands for what is said; a character of the private use area, which no text has."""
SHOWN = 64
"""Tokens of a plain text that are given when the model is asked to go on."""


@dataclass(frozen=True)
class Tokens:
    """A row as the model sees it; ``labels`` are the ids where the loss is taken, and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens the loss is taken at: the first one is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int | None) -> Tokens:
        """The first ``length`` tokens."""
        return self if length is None else Tokens(self.input_ids[:length], self.labels[:length])


class RowEncoder:
    """Tokens of rows by a tokenizer. ``assistant_only`` and ``completion_only`` are TRL's keys of almost these names:
    false means that everything is trained.

    Raises:
        DataError: the tokenizer cannot tell where in the text its tokens are.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True, completion_only: bool = True
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"model.name: its {type(tokenizer).__name__} cannot tell where in the text its tokens are, which rows "
                "need; use a model with a tokenizer.json, or train on questions"
            )
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only
        self.completion_only = completion_only
        self.template = training_template(tokenizer) if tokenizer.chat_template else None
        self.eos = str(tokenizer.eos_token or "")

    def encode(self, example: Example) -> Tokens:
        """Token ids and labels; of a preference those of the chosen answer.

        Raises:
            ConfigError: the model has no chat template.
            DataError: the template refuses this row, or hides where its turns are.
        """
        if isinstance(example, Preference):
            example = side(example, "chosen")
        if isinstance(example, Passage):
            return self._passage(example)
        require_chat_template(self.tokenizer)
        if example.prompt_turns:
            return self._completion(example)
        return self._conversation(example.messages)

    def prompt(self, example: Example, longest: int | None = None) -> tuple[list[int], str] | None:
        """What the model is given when it is asked to answer, and the reference answer: the last turn whose prompt has
        at most ``longest`` tokens, the completion, or what follows the beginning of a plain text. None if nothing
        fits."""
        if isinstance(example, Preference):
            example = side(example, "chosen")
        prompts = self._turns(example) if isinstance(example, Conversation) else iter([self._beginning(example)])
        return next((found for found in prompts if longest is None or len(found[0]) <= longest), None)

    def _turns(self, talk: Conversation) -> Iterator[tuple[list[int], str]]:
        """Each answer with all that is before it, the last first."""
        for place in range(len(talk.messages) - 1, 0, -1):
            if talk.messages[place].role == "assistant":
                before = self._chat(talk.messages[:place], add_generation_prompt=True)
                yield before, talk.messages[place].content

    def _beginning(self, passage: Passage) -> tuple[list[int], str]:
        if passage.prompt:
            return self._ids(passage.prompt), passage.text
        ids = self._ids(passage.text)
        shown = min(SHOWN, len(ids) // 2 + 1)
        return ids[:shown], str(self.tokenizer.decode(ids[shown:]))

    def _passage(self, passage: Passage) -> Tokens:
        text = passage.prompt + passage.text
        ids = self._ids(text if text.endswith(self.eos) else text + self.eos)
        prompt = self._ids(passage.prompt) if passage.prompt and self.completion_only else []
        return _trained_after(prompt, ids)

    def _completion(self, talk: Conversation) -> Tokens:
        asked, said = talk.messages[: talk.prompt_turns], talk.messages[talk.prompt_turns :]
        prompt = self._chat(asked, add_generation_prompt=True) if self.completion_only else []
        if not (prompt and self.assistant_only and any(one.role == "user" for one in said)):
            return _trained_after(prompt, self._chat(talk.messages))
        whole = self._conversation(talk.messages)
        later = _trained_after(prompt, whole.input_ids).labels
        return Tokens(whole.input_ids, [min(pair) for pair in zip(whole.labels, later, strict=True)])

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
        """The tokens under a template without marks: trained are each assistant's content and what closes its turn, by
        their places in the text."""
        text = self._text(messages)
        spans = [
            span for span, one in zip(self._spans(text, messages), messages, strict=True) if one.role == "assistant"
        ]
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, (starts, ends) = list(found["input_ids"]), zip(*found["offset_mapping"], strict=True)
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            inside = slice(bisect_right(ends, start), bisect_left(starts, end))  # also a token across the start
            labels[inside] = ids[inside]
        return Tokens(ids, labels)

    def _spans(self, text: str, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
        """Where each message's content begins and its turn ends: what lies between is the template's own text."""
        between = self._text([Message(one.role, MARK) for one in messages]).split(MARK)
        place = len(between[0]) if len(between) == len(messages) + 1 and text.startswith(between[0]) else None
        for message, after in zip(messages, between[1:], strict=False):
            said = message.content
            trimmed = (said, said.strip(), said.lstrip(), said.rstrip())
            content = next((one for one in trimmed if place is not None and text.startswith(one + after, place)), None)
            if place is None or content is None:
                raise DataError(
                    "data.chat_template: this model's template changes what is said, so the assistant's turns cannot "
                    "be told apart; name another template, or set training.assistant_only_loss: false to train on "
                    "whole conversations"
                )
            end = place + len(content)
            yield place, end + len(self.closing) * text.startswith(self.closing, end)
            place = end + len(after)

    @cached_property
    def closing(self) -> str:
        """What the template puts after an answer, line breaks aside: mostly a token that ends the turn."""
        return self._text([Message("user", MARK), Message("assistant", MARK)]).rpartition(MARK)[2].rstrip()

    def _text(self, messages: Sequence[Message]) -> str:
        with _refusals():
            return str(self.tokenizer.apply_chat_template([asdict(one) for one in messages], tokenize=False))

    def _chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self._apply(messages, **options)["input_ids"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        with _refusals():
            return self.tokenizer.apply_chat_template(
                [asdict(one) for one in messages], tokenize=True, return_dict=True, **options
            )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (TemplateError, TypeError) as error:
        raise DataError(
            f"the chat template refuses this row: {error}; change the row, or name another data.chat_template"
        ) from error


def trained_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[tuple[str, bool]]:
    """The text as the model sees it, in pieces, each with whether it is trained."""
    pairs = zip(tokens.input_ids, tokens.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


def side(pair: Preference, name: Literal["chosen", "rejected"]) -> Conversation | Passage:
    """The prompt of a preference with one of its answers."""
    answer = getattr(pair, name)
    if isinstance(pair.prompt, str):
        return Passage(answer, pair.prompt)
    return Conversation((*pair.prompt, *answer), prompt_turns=len(pair.prompt))


def _trained_after(prompt: list[int], ids: list[int]) -> Tokens:
    """Trained from where ``ids`` leave the prompt: before its end where tokens merge across it."""
    start = next((place for place, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(prompt), len(ids)) if start is None else start
    return Tokens(ids, [IGNORED] * start + ids[start:])
