"""Reads rows one by one: from JSON lines, JSON, CSV or Parquet files, a folder of them, a data set of the Hub, or a
named set: one of the Hub whose rows become rows of the formats ``choices`` or ``messages``."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from smoa.errors import DataError
from smoa_lab.basics.files import content_of
from smoa_lab.basics.settings import Section
from smoa_lab.basics.values import first_of, nearest
from smoa_lab.data.formats import BadRow, shown

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


logger = logging.getLogger(__name__)

Placed = tuple[str, dict[str, Any] | BadRow]
"""Where a row is, such as "chats.jsonl, row 12", and the row, or what keeps it from being one."""
Numbered = Iterator[tuple[int, Any]]

PART = re.compile(r"(.*[-_. ])?(train|training|test|testing|validation|valid|val|dev|eval|heldout)([-_. \d].*)?")
"""Names of files of one part, such as the Hub's ``test-00000-of-00001.parquet``."""
BATCH = 16
"""Rows of a Parquet file that are decoded at once."""


def read_rows(place: Path) -> Iterator[Placed]:
    """The rows of a file, or of all files in a folder by name. Only one row is held in memory, or one JSON list.

    A row of JSON lines has the number of its line, a row of CSV is counted from the line after the header. A file that
    can't be opened is a DataError at once, one that can't be read to its end, or is empty, when that place is reached.
    """
    return chain.from_iterable(map(_rows, files_of(place)))


def files_of(place: Path) -> list[Path]:
    """The file itself, or the files of a folder by name."""
    kinds, folder = f"{', '.join(READERS)} (.gz as well, except parquet)", place.expanduser()
    if not folder.exists():
        near = "" if is_of_known_kind(place) else nearest(str(place), [DEMO, *SETS])
        raise DataError(f"{place}: no such file, folder or named set{near or '; give the path of one that exists'}")
    if not folder.is_dir():
        if not is_of_known_kind(place):
            raise DataError(f"{place}: cannot read this kind of file; use one of {kinds}")
        return [place]
    entries = (entry for entry in folder.iterdir() if entry.is_file() and is_of_known_kind(entry))
    files = [place / name for name in sorted(entry.name for entry in entries) if not name.startswith(".")]
    if not files:
        raise DataError(f"{place}: no file in this folder is one of {kinds}; name a file, or add one")
    named = {file.name: found[2] for file in files if (found := PART.fullmatch(file.name.lower()))}
    trained = [name for name, part in named.items() if part.startswith("train")]
    if trained and (others := sorted(named.keys() - {*trained})):
        rule = f"is not named like {trained[0]}, and all files of a folder are used alike"
        remedy = "list the files to train on in data.train and those to hold out in data.test, each with its folder"
        raise DataError(f"{place}: {first_of(others)} {rule}; {remedy}")
    return files


def is_of_known_kind(file: Path) -> bool:
    """Whether its ending is one that can be read."""
    return _kind(file) in READERS


def _kind(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def _rows(file: Path) -> Iterator[Placed]:
    number = 0
    try:
        for number, row in READERS[_kind(file)](file.expanduser()):
            if not isinstance(row, dict | BadRow):
                row = BadRow(None, f"found {shown(row)}, expected an object with columns")
            yield f"{file}, row {number}", row
    except (ValueError, OSError, EOFError, RecursionError, zlib.error, csv.Error) as error:
        rule = "a file has to be whole, in UTF-8 and of the kind that its name says, .jsonl for one object in each line"
        raise DataError(f"{file}: cannot be read after row {number}: {error}; {rule}") from error
    if not number:
        raise DataError(f"{file}: has no rows; expected at least one")


def _json_lines(file: Path) -> Numbered:
    with _open(file, "rb") as stream:
        for number, line in enumerate(map(bytes.strip, stream), start=1):
            if not line:
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                text = shown(line.decode(errors="replace"))
                yield number, BadRow(None, f"is not JSON ({error}): {text}; expected one whole object in each line")


def _json_list(file: Path) -> Numbered:
    with _open(file, "rb") as stream:
        rows = json.load(stream)
    if not isinstance(rows, list):
        raise ValueError(f"found {shown(rows)}, expected a list of objects")
    return enumerate(rows, start=1)


def _csv_rows(file: Path) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # from 128 KiB: the text of a cell may be long
    with _open(file, "rt", encoding="utf-8-sig", newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        mark = max(",;\t", key=first.count)
        # strict: else a quote that is never closed swallows rows
        for number, row in enumerate(csv.DictReader(stream, strict=True, delimiter=mark), start=1):
            if None in row or None in row.values():
                problem = "has more or fewer cells than the header; put quotes around a cell that holds commas"
                yield number, BadRow(None, f"{problem}, quotes or line breaks")
            else:
                yield number, row


def _parquet_rows(file: Path) -> Numbered:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        batches = table.iter_batches(batch_size=BATCH)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS: dict[str, Callable[[Path], Numbered]] = {"jsonl": _json_lines, "csv": _csv_rows}
READERS |= {"parquet": _parquet_rows, "json": _json_list}


def _open(file: Path, mode: str, **options: Any) -> Any:
    return (gzip.open if file.suffix.lower() == ".gz" else open)(file, mode, **options)


class HubRows(Section):
    """A data set of the Hub: ``name`` is its id, ``config`` one of its configurations, ``split`` and ``test_split``
    two of its splits, ``revision`` a branch or commit."""

    name: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class FileSource:
    """A file, or a folder of files. Like :class:`HubSource` it can be read again and again."""

    place: Path
    name: str

    def rows(self) -> Iterator[Placed]:
        return read_rows(self.place)

    def state(self) -> Any:
        """Plain values that change when the rows change."""
        return [(file.name, content_of(file.expanduser())) for file in files_of(self.place)]


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hub. ``parse`` makes a row of ours of one of its rows."""

    wanted: HubRows
    split: str
    parse: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return f"{self.wanted.name} ({self.split})"

    def rows(self) -> Iterator[Placed]:
        import datasets

        wanted, options = self.wanted, {"revision": self.wanted.revision, "streaming": True}
        stream = datasets.load_dataset(wanted.name, wanted.config, split=self.split, **options)
        for number, row in enumerate(stream, start=1):
            try:
                parsed = row if self.parse is None else self.parse(row)
            except (KeyError, ValueError, TypeError) as error:
                parsed = BadRow(None, f"{error!r}; the row has {sorted(row)}")
            yield f"{self.name}, row {number}", parsed

    def state(self) -> Any:
        """The commit, so that a data set that changed is read anew."""
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(self.wanted.name, revision=self.wanted.revision).sha
        return [self.wanted.model_dump(), self.split, commit]


RowSource = FileSource | HubSource


def find_sources(place: str) -> tuple[RowSource, RowSource | None]:
    """The rows of that name, and those that are held out of them: a named set, a file, a folder, or the id of a data
    set of the Hub, which has one slash and no ending of a file with rows."""
    if place == DEMO:
        return FileSource(DEMO_FILE, place), None
    if place in SETS:
        found = SETS[place]
        wanted = HubRows(name=found.path, config=found.config)
        return HubSource(wanted, "train", found.parse), HubSource(wanted, found.test, found.parse)
    path = Path(place)
    is_local = path.expanduser().exists() or is_of_known_kind(path) or place.count("/") != 1 or place[0] in "./~"
    return (FileSource(path, place) if is_local else HubSource(HubRows(name=place), "train")), None
