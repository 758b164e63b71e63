"""Turns a record into tokens: an instruction, the model's answer, and a loss on the answer only.

The instruction format is Alpaca's, as in the commonsense line of work (LLM-Adapters, arXiv:2304.01933), without the
indentation that its code carries by accident; or the model's own chat template. The answer is either the answer's
*text* (which suits small models: letters and numbers of choices are near chance before training) or the reference's
*label*: all choices are listed and the response is ``the correct answer is answer2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from smoa.errors import DataError
from smoa_lab.data.records import Record

Template = Literal["alpaca", "chat"]
AnswerStyle = Literal["text", "label"]

IGNORED = -100  # the label that torch's cross entropy leaves out

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
# Where the bare question does not say what is wanted.
TEXT_REQUESTS = {
    "hellaswag": "Please complete the given sentence: ",
    "winogrande": "Please fill in the blank to complete the given sentence: ",
}


def instruction(record: Record, style: AnswerStyle) -> str:
    """The request, without the template around it. As in the reference, the label style leaves out BoolQ's passage."""
    if style == "text" or not record.choices:
        before = f"{record.context}\n" if record.context else ""
        return before + TEXT_REQUESTS.get(record.task, "") + record.prompt
    wording = LABEL_WORDINGS.get(record.task, QUESTION)
    names = label_names(record)
    listed = " ".join(f"{name.capitalize()}: {text}" for name, text in zip(names, record.choices, strict=True))
    choices = f"{listed}\n\n" if wording.word else ""
    return f"{wording.request}{record.prompt}\n\n{choices}Answer format: {'/'.join(names)}"


def label_names(record: Record) -> list[str]:
    """What the reference calls the choices: ``answer1``, ``solution2``, ``true``, …"""
    word = LABEL_WORDINGS.get(record.task, QUESTION).word
    if not word:
        return ["true" if text == "yes" else "false" for text in record.choices]
    return [f"{word}{number}" for number in range(1, len(record.choices) + 1)]


def candidates(record: Record, style: AnswerStyle) -> list[str]:
    """The response that each choice would be, in order."""
    if style == "text":
        return list(record.choices)
    return [f"the correct answer is {name}" for name in label_names(record)]


def gold_response(record: Record, style: AnswerStyle) -> str:
    """What the model should say."""
    return record.answer if record.label is None else candidates(record, style)[record.label]


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; ``cut`` counts the tokens lost from the prompt's head and ``answer_cut`` those
    from the answer's end."""

    prompt: list[int]
    answer: list[int]
    cut: int = 0
    answer_cut: int = 0

    @property
    def row(self) -> dict[str, list[int]]:
        """``input_ids`` and ``labels``, as the Trainer wants them."""
        return {"input_ids": self.prompt + self.answer, "labels": [IGNORED] * len(self.prompt) + self.answer}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text begins with the BOS token. GPT-2 has one and does not use it: what becomes of an empty text
    decides."""
    return tokenizer.bos_token_id in tokenizer("")["input_ids"]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch. Nothing reads what it fills, so that 0 serves a tokenizer without one."""
    return int(tokenizer.pad_token_id or 0)


class PromptEncoder:
    """Turns records into token ids of at most ``max_length``; too long prompts lose their head, never their tail.
    BOS, or else a token of the prompt, always precedes the answer, so that each token of it is predicted."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "alpaca",
        style: AnswerStyle = "text",
        max_length: int = 256,
    ) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise DataError("task.template: this model's tokenizer has no chat template; use template: alpaca")
        self.tokenizer = tokenizer
        self.template = template
        self.style = style
        self.max_length = max_length
        self.pad = pad_token(tokenizer)
        self.head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []

    def example(self, record: Record) -> Encoded:
        """Prompt and gold answer, closed by the end token: what is trained on."""
        return self.encode(record, gold_response(record, self.style), end=True)

    def choices(self, record: Record) -> list[Encoded]:
        """Prompt and each choice, without an end token: what is scored."""
        return [self.encode(record, text, end=False) for text in candidates(record, self.style)]

    def gold(self, record: Record) -> Encoded:
        """Prompt and gold answer, without an end token: whose loss is reported."""
        return self.encode(record, gold_response(record, self.style), end=False)

    def encode(self, record: Record, response: str, end: bool) -> Encoded:
        """Token ids of a record's prompt with any response."""
        return self.encode_texts(self.prompt_text(record), response, end)

    def encode_texts(self, prompt_text: str, response: str, end: bool) -> Encoded:
        """Token ids of a prompt that is already in the template, and a response; raises DataError if nothing precedes
        the response."""
        prompt, answer = self._tokens(prompt_text, response)
        if not (self.head or prompt):
            raise DataError(
                "the prompt is empty and the tokenizer adds no BOS token, so that nothing predicts the answer's first "
                "token; give a prompt"
            )
        if end:
            answer = [*answer, self._end_token()]
        return self._fit(prompt, answer)

    def prompt_text(self, record: Record) -> str:
        """Everything before the answer, as text, without BOS."""
        request = instruction(record, self.style)
        if self.template == "alpaca":
            return ALPACA.format(instruction=request)
        turns = [{"role": "user", "content": request}]
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return text.removeprefix(self.tokenizer.bos_token or "") if self.head else text

    def _tokens(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Tokenised together where that leaves the prompt as it is when the model generates, apart otherwise."""
        alone = self._ids(prompt)
        together = self._ids(prompt + response)
        if together[: len(alone)] == alone and len(together) > len(alone):
            return alone, together[len(alone) :]
        return alone, self._ids(response)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end_token(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; answers could never end")
        return int(self.tokenizer.eos_token_id)

    def _fit(self, prompt: list[int], answer: list[int]) -> Encoded:
        kept_answer = answer[: self.max_length - 1]
        room = self.max_length - len(self.head) - len(kept_answer)
        kept_prompt = prompt[max(0, len(prompt) - room) :]
        return Encoded(
            prompt=self.head + kept_prompt,
            answer=kept_answer,
            cut=len(prompt) - len(kept_prompt),
            answer_cut=len(answer) - len(kept_answer),
        )
