"""A metric of the user's own: what is loaded, what it is given, and what is refused."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.settings import TRUSTED, Trust
from smoa_lab.data.answers import own_metric
from tests.support.lab import named

PLACE = "rows.jsonl, row 7"


def scored(file: Path, source: str, answer: str = "4", row: object = None) -> float:
    with named(file, source):
        return own_metric().score(answer, json.dumps({"level": 3} if row is None else row), PLACE)


@pytest.mark.parametrize(
    ("returned", "value"),
    [("0.5", 0.5), ("-3", -3.0), ("answer == '4'", 1.0), ("row['level']", 3.0), ("numpy.float32(0.25)", 0.25)],
)
def test_any_finite_number_is_a_score(tmp_path: Path, returned: str, value: float) -> None:
    assert scored(tmp_path / "own.py", f"import numpy\ndef score(answer, row): return {returned}") == value


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return row['answer']", "KeyError: 'answer'"),
        ("return None", "TypeError: float"),
        ("return float('nan')", "ValueError: it returned nan"),
        ("return -float('inf')", "ValueError: it returned -inf"),
    ],
)
def test_a_function_that_fails_or_returns_no_finite_number_names_the_row(
    tmp_path: Path, body: str, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        scored(tmp_path / "own.py", f"def score(answer, row):\n    {body}")
    assert str(caught.value).startswith(f"{PLACE}: --metric {tmp_path / 'own.py'}:score: ")
    assert f"'4': {problem}" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "source", "problem"),
    [
        ("other.py:score", "", r"No such file.*other\.py"),
        ("own.py", "", "--metric own.py: there is no function .*; write it as FILE"),
        ("own.py:score", "def score(answer, row: return 1", "invalid syntax|never closed"),
        ("own.py:score", "import beside_it", "No module named 'beside_it'"),
        ("own.py:scor", "def score(answer, row): return 1", r"there is no function 'scor'; did you mean 'score'\?"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, source: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with named(Path("own.py"), source):
        TRUSTED.metric = place
        with pytest.raises((ConfigError, OSError, SyntaxError, ImportError), match=problem):
            own_metric()


def test_a_function_is_asked_once_for_equal_answers_to_equal_rows_and_prints_beside_the_commands_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "asked = []\ndef score(answer, row):\n    print('asked')\n    row.clear(); asked.append(1)\n"
    with named(tmp_path / "own.py", f"{source}    return len(asked)"):
        values = [own_metric().score(answer, row, PLACE) for answer in "45" for row in ('{"a": 1}', '{"a": 2}') * 2]
    assert values == [1, 2, 1, 2, 3, 4, 3, 4]
    assert capsys.readouterr() == ("", "asked\n" * 4)


def test_its_name_has_no_place_of_this_machine_and_the_digest_of_the_file(tmp_path: Path) -> None:
    with named(tmp_path / "own.py"):
        digest = sha256((tmp_path / "own.py").read_bytes()).hexdigest()
        assert own_metric().name == f"own.py:score {digest}"


def test_dataclasses_in_the_file_work(tmp_path: Path) -> None:
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Kept:\n    n: int\n"
    )
    assert scored(tmp_path / "own.py", f"{source}def score(answer, row): return Kept(int(answer)).n") == 4


def test_where_the_command_names_none_it_is_told_what_to_give() -> None:
    assert Trust() == TRUSTED
    with pytest.raises(ConfigError, match=r"only the command names: give --metric FILE\.py:NAME$"):
        own_metric()
    with pytest.raises(ConfigError, match=r"only the command names: give --metric my own\.py:score$"):
        own_metric("my own.py:score abc")
