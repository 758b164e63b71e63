"""Rows on disk: which part a row is in, what is counted, and what a second reading costs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from smoa.errors import ConfigError, DataError
from smoa_lab.data.encoding import Encoder, Tokens
from smoa_lab.data.files import FileSource
from smoa_lab.data.prepared import (
    PreparedRows,
    Reading,
    Shares,
    require_good_rows,
)
from tests.support.own_rows import MARKED, STRICT, chat, chats, tokenizer_with, write_rows
from tests.support.processes import ROOT, environment


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a test."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@dataclass(frozen=True)
class Listed:
    """Rows in a list, and how often they were read."""

    values: list[dict[str, Any]]
    version: int = 0
    reads: list[int] = field(default_factory=list)
    name: str = "listed"

    def check(self) -> None: ...

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.reads.append(1)
        yield from ((f"row {number}", row) for number, row in enumerate(self.values, start=1))

    def state(self) -> Any:
        return [self.version, len(self.values)]


def texts(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"Text number {i}."} for i in range(start, start + number)]


def prepare(train: Any, test: Any = None, template: str | None = MARKED, **changes: Any) -> PreparedRows:
    trained = {key: changes[key] for key in ("assistant_only", "completion_only") if key in changes}
    encoder = Encoder(tokenizer_with(template), changes.get("max_length", 1024), **trained)
    return Reading(train, test, changes.get("format"), changes.get("shares", Shares()), encoder).prepare()


def test_every_row_lies_in_one_part() -> None:
    rows = prepare(Listed(texts(1000)), shares=Shares(validation=0.1, test=0.2))
    parts = rows.account["parts"]
    assert sum(parts.values()) == 1000
    assert parts["validation"] == pytest.approx(100, abs=30)
    assert parts["test"] == pytest.approx(200, abs=40)
    found: list[Any] = [row.completion for part in ("train", "validation", "test") for row in rows.rows(part)]
    assert sorted(found) == sorted(row["text"] for row in texts(1000))


def test_a_row_stays_in_its_part_when_rows_are_added_or_validation_is_asked_for() -> None:
    def held_out(number: int, validation: float) -> set[str]:
        rows = prepare(Listed(texts(number)), shares=Shares(validation, test=0.2))
        return {str(row.completion) for row in rows.rows("test")}

    first = held_out(100, 0.0)
    assert first == held_out(100, 0.3)
    assert first <= held_out(200, 0.0)


def test_a_repeated_row_never_lies_in_two_parts() -> None:
    again = [{"text": f"  TEXT number\t{i}."} for i in range(100)]
    rows = prepare(Listed(texts(100) + again), shares=Shares(validation=0.3, test=0.3))
    digests = [{row.digest for row in rows.rows(part)} for part in ("train", "validation", "test")]
    assert rows.account["repeated"] == 100
    assert sum(map(len, digests)) == len(set.union(*digests)) == 100


def test_training_rows_that_the_test_data_have_are_left_out() -> None:
    rows = prepare(Listed(texts(10)), Listed(texts(5, start=8), name="test"), shares=Shares())
    assert rows.account["parts"] == {"test": 5, "train": 8}
    assert (rows.account["also_in_test"], rows.account["repeated"]) == (2, 0)


def test_labels_and_ids_are_those_of_the_encoder_and_are_cut() -> None:
    encoder = Encoder(tokenizer_with(MARKED), None)
    rows = prepare(Listed(chats(5)), shares=Shares(test=0), max_length=40)
    whole = [encoder.encode(row) for row in rows.rows("train")]
    expected = [Tokens(tokens.input_ids[:40], tokens.labels[:40]) for tokens in whole]
    data = rows.part("train")
    assert data["input_ids"][:] == [tokens.input_ids for tokens in expected]
    assert data["labels"][:] == [tokens.labels for tokens in expected]
    assert rows.account["cut"] == 5


def test_rows_of_which_nothing_trained_is_left_are_dropped() -> None:
    long = {"messages": chat("a" * 500, "Yes.")}
    exactly = {"messages": chat("b" * (100 - 52), "Yes.")}
    rows = prepare(Listed([*chats(3), long, exactly]), shares=Shares(test=0), max_length=100)
    assert rows.account["dropped"] == 1
    assert rows.account["parts"] == {"train": 4}
    assert all(any(label >= 0 for label in labels[1:]) for labels in rows.part("train")["labels"])
    tokenizer = tokenizer_with(None)
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    source: Any = Listed([{"text": "a"}, {"text": "ab"}])  # the only token of a text is never predicted
    account = Reading(source, None, None, Shares(test=0), Encoder(tokenizer, None)).prepare().account
    assert (account["parts"], account["dropped"]) == ({"train": 1}, 1)


def test_where_no_row_is_left_to_train_on_the_reasons_are_counted() -> None:
    account = prepare(Listed(chats(3)), max_length=20).account
    assert (account["parts"], account["dropped"]) == ({}, 3)
    account = prepare(Listed(texts(3)), Listed(texts(3), name="test")).account
    assert (account["parts"], account["also_in_test"]) == ({"test": 3}, 3)


def test_rows_of_another_format_than_the_first_and_those_that_the_template_refuses_are_bad() -> None:
    account = prepare(Listed([*texts(2), *chats(1), {"text": ""}])).account
    assert (account["format"], account["bad"]) == ("text", 2)
    assert account["faults"][0].startswith("row 3: text: is missing, expected in each row of the format text")
    refused = {"messages": chat("Open?", "Yes.", system="Be brief.")}
    account = prepare(Listed([*chats(2), refused, refused]), template=STRICT, shares=Shares(test=0)).account
    assert (account["parts"], account["bad"]) == ({"train": 2}, 2)
    assert account["faults"][0].startswith("row 3: the chat template refuses this row: System role not supported")


def test_rows_are_read_once_and_again_when_anything_changed() -> None:
    source = Listed(texts(4))
    for _ in range(2):
        prepare(source)
    assert len(source.reads) == 1
    changes: list[dict[str, Any]] = [
        {"max_length": 9},
        {"shares": Shares(0.5)},
        {"format": "text"},
        {"template": STRICT},
        {"assistant_only": False},
        {"completion_only": False},
    ]
    for change in changes:
        prepare(source, **change)
    assert len(source.reads) == 1 + len(changes)
    changed = Listed(texts(4), version=1)
    prepare(changed)
    assert len(changed.reads) == 1


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for word in ("good", "evil"):
        write_rows(file, [{"text": word}])
        os.utime(file, ns=(1, 1))
        (row,) = prepare(FileSource(file), shares=Shares(test=0)).rows("train", 1)
        assert row.completion == word
    with file.open("a") as lines:
        lines.write('{"text": \n')
    account = prepare(FileSource(file), shares=Shares(test=0)).account
    assert (account["parts"], account["bad"]) == ({"train": 1}, 1)
    assert account["faults"][0].startswith(f"{file}, row 2: ")


def test_so_many_rows_are_drawn_the_same_ones_each_time() -> None:
    rows = prepare(Listed(texts(50)), shares=Shares(test=0))
    drawn = rows.part("train", 7, seed=3)
    assert len(drawn) == 7
    assert drawn["row"][:] == rows.part("train", 7, seed=3)["row"][:]
    assert drawn["row"][:] != rows.part("train", 7, seed=4)["row"][:]
    assert len(rows.part("train", 51)) == 50
    assert len(rows.part("test")) == len(rows.part("train", 0)) == 0


def test_a_reading_that_fails_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(Listed(texts(3)))
    monkeypatch.undo()
    monkeypatch.setenv("SMOA_CACHE", str(cache.parent))
    with pytest.raises(ConfigError, match="has no chat template"):
        prepare(Listed(chats(2)), template=None)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_tokenizer_that_knows_no_places_in_the_text_is_refused() -> None:
    source: Any = Listed(texts(2))
    with pytest.raises(DataError, match=r"^model\.name: its ByT5Tokenizer cannot tell where .* a tokenizer\.json, or"):
        Reading(source, None, None, Shares(), Encoder(ByT5Tokenizer())).prepare()


def test_bad_rows_are_counted_and_the_first_are_listed_unless_they_may_be_skipped() -> None:
    rows = prepare(Listed([*texts(2), *({"text": ""} for _ in range(1234))]), shares=Shares(test=0))
    with pytest.raises(DataError) as caught:
        require_good_rows(rows.account, skip=False)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("1,234 bad rows; ")
    assert "data.skip_bad_rows: true" in lines[0]
    assert lines[1] == "  row 3: text: is blank, expected text"
    assert lines[-1] == "  and 1,224 more"
    assert len(lines) == 12
    require_good_rows(rows.account, skip=True)
    require_good_rows(prepare(Listed(texts(2))).account, skip=False)


MEMORY = """
import resource, sys
from pathlib import Path
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.files import FileSource
from smoa_lab.data.prepared import Reading, Shares
from tests.support.own_rows import tokenizer_with

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def prepare(file):
    Reading(FileSource(Path(file)), None, None, Shares(), Encoder(tokenizer_with(None), None)).prepare()
    return peak()

print(prepare(sys.argv[1]), prepare(sys.argv[2]))
"""


@pytest.mark.slow  # a process that imports everything, and 7,200 long rows
def test_the_memory_does_not_grow_with_the_file(tmp_path: Path, cache: Path) -> None:
    """The tokens of the second file would take 100 MiB."""
    numbers = {"few.jsonl": 1200, "many.jsonl": 6000}
    files = [
        write_rows(tmp_path / name, [{"text": f"{i} " + "word " * 200} for i in range(numbers[name])])
        for name in numbers
    ]
    command = [sys.executable, "-c", MEMORY, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 40, f"{few} MiB before, {many} MiB after"
