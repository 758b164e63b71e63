from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run import load_config
from smoa_lab.config.yaml_text import apply_overrides, key_lines, parse_yaml, to_yaml


@pytest.mark.parametrize(
    ("override", "message"),
    [("training", "key.key=value"), ("=3", "key.key=value"), ("model.name.first=3", "name is not a block of keys")],
)
def test_an_override_that_goes_nowhere_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"model": {"name": "base"}}, [override])


def test_numbers_in_exponent_notation_are_numbers_and_no_is_a_word(file: Path) -> None:
    training = load_config(file, ["training.eval_strategy=no", "training.bf16=false"]).training
    assert (training["learning_rate"], training["eval_strategy"], training["bf16"]) == (0.01, "no", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1"),
        ("- 1", r"run\.yaml: must contain blocks"),
        ("", "must contain blocks"),
        ("model: 1\nmodel: 2", 'line 2: found duplicate key "model"'),
        ("a: 2020-99-99", "month must be in 1..12"),
    ],
)
def test_text_that_is_no_config_is_refused_with_its_place(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_what_is_not_yaml_is_a_text_in_an_override() -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, ["a.b=[1, 2]", "a.c=[1", "a.d=1e-3"])
    assert values == {"a": {"b": [1, 2], "c": "[1", "d": 0.001}}


def test_what_is_written_is_read_again_as_it_was() -> None:
    values = {"b": {"text": "1e-3", "word": "no", "number": 1e-5, "none": None, "empty": {}, "list": [1, "é"]}, "a": 1}
    text = to_yaml(values)
    assert parse_yaml(text, Path("run.yaml")) == values
    assert text.index("b:") < text.index("a:")
    assert to_yaml({"train": "a long path " * 50}).count("\n") == 1


def test_keys_know_their_lines() -> None:
    assert key_lines("a:\n  b: 1\n  c: {d: 2}\n") == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", "d"): 3}
    assert key_lines("") == {}


def test_a_block_may_be_referred_to(file: Path) -> None:
    assert parse_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}", file)["c"] == {"x": [1], "y": 2}
