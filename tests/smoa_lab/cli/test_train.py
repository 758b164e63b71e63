"""`smoa train` on rows: what it prints, and that a damaged file is one clear error."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from smoa_lab import base_models
from smoa_lab.basics.settings import TRUSTED, Trust
from smoa_lab.cli.main import app
from tests.support.lab import ALIKE, MARKED, chats, questions, rows_values, tiny_chat_model, tokenizer_with, write_rows


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Made once."""
    return tiny_chat_model()


@pytest.fixture(autouse=True)
def room(tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a test, whose runs load a tiny model."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_models, "load_weights", lambda wanted: copy.deepcopy(model))
    monkeypatch.setattr(base_models, "load_tokenizer", lambda wanted: tokenizer_with(MARKED))
    model.config.save_pretrained(tmp_path / "base")  # its size decides the learning rate
    monkeypatch.chdir(tmp_path)
    model.config.save_pretrained(tmp_path / "base")
    return tmp_path


def command(room: Path, rows: Path, *options: str, **changes: Any) -> Result:
    """`smoa train` with a config file for the rows."""
    (room / "run.yaml").write_text(yaml.safe_dump(rows_values(room, rows, Path("base"), **changes)))
    return CliRunner().invoke(app, ["train", "run.yaml", *options])


def assert_refused(done: Result, room: Path, expected: str) -> None:
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 1000
    assert not (room / "run").exists()


def test_a_damaged_file_is_one_clear_error_and_leaves_no_run(room: Path) -> None:
    rows = room / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": \n')
    assert_refused(command(room, rows), room, "row 2: is not JSON")


def test_a_cache_that_cannot_be_written_is_told_before_the_model_is_loaded(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(room / "rows.jsonl", chats(20))
    monkeypatch.setenv("SMOA_CACHE", str(rows))
    monkeypatch.setattr(base_models, "load_weights", pytest.fail)
    assert_refused(command(room, rows), room, "Not a directory")


def test_the_result_of_rows_is_printed(room: Path) -> None:
    done = command(room, write_rows(room / "rows.jsonl", chats(20)))
    assert done.exit_code == 0, done.stderr
    for said in ("SFTTrainer: 2 steps in ", "rows  tokens", "perplexity", "The loss changed by "):
        assert said in done.stdout
    again = command(room, room / "rows.jsonl")
    assert again.exit_code == 1
    assert "contains a finished run; choose another training.output_dir" in again.stderr


def test_the_result_of_rows_with_choices_is_printed(room: Path) -> None:
    rows = [*questions(6, "train"), *questions(4, "test")]
    done = command(room, write_rows(room / "rows.jsonl", rows), data={"template": "alpaca"})
    assert done.exit_code == 0, done.stderr
    for said in ("Accuracy changed by ", "Forgotten: ", "accuracy  majority"):
        assert said in done.stdout


def test_answers_are_scored_by_a_function_that_the_command_names(room: Path) -> None:
    (room / "own.py").write_text(ALIKE)
    rows = write_rows(room / "rows.jsonl", chats(20))
    done = command(room, rows, "--metric", "own.py:score")
    assert done.exit_code == 0, done.stderr
    for said in ("perplexity          score", "Score changed by +0."):
        assert said in done.stdout
    assert Trust() == TRUSTED
    (room / "own.py").write_text("def score(answer, row): return 2.5")
    again = CliRunner().invoke(app, ["eval", "run", "--metric", "own.py:score", "--json"])
    assert [json.loads(again.stdout)[stage]["score"] for stage in ("before", "scores")] == [2.5, 2.5]
    assert CliRunner().invoke(app, ["eval", "run", "--metric", ""]).exit_code == 1
    assert "score" not in json.loads(CliRunner().invoke(app, ["eval", "run", "--json"]).stdout)["scores"]
