"""The named sets: data sets of the Hub, whose rows become rows of the formats ``choices`` or ``messages``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Values = dict[str, Any]
"""A row's columns: of the Hub, or of a format."""
DEMO = "csqa-demo"
"""The name of the part of CommonsenseQA that lies in the package, whose rows name their part."""
DEMO_FILE = Path(__file__).with_name("csqa_demo.jsonl.gz")


def _choices(prompt: str, choices: list[str], label: int, context: str = "") -> Values:
    lines = [text.strip() for text in (context, prompt)]
    return {"prompt": "\n".join(filter(None, lines)), "choices": choices, "label": label}


def _winogrande(row: Values) -> Values:
    prompt = f"Please fill in the blank to complete the given sentence: {row['sentence']}"
    return _choices(prompt, [row["option1"], row["option2"]], int(row["answer"]) - 1)


def _boolq(row: Values) -> Values:
    return _choices(f"{row['question']}?", ["yes", "no"], 0 if row["answer"] else 1, row["passage"])


def _piqa(row: Values) -> Values:
    return _choices(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def _socialiqa(row: Values) -> Values:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _choices(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _hellaswag(row: Values) -> Values:
    def unmarked(text: str) -> str:
        """Without WikiHow's marks, as lm-eval removes them."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    beginning = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    prompt = f"Please complete the given sentence: {unmarked(beginning)}"
    return _choices(prompt, list(map(unmarked, row["endings"])), int(row["label"]))


def _lettered(row: Values) -> Values:
    choices = row["choices"]
    question = row["question"] if "question" in row else row["question_stem"]
    return _choices(question, list(choices["text"]), list(choices["label"]).index(row["answerKey"]))


def _gsm8k(row: Values) -> Values:
    """Solutions end in ``#### number``."""
    turns = ("user", row["question"]), ("assistant", row["answer"])
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@dataclass(frozen=True)
class NamedSet:
    """A data set of the Hub, and what makes a row of ours of one of its rows. ``test`` is the split whose labels are
    public and on which the literature evaluates."""

    path: str
    parse: Callable[[Values], Values]
    test: str = "validation"
    config: str | None = None


# Copies of piqa and socialiqa, as lm-eval takes them: the originals are scripts, which datasets runs no more.
SETS: dict[str, NamedSet] = {
    "boolq": NamedSet("google/boolq", _boolq),
    "piqa": NamedSet("baber/piqa", _piqa),
    "socialiqa": NamedSet("lighteval/siqa", _socialiqa),
    "hellaswag": NamedSet("Rowan/hellaswag", _hellaswag),
    "winogrande": NamedSet("allenai/winogrande", _winogrande, config="winogrande_xl"),
    "arc_easy": NamedSet("allenai/ai2_arc", _lettered, "test", "ARC-Easy"),
    "arc_challenge": NamedSet("allenai/ai2_arc", _lettered, "test", "ARC-Challenge"),
    "openbookqa": NamedSet("allenai/openbookqa", _lettered, "test", "main"),
    "csqa": NamedSet("tau/commonsense_qa", _lettered),
    "gsm8k": NamedSet("openai/gsm8k", _gsm8k, "test", "main"),
}
