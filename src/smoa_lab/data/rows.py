"""The one type of a row: a prompt and what should follow it. And questions: made, deduplicated, split, hashed, and put
into words.

The instruction format is Alpaca's, as in the commonsense line of work (LLM-Adapters, arXiv:2304.01933), without the
indentation that its code carries by accident; or the model's own chat template. The answer is either the answer's
*text* (which suits small models: letters and numbers of choices are near chance before training) or the reference's
*label*: all choices are listed and the response is ``the correct answer is answer2``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from smoa.errors import DataError


@dataclass(frozen=True)
class Message:
    """A turn: who says it (``system``, ``user`` or ``assistant``), and what."""

    role: str
    content: str


Said = str | tuple[Message, ...]
"""Plain text, or turns of a conversation."""


@dataclass(frozen=True)
class Row:
    """A prompt, never trained, and its completion: both are text, or both turns of a conversation.

    A text without a prompt is trained in full. A conversation without one is trained where the assistant speaks. A
    preference has a ``rejected`` completion too. A question has a ``task``; its ``choices`` are empty where the answer
    is free text, otherwise ``choices[label] == completion``. Its ``context`` is a passage that it is about, or the
    turns before it. ``id`` is the source's own and no part of the content.
    """

    prompt: Said
    completion: Said
    rejected: Said | None = None
    task: str = ""
    id: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
    context: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, not turns."""
        return isinstance(self.completion, str)

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two questions the same: context, prompt, answer and choices (in any order), whatever the white
        space and the case."""
        return tuple(map(_even, (self.context, self.prompt, self.completion, *sorted(self.choices))))

    @property
    def digest(self) -> str:
        """Equal for rows that say the same, whatever their white space and case. It decides a row's part, so its form
        never changes."""
        form: dict[str, Any]
        if self.task:
            form = {"kind": "question", "content": self.content}
        elif self.rejected is not None:
            form = {"kind": "preference", "prompt": self.prompt, "chosen": self.completion, "rejected": self.rejected}
        elif isinstance(self.completion, str):
            form = {"kind": "passage", "text": self.completion, "prompt": self.prompt}
        else:
            turns = (*self.prompt, *self.completion)
            form = {"kind": "conversation", "messages": turns, "prompt_turns": len(self.prompt)}
        even = {key: _even(value) for key, value in form.items()}
        return hashlib.sha256(json.dumps(even).encode()).hexdigest()

    @property
    def key(self) -> int:
        """The first 8 bytes of :attr:`digest`, which stand for the row where many are kept."""
        return int(self.digest[:16], 16)

    def to_json(self) -> str:
        """The inverse of :func:`row_from_json`."""
        return json.dumps(asdict(self))


def row_from_json(text: str) -> Row:
    """The row of a JSON text."""
    values = json.loads(text)
    for key in ("prompt", "completion", "rejected"):
        if isinstance(values[key], list):
            values[key] = tuple(Message(**turn) for turn in values[key])
    return Row(**{**values, "choices": tuple(values["choices"])})


def _even(value: Any) -> Any:
    """``value`` without differences of white space and case, also within turns."""
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Message):
        return {"role": _even(value.role), "content": _even(value.content)}
    return [_even(part) for part in value] if isinstance(value, tuple) else value


def question(
    task: str,
    id: str,
    prompt: str,
    answer: str,
    choices: Sequence[str] = (),
    label: int | None = None,
    context: str = "",
) -> Row:
    """The row of a question; raises DataError if it is blank, or the answer is not the choice of that number."""
    where = f"{task}, record {id}"
    if not prompt.strip() or not answer.strip():
        raise DataError(f"{where}: prompt and answer must not be empty; got {prompt!r} and {answer!r}")
    if choices and (label is None or choices[label] != answer):
        raise DataError(f"{where}: answer {answer!r} is not choice number {label} of {tuple(choices)}")
    return Row(prompt, answer, task=task, id=id, choices=tuple(choices), label=label, context=context)


def choice_question(
    task: str, identifier: str, prompt: str, choices: Sequence[str], label: int, context: str = ""
) -> Row:
    """A multiple-choice question; raises DataError if ``label`` (from 0) is outside ``choices``."""
    if not 0 <= label < len(choices):
        raise DataError(
            f"{task}, record {identifier}: label {label} is outside its {len(choices)} choices (counted from 0)"
        )
    return question(task, identifier, prompt, choices[label], choices, label, context)


def question_values(row: Row) -> dict[str, Any]:
    """The arguments of :func:`question`, as values that JSON has."""
    return {
        "task": row.task,
        "id": row.id,
        "prompt": row.prompt,
        "answer": row.completion,
        "choices": row.choices,
        "label": row.label,
        "context": row.context,
    }


@dataclass(frozen=True)
class Split:
    """The three parts of a task, and how many training questions were dropped: ``also_in_test`` because a test part
    has them, ``repeated`` because the training part already had them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    also_in_test: int = 0
    repeated: int = 0


def split(
    train: Sequence[Row], test: Sequence[Row], validation_part: float, of_others: Collection[tuple[str, ...]] = ()
) -> Split:
    """Drop from ``train`` the questions of ``test``, those of other tasks' test parts, whose contents are
    ``of_others``, and repeated ones, then cut off a validation part.

    The cut is the same in all runs, whatever their seed and however much data they use.
    """
    held_out = {row.content for row in test}.union(of_others)
    unseen = [row for row in train if row.content not in held_out]
    order = list({row.content: row for row in reversed(unseen)}.values())[::-1]  # the first of each content
    dropped = {"also_in_test": len(train) - len(unseen), "repeated": len(unseen) - len(order)}
    random.Random(0).shuffle(order)
    cut = int(len(order) * validation_part)
    return Split(order[cut:], order[:cut], list(test), **dropped)


def content_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over questions in order, identifiers aside: equal for equal data, whatever the source."""
    digest = hashlib.sha256()
    for row in rows:
        values = {key: value for key, value in question_values(row).items() if key != "id"}
        digest.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


Template = Literal["alpaca", "chat"]
AnswerStyle = Literal["text", "label"]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class LabelWording:
    """The reference's wording of a multiple-choice task and the word before the number of a choice."""

    request: str
    word: str


QUESTION = LabelWording("Please choose the correct answer to the question: ", "answer")
LABEL_WORDINGS = {
    "boolq": LabelWording("Please answer the following question with true or false, question: ", ""),
    "piqa": LabelWording("Please choose the correct solution to the question: ", "solution"),
    "hellaswag": LabelWording("Please choose the correct ending to complete the given sentence: ", "ending"),
    "winogrande": LabelWording(
        "Please choose the correct answer to fill in the blank to complete the given sentence: ", "option"
    ),
}
TEXT_REQUESTS = {
    "hellaswag": "Please complete the given sentence: ",
    "winogrande": "Please fill in the blank to complete the given sentence: ",
}
"""Where the bare question does not say what is wanted."""


def instruction(row: Row, style: AnswerStyle) -> str:
    """The request, without the template around it. As in the reference, the label style leaves out BoolQ's passage."""
    if style == "text" or not row.choices:
        before = f"{row.context}\n" if row.context else ""
        return f"{before}{TEXT_REQUESTS.get(row.task, '')}{row.prompt}"
    wording = LABEL_WORDINGS.get(row.task, QUESTION)
    names = label_names(row)
    listed = " ".join(f"{name.capitalize()}: {text}" for name, text in zip(names, row.choices, strict=True))
    choices = f"{listed}\n\n" if wording.word else ""
    return f"{wording.request}{row.prompt}\n\n{choices}Answer format: {'/'.join(names)}"


def label_names(row: Row) -> list[str]:
    """What the reference calls the choices: ``answer1``, ``solution2``, ``true``, …"""
    word = LABEL_WORDINGS.get(row.task, QUESTION).word
    if not word:
        return ["true" if text == "yes" else "false" for text in row.choices]
    return [f"{word}{number}" for number in range(1, len(row.choices) + 1)]


def candidates(row: Row, style: AnswerStyle) -> list[str]:
    """The response that each choice would be, in order."""
    if style == "text":
        return list(row.choices)
    return [f"the correct answer is {name}" for name in label_names(row)]


def gold_response(row: Row, style: AnswerStyle) -> str:
    """What the model should say to a question."""
    return str(row.completion) if row.label is None else candidates(row, style)[row.label]
