"""Turns rows into token ids, and marks which of them are trained: the answer, the assistant's turns, the completion.

TRL's own preparation gives the same tokens wherever it can mark the assistant's turns: where the chat template has
``{% generation %}`` marks, or is one that TRL knows. For other templates the turns are found in the text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from smoa.errors import ConfigError, DataError
from smoa_lab.data.chat_templates import adds_bos, training_template
from smoa_lab.data.rows import ALPACA, AnswerStyle, Message, Row, Template, candidates, gold_response, instruction

IGNORED = -100  # the label that torch's cross entropy leaves out
MARK = "\ue000"
"""Stands for what is said; a character of the private use area, which no text has."""
SHOWN = 64
"""Tokens of a plain text that are given when the model is asked to go on."""


@dataclass(frozen=True)
class Tokens:
    """A row as the model sees it; ``labels`` are the ids where the loss is taken, and -100 elsewhere.

    ``cut`` counts the tokens that were lost to the length: of a question from its prompt's head, and ``answer_cut``
    from its answer's end; of any other row from its end.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    answer_cut: int = 0

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


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch. Nothing reads what it fills, so that 0 serves a tokenizer without one."""
    return int(tokenizer.pad_token_id or 0)


class Encoder:
    """Tokens of rows by a tokenizer, at most ``max_length`` of them.

    Questions are put in ``template`` and answered in ``style``. Too long ones lose their head, never their tail; BOS,
    or else a token of the prompt, always precedes the answer, so that each token of it is predicted. Other rows keep
    their beginning. ``assistant_only`` and ``completion_only`` are TRL's keys of almost these names: false means that
    everything is trained.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = 256,
        template: Template = "alpaca",
        style: AnswerStyle = "text",
        assistant_only: bool = True,
        completion_only: bool = True,
    ) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise DataError("task.template: this model's tokenizer has no chat template; use template: alpaca")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template = template
        self.style = style
        self.assistant_only = assistant_only
        self.completion_only = completion_only
        self.pad = pad_token(tokenizer)
        self.head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.eos = str(tokenizer.eos_token or "")

    @cached_property
    def marked_template(self) -> str | None:
        """The chat template with marks around the assistant's turns; None if there is none."""
        return training_template(self.tokenizer) if self.tokenizer.chat_template else None

    def encode(self, row: Row, rejected: bool = False) -> Tokens:
        """What is trained on: of a question with its gold answer and the end token, of a preference the better
        completion, or the ``rejected`` one.

        Raises:
            ConfigError: the row has turns, and the model has no chat template.
            DataError: the template refuses this row, or hides where its turns are.
        """
        if row.task:
            return self.answered(row, gold_response(row, self.style), end=True)
        completion = row.rejected if rejected and row.rejected is not None else row.completion
        if isinstance(completion, str):
            tokens = self._text(str(row.prompt), completion)
        else:
            if not self.tokenizer.chat_template:
                raise ConfigError(
                    "data.chat_template: this model has no chat template, and the rows are conversations; name one: "
                    "alpaca, which suits every base model, the name of a model's family (gemma3, qwen3, llama3, …), or "
                    "a .jinja file"
                )
            tokens = self._turns(_messages(row.prompt), completion)
        length = self.max_length
        if length is None or len(tokens.input_ids) <= length:
            return tokens
        return Tokens(tokens.input_ids[:length], tokens.labels[:length], cut=len(tokens.input_ids) - length)

    # Questions

    def choices(self, row: Row) -> list[Tokens]:
        """A question's prompt with each choice, without an end token: what is scored."""
        return [self.answered(row, text, end=False) for text in candidates(row, self.style)]

    def gold(self, row: Row) -> Tokens:
        """A question's prompt with its gold answer, without an end token: whose loss is reported."""
        return self.answered(row, gold_response(row, self.style), end=False)

    def answered(self, row: Row, response: str, end: bool) -> Tokens:
        """A question with any response; raises DataError if nothing precedes the response."""

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        text = self.question_text(row)
        prompt, together = ids(text), ids(text + response)
        # Together where that leaves the prompt as it is when the model generates, apart otherwise.
        is_same = together[: len(prompt)] == prompt and len(together) > len(prompt)
        answer = together[len(prompt) :] if is_same else ids(response)
        if not (self.head or prompt):
            raise DataError(
                "the prompt is empty and the tokenizer adds no BOS token, so that nothing predicts the answer's first "
                "token; give a prompt"
            )
        if end and self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; answers could never end")
        if end:
            answer = [*answer, int(self.tokenizer.eos_token_id)]
        length = self.max_length or len(self.head) + len(prompt) + len(answer) + 1
        kept_answer = answer[: length - 1]
        kept_prompt = prompt[max(0, len(prompt) - (length - len(self.head) - len(kept_answer))) :]
        before = self.head + kept_prompt
        return Tokens(
            before + kept_answer,
            [IGNORED] * len(before) + kept_answer,
            cut=len(prompt) - len(kept_prompt),
            answer_cut=len(answer) - len(kept_answer),
        )

    def question_text(self, row: Row) -> str:
        """Everything before a question's answer, as text, without BOS."""
        request = instruction(row, self.style)
        if self.template == "alpaca":
            return ALPACA.format(instruction=request)
        turns = [{"role": "user", "content": request}]
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return text.removeprefix(self.tokenizer.bos_token or "") if self.head else text

    # What the model is asked to continue

    def prompt(self, row: Row, longest: int | None = None) -> tuple[list[int], str] | None:
        """What the model is given when it is asked to answer, and the reference answer: a question; the last turn whose
        prompt has at most ``longest`` tokens; a completion's prompt; or the beginning of a plain text. None if nothing
        fits."""
        if row.task:
            return self.answered(row, "", end=False).prompt, gold_response(row, self.style)
        prompts: Iterable[tuple[list[int], str]]
        if not row.is_text:
            messages = _messages(row.prompt, row.completion)
            prompts = (
                (self._chat(messages[:place], add_generation_prompt=True), messages[place].content)
                for place in reversed(range(1, len(messages)))
                if messages[place].role == "assistant"
            )
        elif row.prompt:
            prompts = [(self._ids(str(row.prompt)), str(row.completion))]
        else:
            ids = self._ids(str(row.completion))
            begun = min(SHOWN, len(ids) // 2 + 1)
            prompts = [(ids[:begun], str(self.tokenizer.decode(ids[begun:])))]
        return next((prompt for prompt in prompts if longest is None or len(prompt[0]) <= longest), None)

    # Texts and turns

    def _text(self, prompt: str, completion: str) -> Tokens:
        text = prompt + completion
        ids = self._ids(text if text.endswith(self.eos) else text + self.eos)
        return _trained_after(self._ids(prompt) if prompt and self.completion_only else [], ids)

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
        """The tokens under a template without marks: trained are each assistant's content and what closes its turn, by
        their places in the text."""
        text = self._formatted(messages)
        placed = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, (starts, ends) = list(placed["input_ids"]), zip(*placed["offset_mapping"], strict=True)
        labels = [IGNORED] * len(ids)
        for (start, end), message in zip(self._spans(text, messages), messages, strict=True):
            if message.role == "assistant":
                inside = slice(bisect_right(ends, start), bisect_left(starts, end))  # also a token across the start
                labels[inside] = ids[inside]
        return Tokens(ids, labels)

    def _spans(self, text: str, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
        """Where each message's content begins and its turn ends: what lies between is the template's own text."""
        between = self._formatted([Message(message.role, MARK) for message in messages]).split(MARK)
        place = len(between[0]) if len(between) == len(messages) + 1 and text.startswith(between[0]) else None
        for message, after in zip(messages, between[1:], strict=False):
            said = message.content
            trimmed = (said, said.strip(), said.lstrip(), said.rstrip())
            content = next(
                (form for form in trimmed if place is not None and text.startswith(form + after, place)), None
            )
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
        return self._formatted([Message("user", MARK), Message("assistant", MARK)]).rpartition(MARK)[2].rstrip()

    def _formatted(self, messages: Sequence[Message]) -> str:
        return str(self._apply(messages, tokenize=False))

    def _chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self._apply(messages, tokenize=True, return_dict=True, **options)["input_ids"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template([asdict(message) for message in messages], **options)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"the chat template refuses this row: {error}; change the row, or name another data.chat_template"
            ) from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


def trained_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[tuple[str, bool]]:
    """The text as the model sees it, in pieces, each with whether it is trained."""
    pairs = zip(tokens.input_ids, tokens.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


def _messages(*said: Any) -> list[Message]:
    """The turns of prompts and completions; an empty text has none."""
    return [message for turns in said for message in turns]


def _trained_after(prompt: list[int], ids: list[int]) -> Tokens:
    """Trained from where ``ids`` leave the prompt: before its end where tokens merge across it."""
    start = next((place for place, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(prompt), len(ids)) if start is None else start
    return Tokens(ids, [IGNORED] * start + ids[start:])
