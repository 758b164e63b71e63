"""Rows are read, chosen and cut as they were given: separators, depth, parts that are too large, long choices."""

import json
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.config.run import check_config
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.formats import BadRow, shape
from smoa_lab.data.sources import read_rows
from smoa_lab.training.loaded_run import inputs, load_run
from tests.support import lab
from tests.support.own_rows import tokenizer_with, write_rows


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=4, training=lab.steps(2))


def test_held_out_rows_are_chosen_by_digest_and_it_is_said(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": f"Is {number} even?", "choices": ["yes", "no"], "label": int(number >= 500)}
        for number in range(1000)
    ]
    config["data"] = {"train": config["data"]["train"], "test": str(write_rows(tmp_path / "test.jsonl", rows))}
    config["data"]["template"] = "alpaca"
    checked = check_config(config)
    with caplog.at_level("WARNING", "smoa_lab"):
        found = load_run(checked).data.rows("test")
    assert len(found) == 400
    assert 150 < sum(int(row.label or 0) for row in found) < 250  # sorted by label, the first 400 have one only
    assert "604 of 1004 test rows are not used; data.test_examples: 1004 takes all" in caplog.text
    assert [row.key for row in found] != sorted(row.key for row in found)  # in the order of the file
    config["data"]["test_examples"] = 1004
    caplog.clear()
    assert inputs(check_config(config))["rows"]["test"] == 1004
    assert "are not used" not in caplog.text


@pytest.mark.parametrize("mark", [";", ",", "\t"])
def test_a_table_has_the_separator_of_its_first_line(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f'prompt{mark}completion\n"a{mark}b"{mark}c, d; e\n'.replace("c, d; e", '"c, d; e"'))
    assert [row for _, row in read_rows(file)] == [{"prompt": f"a{mark}b", "completion": "c, d; e"}]


def test_json_that_is_nested_too_deep_is_a_bad_row_or_file(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000 + "\n"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + deep)
    (_, first), (_, second) = read_rows(tmp_path / "rows.jsonl")
    assert first == {"text": "a"}
    assert isinstance(second, BadRow)
    (tmp_path / "rows.json").write_text(deep)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / "rows.json"))
    turns = json.dumps({"prompt": "a", "choices": deep, "label": 0})
    with pytest.raises(BadRow, match="expected a list"):
        shape(json.loads(turns), "choices")


def test_a_choice_that_is_too_long_keeps_bos_as_training_does() -> None:
    tokenizer = tokenizer_with(None)
    encoder = Encoder(tokenizer, 24)
    encoder.tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    values = {"prompt": "a question of many words, too many", "choices": ["yes", "a long choice, longer"], "label": 0}
    row = shape(values, "choices")
    for found in (*encoder.choices(row), encoder.encode(row)):
        assert found.input_ids[0] == tokenizer.bos_token_id
        assert len(found.input_ids) == 24
    kept = [tokenizer.decode(found.input_ids[1:]) for found in encoder.choices(row)]
    assert kept == ["many words, too manyyes"[-23:], "nya long choice, longer"[-23:]]
