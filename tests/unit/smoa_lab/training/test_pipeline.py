"""Loss curves and tokens of the release in which questions and rows went two ways: one pipeline gives the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.config.run import check_config
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.formats import recognize, shape
from smoa_lab.data.rows import choice_question, question
from smoa_lab.training.train_run import train
from tests.support import lab
from tests.support.own_rows import (
    MARKED,
    PLAIN,
    chat,
    losses,
    tokenizer_with,
)

CURVES = {
    "questions": [6.6175, 6.5152, 5.6042, 5.9362, 5.8651, 5.9305, 5.2645, 5.7896, 6.0698, 5.0477],
    "all weights": [6.6175, 5.6698, 4.4372, 4.7677, 4.1122, 3.0598, 2.4121, 3.3196, 2.9047, 1.9926],
}


@pytest.mark.parametrize("kind", CURVES)
def test_ten_steps_lose_as_much_as_before(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rows are compared with TRL's own in test_loaded_run.py."""
    values = lab.tiny_run(tmp_path, monkeypatch, train=12, test=4, training=lab.steps(10, learning_rate=1e-2))
    values |= {"method": "full", "adapter": {}} if kind == "all weights" else {}
    assert losses(train(check_config(values))) == pytest.approx(CURVES[kind], rel=1e-3)


def digest(tokens: Any) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]


def test_tokens_and_labels_are_as_before() -> None:
    questions = [
        *lab.questions(3, "train"),
        question("text", "0", "Go on", "and on", context="A while"),
        choice_question("boolq", "b", "is it?", ["yes", "no"], 0, "A passage"),
    ]
    made: list[Any] = []
    for template, style, length in (("alpaca", "text", 256), ("alpaca", "label", 60), ("chat", "text", 60)):
        encoder = Encoder(tokenizer_with(PLAIN), length, template, style)  # type: ignore[arg-type]
        made += [[tokens.input_ids, tokens.labels] for row in questions for tokens in (encoder.encode(row),)]
    assert digest(made) == "8769588bd877"
    rows: list[dict[str, Any]] = [
        {"messages": chat("Hi", "Hello", "How?", "Well.", system="Be kind.")},
        {"prompt": chat("Hi"), "completion": chat("x", "Hello")[1:]},
        {"prompt": "1 is", "chosen": " one", "rejected": " two"},
        {"text": "A long text."},
    ]
    made = []
    for marks in (PLAIN, MARKED):
        encoder = Encoder(tokenizer_with(marks), None)
        for row in rows:
            tokens = encoder.encode(shape(row, recognize(row)))  # type: ignore[arg-type]
            made.append([tokens.input_ids, tokens.labels])
    assert digest(made) == "f477b93e069d"
