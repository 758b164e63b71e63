"""How a question is put: the instruction around it, the choices' names, and the response that is right.

The instruction format is Alpaca's, as in the commonsense line of work (LLM-Adapters, arXiv:2304.01933), without the
indentation that its code carries by accident; or the model's own chat template. The answer is either the answer's
*text* (which suits small models: letters and numbers of choices are near chance before training) or the reference's
*label*: all choices are listed and the response is ``the correct answer is answer2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smoa_lab.data.rows import Row

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
