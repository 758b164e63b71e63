"""Reads rows one by one: from JSON lines, JSON, CSV or Parquet files, a folder of them, or a data set of the Hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from smoa.errors import DataError
from smoa_lab.basics.cache import content_of
from smoa_lab.basics.extras import import_package
from smoa_lab.basics.section import Section
from smoa_lab.data.formats import SHOWN, BadRow, excerpt, in_words, names

Placed = tuple[str, dict[str, Any] | BadRow]
"""Where a row is, such as "chats.jsonl, row 12", and the row, or what keeps it from being one."""
Numbered = Iterator[tuple[int, dict[str, Any] | BadRow]]

LARGEST_LIST = 1 << 30
"""Bytes of a JSON list, which is read whole. JSON lines have no limit."""
BATCH = 16
"""Rows of a Parquet file that are decoded at once."""


def read_rows(place: Path) -> Iterator[Placed]:
    """The rows of a file, or of all files in a folder by name. Only one row is held in memory, or one JSON list.

    A row of JSON lines has the number of its line, a row of CSV is counted from the line after the header.

    Raises:
        DataError: a file is missing, of an unknown kind, or can't be opened (at once); or it is empty, or the rest of
            it can't be read (when that place is reached).
    """
    return chain.from_iterable(map(_rows, files_of(place)))


def files_of(place: Path) -> list[Path]:
    """The file itself, or the files of a folder by name.

    Raises:
        DataError: as :func:`read_rows` at once.
    """
    try:
        if not place.expanduser().is_dir():
            return [_checked(place)]
        files = [place / entry.name for entry in sorted(place.expanduser().iterdir()) if _is_data(entry)]
        if not files:
            raise DataError(f"{place}: no file in this folder is one of {', '.join(READERS)}; name a file, or add one")
        return list(map(_checked, files))
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        raise DataError(f"{place}: cannot be read: {_reason(error)}; check the path and its permissions") from error


def _is_data(entry: Path) -> bool:
    return entry.is_file() and not entry.name.startswith(".") and is_of_known_kind(entry)


def _checked(file: Path) -> Path:
    """The file, if it is one of a known kind that can be opened."""
    found = file.expanduser()
    if not found.is_file():
        raise DataError(f"{file}: no such file; give the path of a file or folder that exists")
    if not is_of_known_kind(file) or (file.suffix.lower() == ".gz" and _kind(file) == "parquet"):
        raise DataError(
            f"{file}: cannot read this kind of file; use one of {', '.join(READERS)} (.gz as well, except parquet)"
        )
    found.open("rb").close()
    return file


def is_of_known_kind(file: Path) -> bool:
    """Whether its ending is one that can be read."""
    return _kind(file) in READERS


def _kind(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def _rows(file: Path) -> Iterator[Placed]:
    number = 0
    try:
        for number, row in READERS[_kind(file)](file.expanduser()):
            yield f"{file}, row {number}", row
    except (ValueError, OSError, EOFError, zlib.error) as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"{file}: cannot be read{after}: {_reason(error)}") from error
    if not number:
        raise DataError(f"{file}: has no rows; expected at least one")


def _reason(error: Exception) -> str:
    """What an exception says in one line, with a remedy where it comes from a package that gives none."""
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return f"{error}; the file is damaged, compress it again"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return "".join(sign if sign.isprintable() else " " for sign in reason)


def _json_lines(file: Path) -> Numbered:
    decoder = _Decoder()
    with _open(file) as stream:
        for number, line in enumerate(_texts(stream), start=1):
            if line.isspace():
                continue
            decoder.repeated.clear()
            try:
                yield number, decoder.row(decoder.decode(line), f"line {number}")
            except (ValueError, RecursionError) as error:
                problem = f"line {number} is not JSON ({_of_json(error)}): {excerpt(line.strip())}"
                yield number, BadRow(None, f"{problem}; expected one whole object in each line")


def _json_list(file: Path) -> Numbered:
    with _open(file) as stream:
        content = stream.read(LARGEST_LIST + 1)
    if len(content) > LARGEST_LIST:
        raise ValueError(
            f"is larger than {LARGEST_LIST:,} bytes, too large for one list; write one object in each line, .jsonl"
        )
    text, decoder = "".join(_texts([content])), _Decoder()
    if not text.strip():
        return
    lines = "if there is one object in each line, name the file .jsonl"
    try:
        rows = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        place = getattr(error, "pos", 0)
        around = excerpt(text[place : place + 60]) if place < len(text) else "the file ends within it"
        hint = f"; {lines}" if text.lstrip().startswith("{") else ""
        line = f" at line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"is not JSON{line} ({_of_json(error)}): {around}{hint}") from error
    if not isinstance(rows, list):
        raise ValueError(f"holds {in_words(rows)}, expected a list of objects, [{{…}}, {{…}}]; {lines}")
    yield from ((number, decoder.row(row, f"item {number}")) for number, row in enumerate(rows, start=1))


class _Decoder(json.JSONDecoder):
    """Notices keys that an object has twice: a JSON reader keeps only the last of them."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeated: list[tuple[dict[str, Any], str]] = []

    def row(self, value: object, place: str) -> dict[str, Any] | BadRow:
        """The decoded value, if it is a row; ``place`` is such as "line 3"."""
        for within, key in self.repeated:
            if _holds(value, within):
                return BadRow(repr(key[:SHOWN])[1:-1], f"{place} has this key twice in one object; keep one")
        if isinstance(value, dict):
            return value
        hint = "; a list of rows goes into a .json file" if isinstance(value, list) else ""
        problem = f"{place} is not a JSON object but {in_words(value)}; expected an object with columns{hint}"
        return BadRow(None, problem)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated.append((row, next(key for key in row if keys.count(key) > 1)))
        return row


def _holds(value: object, wanted: object) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is wanted or any(_holds(part, wanted) for part in inside)


def _of_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has thousands of digits"


def _csv_rows(file: Path) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # from 128 KiB: the text of a cell may be long
    with _open(file) as stream:
        lines = csv.reader(_texts(stream), strict=True)  # a quote that is never closed swallows rows otherwise
        try:
            rows = filter(None, lines)  # blank lines are empty
            header = _header(next(rows, []))
            for number, cells in enumerate(rows, start=1):
                yield number, _csv_row(header, cells)
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}; check the quotes around its cells") from error


def _header(columns: list[str]) -> list[str]:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"the header names a column twice: {names(twice)}; rename or delete one")
    return columns


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return BadRow(
        None,
        f"has {len(cells)} cells, expected {len(header)}, one for each column of the header ({names(header)}); "
        "put quotes around a cell that holds commas, quotes or line breaks",
    )


def _parquet_rows(file: Path) -> Numbered:
    parquet = import_package("pyarrow.parquet", "Parquet")
    try:
        with parquet.ParquetFile(file) as table:
            _header(table.schema_arrow.names)
            batches = table.iter_batches(batch_size=BATCH)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except Exception as error:  # pyarrow has a dozen kinds, and not one above them all
        raise ValueError(f"{error}; the file is damaged, write it again") from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    "jsonl": _json_lines,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "json": _json_list,
}


def _open(file: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")


def _texts(pieces: Iterable[bytes]) -> Iterator[str]:
    """The pieces of a file in UTF-8 as text, without the mark that some programs begin it with.

    Raises:
        ValueError: it is in another encoding; the message has the byte and its position.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for piece in chain(pieces, [b""]):
        if not position and (piece[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or 0 in piece[:4]):
            raise ValueError("is in UTF-16 or UTF-32, expected UTF-8; save it as UTF-8")
        start = position - len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            byte, at = error.object[error.start], start + error.start
            raise ValueError(f"byte 0x{byte:02x} at position {at} is not UTF-8; save it as UTF-8") from error
        yield from filter(None, [text if position else text.removeprefix("\ufeff")])
        position += len(piece)


class HubRows(Section):
    """A data set of the Hub: ``name`` is its id, ``config`` one of its configurations, ``split`` and ``test_split``
    two of its splits, ``revision`` a branch or commit."""

    name: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None


def source_values(place: str) -> dict[str, Any]:
    """The keys of a config's ``data`` block for a file, a folder, or the id of a data set of the Hub."""
    return {"train": place} if _is_local(place) else {"hub": {"name": place}}


def _is_local(place: str) -> bool:
    """A path, or what looks like one; a data set's id has one slash and no ending of a file with rows."""
    path = Path(place)
    return path.expanduser().exists() or is_of_known_kind(path) or place.count("/") != 1 or place[0] in "./~"


@dataclass(frozen=True)
class FileSource:
    """A file, or a folder of files. Like :class:`HubSource` it can be read again and again."""

    place: Path

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        return str(self.place)

    def check(self) -> None:
        """Raise DataError if it can be known without reading that there are no rows."""
        files_of(self.place)

    def rows(self) -> Iterator[Placed]:
        """Every row with its place, one at a time."""
        return read_rows(self.place)

    def state(self) -> Any:
        """Plain values that change when the rows change."""
        return [(str(file), content_of(file.expanduser())) for file in files_of(self.place)]


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hub."""

    wanted: HubRows
    split: str

    @property
    def name(self) -> str:
        return f"{self.wanted.name} ({self.split})"

    def check(self) -> None:
        import_package("datasets", "data.hub")

    def rows(self) -> Iterator[Placed]:
        datasets = import_package("datasets", "data.hub")
        wanted = self.wanted
        try:
            stream = datasets.load_dataset(
                wanted.name, wanted.config, split=self.split, revision=wanted.revision, streaming=True
            )
            yield from ((f"{self.name}, row {number}", row) for number, row in enumerate(stream, start=1))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data.hub: cannot read {wanted.name!r}, split {self.split!r}: {error}") from error

    def state(self) -> Any:
        """The commit, so that a data set that changed is read anew."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            commit = HfApi().dataset_info(self.wanted.name, revision=self.wanted.revision).sha
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise DataError(f"data.hub.name: cannot find {self.wanted.name!r} on the Hub: {error}") from error
        return [self.wanted.model_dump(), self.split, commit]


RowSource = FileSource | HubSource
