"""Turns rows into token ids, and marks which of them are trained: the assistant's turns, the completion.

TRL's own preparation gives the same tokens wherever it can mark the assistant's turns: where the chat template has
``{% generation %}`` marks, or is one that TRL knows. Under other templates a turn of the assistant is what a longer
conversation adds to a shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from smoa.errors import ConfigError, DataError
from smoa_lab.data.chat_templates import GREETING, training_template
from smoa_lab.data.row import Message, Row

IGNORED = -100  # the label that torch's cross entropy leaves out
SHOWN = 64
"""Tokens of a plain text that are given when the model is asked to go on."""


@dataclass(frozen=True)
class Tokens:
    """A row as the model sees it; ``labels`` are the ids where the loss is taken, and -100 elsewhere. ``cut`` counts
    the tokens that were lost to the length."""

    input_ids: list[int]
    labels: list[int]
    cut: int = 0

    @property
    def start(self) -> int:
        """How many tokens come before the first one that is trained."""
        return next((place for place, label in enumerate(self.labels) if label != IGNORED), len(self.labels))

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first one that is trained."""
        return self.input_ids[: self.start]

    @property
    def answer(self) -> list[int]:
        """The first trained token and all that follow."""
        return self.input_ids[self.start :]

    @property
    def trained(self) -> int:
        """How many tokens the loss is taken at: the first one is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def columns(self) -> dict[str, list[int]]:
        """``input_ids`` and ``labels``, as a trainer takes them."""
        return {"input_ids": self.input_ids, "labels": self.labels}


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: token ids, the same without the template's marks to be read, and the reference answer."""

    ids: list[int]
    text: str
    reference: str


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, without the EOS that some tokenizers put after each: a prompt goes on, and an answer gets
    its own."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and ends_texts(tokenizer) else ids


def ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts EOS after each text."""
    return list(tokenizer("a")["input_ids"])[-1:] == [tokenizer.eos_token_id]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch. Nothing reads what it fills, so that 0 serves a tokenizer without one."""
    return int(tokenizer.pad_token_id or 0)


@dataclass(eq=False)
class Encoder:
    """Tokens of rows by a tokenizer: the first ``max_length`` of each.

    ``assistant_only`` and ``completion_only`` are TRL's keys of almost these names: false means that everything is
    trained.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = 1024
    assistant_only: bool = True
    completion_only: bool = True

    def __post_init__(self) -> None:
        self.pad = pad_token(self.tokenizer)
        self.eos = str(self.tokenizer.eos_token or "")

    @cached_property
    def marked_template(self) -> str | None:
        """The chat template with marks around the assistant's turns; None if there is none."""
        return training_template(self.tokenizer) if self.tokenizer.chat_template else None

    def state(self) -> Any:
        """Plain values that change when the tokens of a row may."""
        tokenizer: Any = self.tokenizer
        if tokenizer.is_fast:  # which each call sets anew
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        own = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
        settings = [self.max_length, self.assistant_only, self.completion_only]
        return [own, tokenizer.chat_template, self.marked_template, tokenizer.special_tokens_map, settings]

    @cached_property
    def opening(self) -> tuple[str, str] | None:
        """What the template ends with when it asks for an answer, and what stands there in training, such as the empty
        thoughts of a model that thinks; None where that is the same."""
        question, answer = (Message(**turn) for turn in GREETING)
        try:
            asked = self._text([question], add_generation_prompt=True)
            trained = self._text([question, answer])
        except DataError:  # it wants other turns
            return None
        before = trained[: trained.rfind(answer.content)]
        common = len(commonprefix([asked, before]))  # noqa: RUF071
        return (asked[common:], before[common:]) if asked != before else None

    def encode(self, row: Row) -> Tokens:
        """What is trained on: of choices the right one. Raises DataError if the chat template refuses this row, or
        changes what was said before."""
        completion = row.completion
        if isinstance(completion, str):
            prompt, text = str(row.prompt), f"{row.prompt}{completion}"
            ids = self._ids(text if text.endswith(self.eos) else text + self.eos)
            return self._cut(_trained_after(self._ids(prompt) if prompt and self.completion_only else [], ids))
        return self._cut(self._turns(_messages(row.prompt), completion))

    def texts(self, row: Row, scored: bool) -> list[Tokens]:
        """The text of a row that is trained, and of one that is ``scored`` its choices too."""
        return [self.encode(row), *(self.choices(row) if scored and row.choices else [])]

    def choices(self, row: Row) -> list[Tokens]:
        """The prompt with each choice, and without what ends the answer: whose likelihoods are compared."""
        prompt = self._asked(_messages(row.prompt), row.choices[row.label or 0])
        before = self._of_template(prompt)
        found = []
        for choice in row.choices:
            together = self._of_template(prompt + choice)  # unless that changes the prompt that generates
            is_same = together[: len(before)] == before and len(together) > len(before)
            answer = together[len(before) :] if is_same else self._of_template(choice)
            excess = max(0, len(before) + len(answer) - self.max_length) if self.max_length else 0
            first = before[:1] if before[:1] == [self.tokenizer.bos_token_id] else []  # which training keeps
            kept = first + before[len(first) + excess :]  # else choices would be cut to the same
            answer = answer[: self.max_length - len(first)] if self.max_length else answer
            found.append(Tokens(kept + answer, [IGNORED] * len(kept) + answer, cut=excess))
        return found

    def _cut(self, tokens: Tokens) -> Tokens:
        length = self.max_length
        if length is None or len(tokens.input_ids) <= length:
            return tokens
        return Tokens(tokens.input_ids[:length], tokens.labels[:length], cut=len(tokens.input_ids) - length)

    def prompt(self, row: Row, longest: int | None = None) -> Prompt | None:
        """What the model is asked: the last turn whose prompt has at most ``longest`` tokens; a completion's prompt; or
        the beginning of a plain text. None if nothing fits."""
        if not row.is_text:
            messages = _messages(row.prompt, row.completion)
            for place in reversed(range(1, len(messages))):
                if messages[place].role == "assistant":
                    ids = self._of_template(self._asked(messages[:place], messages[place].content))
                    if longest is None or len(ids) <= longest:
                        return Prompt(ids, _read(messages[:place]), messages[place].content)
            return None
        if row.prompt:
            found = Prompt(self._ids(str(row.prompt)), str(row.prompt), str(row.completion))
        else:
            ids = self._ids(str(row.completion))
            begun = min(SHOWN, len(ids) // 2 + 1)
            parts = (ids[:begun], ids[begun:])
            shown, rest = (str(self.tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
            found = Prompt(ids[:begun], shown, rest)
        return found if longest is None or len(found.ids) <= longest else None

    # Texts and turns

    def _asked(self, messages: Sequence[Message], answer: str) -> str:
        """The turns up to an answer, where a model goes on, with what stands there in training if the answer has it."""
        text = self._text(messages, add_generation_prompt=True)
        if self.opening is None:
            return text
        begun = text.removesuffix(self.opening[0]) + self.opening[1]
        trained = self._text([*messages, Message("assistant", answer)])
        is_begun = trained.startswith(begun) and trained[len(begun) :].lstrip().startswith(answer.strip())
        return begun if is_begun else text

    def _text(self, messages: Sequence[Message], **options: Any) -> str:
        """The turns as the template trains them: by the one with marks, where the assistant's alone are trained."""
        marked = {"chat_template": self.marked_template} if self.marked_template and self.assistant_only else {}
        return str(self._apply(messages, tokenize=False, **marked, **options))

    def _turns(self, asked: Sequence[Message], said: Sequence[Message]) -> Tokens:
        messages = [*asked, *said]
        if not asked:
            return self._conversation(messages)
        prompt = self._chat(asked, add_generation_prompt=True) if self.completion_only else []
        if not (prompt and self.assistant_only and any(message.role == "user" for message in said)):
            return _trained_after(prompt, self._chat(messages))
        whole = self._conversation(messages)
        later = _trained_after(prompt, whole.input_ids).labels
        return Tokens(whole.input_ids, [min(pair) for pair in zip(whole.labels, later, strict=True)])

    def _conversation(self, messages: Sequence[Message]) -> Tokens:
        if not self.assistant_only:
            ids = self._chat(messages)
            return Tokens(ids, list(ids))
        if self.marked_template is None:
            return self._by_turns(messages)
        options = {"chat_template": self.marked_template, "return_assistant_tokens_mask": True}
        marked = self._apply(messages, tokenize=True, return_dict=True, **options)
        ids = list(marked["input_ids"])
        marks = zip(ids, marked["assistant_masks"], strict=True)
        return Tokens(ids, [token if trained else IGNORED for token, trained in marks])

    def _by_turns(self, messages: Sequence[Message]) -> Tokens:
        """The tokens under a template without marks: trained is what each answer adds to the conversation before it,
        blanks at its end aside, which separate turns."""
        whole = str(self._apply(messages, tokenize=False))
        read = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(read["input_ids"])
        labels = [IGNORED] * len(ids)
        for place in (place for place, message in enumerate(messages) if message.role == "assistant"):
            before = str(self._apply(messages[:place], tokenize=False, add_generation_prompt=True))
            after = str(self._apply(messages[: place + 1], tokenize=False)).rstrip()
            if not (whole.startswith(before) and whole.startswith(after)):
                raise DataError(
                    "data.template: under this model's template the assistant's turns can't be told apart: a longer "
                    "conversation doesn't begin with a shorter one; name another template, or set "
                    "training.assistant_only_loss: false to train on whole conversations"
                )
            for number, (start, stop) in enumerate(read["offset_mapping"]):
                if stop > len(before) and start < len(after):
                    labels[number] = ids[number]
        return Tokens(ids, labels)

    def _of_template(self, text: str) -> list[int]:
        """The tokens of a text in which the template has put the special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self._apply(messages, tokenize=True, return_dict=True, **options)["input_ids"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "data.template: this model has no chat template, and the rows are conversations; name one: alpaca, "
                "which suits every base model, a model's family (gemma3, qwen3, llama3, …), or a .jinja file"
            )
        try:
            return self.tokenizer.apply_chat_template([{**vars(message)} for message in messages], **options)
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses this row: {error}; change the row or data.template") from error

    def _ids(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)


def trained_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[tuple[str, bool]]:
    """The text as the model sees it, in pieces, each with whether it is trained."""
    pairs = zip(tokens.input_ids, tokens.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


def _messages(*said: Any) -> list[Message]:
    """The turns of prompts and completions; an empty text has none."""
    return [message for turns in said for message in turns]


def _read(messages: Sequence[Message]) -> str:
    """Turns as people read them; a single question needs no role."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def _trained_after(prompt: list[int], ids: list[int]) -> Tokens:
    """Trained from where ``ids`` leave the prompt: before its end where tokens merge across it."""
    start = next((place for place, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(prompt), len(ids)) if start is None else start
    return Tokens(ids, [IGNORED] * start + ids[start:])
