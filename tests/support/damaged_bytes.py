"""Files that are damaged below the level of rows: long, cut off, in other encodings, or not what their names say."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

Damaged = tuple[str, bytes, str]
"""File name, content, and a part of the message: the field or the place, and what is wrong or expected."""

USER = {"role": "user", "content": "Do you open on Sundays?"}
ANSWER = {"role": "assistant", "content": "Yes, from eleven to four."}
CHAT = [USER, ANSWER]
LONG = "word " * 2_000_000
"""10 MB of text."""


def json_row(**columns: Any) -> bytes:
    """A good row, if it is one of messages, and one of these columns."""
    good = {"messages": CHAT} if "messages" in columns else {}
    return b"".join(json.dumps(row).encode() + b"\n" for row in (good, columns) if row)


def long_rows() -> Iterator[Damaged]:
    """Rows of 10 MB, compressed so that all the files fit into memory together: the message stays short."""
    turns = [{"role": "user", "content": LONG}, {"role": "asistant", "content": LONG}]
    cases = {
        "role.jsonl": (json_row(messages=turns), "row 2: messages[1].role: found 'asistant', expected system"),
        "text.jsonl": (json_row(messages=LONG), f"row 2: messages: found '{LONG[:40]}'…, expected a list"),
        "cut.jsonl": (json_row(text=LONG)[:-9], "row 1: line 1 is not JSON (Unterminated string starting at)"),
        "cut.json": (
            json.dumps([{"text": LONG}]).encode()[:-9],
            "is not JSON at line 1 column 11 (Unterminated string",
        ),
        "cells.csv": (f'text\n"{LONG}",{LONG}\n'.encode(), "row 1: has 2 cells, expected 1"),
        "quote.csv": (f'text\n"{LONG}'.encode(), "line 2: unexpected end of data; check the quotes"),
        "deep.jsonl": (b'{"messages": ' + b"[" * 10**6, "row 1: line 1 is not JSON (nested too deeply)"),
    }
    for name, content, expected in _files(cases, "gz"):
        yield name, gzip.compress(content, compresslevel=1), expected


def _files(cases: dict[str, tuple[bytes, str]], ending: str) -> Iterator[Damaged]:
    for name, (content, expected) in cases.items():
        yield f"{name}.{ending}", content, expected


def bad_lines() -> Iterator[Damaged]:
    """JSON lines that are not JSON, or not an object."""
    good = json_row(text="Good.")
    cases = {
        "cut": (b'{"text": "a', 'row 2: line 2 is not JSON (Unterminated string starting at): \'{"text": "a\''),
        "words": (b"hello", "row 2: line 2 is not JSON (Expecting value): 'hello'; expected one whole object in each"),
        "single-quotes": (b"{'text': 'a'}", "row 2: line 2 is not JSON (Expecting property name enclosed in double"),
        "two": (b'{"text": "a"} {"text": "b"}', "row 2: line 2 is not JSON (Extra data)"),
        "comma": (b'{"text": "a"},', "row 2: line 2 is not JSON (Extra data)"),
        "list": (b'[{"text": "a"}]', "row 2: line 2 is not a JSON object but a list of 1; expected an object with"),
        "number": (b"3", "row 2: line 2 is not a JSON object but the number 3; expected an object"),
        "null": (b"null", "row 2: line 2 is not a JSON object but null; expected an object"),
        "nan": (b'{"text": NaN}', "row 2: text: found the number nan, expected text"),
        "twice": (b'{"text": "a", "text": "b"}', "row 2: text: line 2 has this key twice in one object; keep one"),
        "digits": (b'{"text": ' + b"1" * 5000 + b"}", "row 2: line 2 is not JSON (a number has thousands of digits)"),
    }
    for name, line, expected in _files(cases, "jsonl"):
        yield name, good + line, expected


def bad_lists() -> Iterator[Damaged]:
    """JSON files that are not a list of objects."""
    cases = {
        "empty-list": (b"[]", "has no rows; expected at least one"),
        "object": (
            b'{"text": "a"}',
            "holds an object with 'text', expected a list of objects, [{…}, {…}]; if there is one",
        ),
        "words": (b"hello", "is not JSON at line 1 column 1 (Expecting value): 'hello'"),
        "cut-list": (b'[{"text": "a"}, {"te', "column 18 (Unterminated string starting at)"),
        "open-list": (b'[{"text": "a"}', "(Expecting ',' delimiter): the file ends within it"),
        "only-open": (b"[", "(Expecting value): the file ends within it"),
        "last-comma": (b'[{"text": "a"}, ]', "(Expecting value): ']'"),
        "no-comma": (b'[{"text": "a"} {"text": "b"}]', "column 16 (Expecting ',' delimiter)"),
        "two-lists": (b'[{"text": "a"}] []', "(Extra data): '[]'"),
        "numbers": (b"[1]", "row 1: item 1 is not a JSON object but the number 1; expected an object"),
        "twice": (b'[{"text": "a", "text": "b"}]', "row 1: text: item 1 has this key twice in one object"),
    }
    yield from _files(cases, "json")


def bad_csv() -> Iterator[Damaged]:
    """CSV files."""
    cases = {
        "header-only": (b"text\n", "has no rows; expected at least one"),
        "many-cells": (b"text,id\na,1\nb,2,3\n", "row 2: has 3 cells, expected 2, one for each column of the header"),
        "few-cells": (b"text,id\na\n", "row 1: has 1 cells, expected 2, one for each column"),
        "twice": (b"text,text\na,b\n", "the header names a column twice: 'text'; rename or delete one"),
        "quote": (b'text\na\n"b\nc\n', "after row 1: line 4: unexpected end of data; check the quotes"),
        "inner-quote": (b'text\n"a"b"\n', "line 2: ',' expected after '\"'; check the quotes"),
        "semicolons": (b"instruction;output\na;b\n", "row 1: found the columns 'instruction;output', expected those"),
        "no-header": (b"What is up?,Nothing.\nWho?,Me.\n", "row 1: found the columns 'What is up?', 'Nothing.', exp"),
        "empty-cell": (b'text,id\n"",1\n', "row 1: text: is blank, expected text"),
        "python": (b"messages\n\"[{'role': 'user'}]\"\n", "row 1: messages: found \"[{'role': 'user'}]\", expected a"),
        "old-mac": (b"text\ra\rb\r", "line 1: new-line character seen in unquoted field"),
    }
    yield from _files(cases, "csv")


def bad_parquet() -> Iterator[Damaged]:
    whole = parquet_table([{"text": "a" * 5000}])
    broken = whole[:100] + bytes(200) + whole[300:]
    yield "words.parquet", b"hello", "cannot be read: "
    yield "cut.parquet", whole[:-20], "the file is damaged, write it again"
    yield "broken.parquet", broken, "the file is damaged, write it again"
    yield "empty.parquet", b"", "cannot be read: Parquet file size is 0 bytes; the file is damaged, write it again"
    yield "no-rows.parquet", parquet_table([]), "has no rows; expected at least one"
    yield "nested.parquet", parquet_table([{"text": [["a"]]}]), "row 1: text: found a list of 1, expected text"
    yield (
        "lists.parquet",
        parquet_table([{"messages": [CHAT]}]),
        "row 1: messages[0]: found a list of 2, expected an object",
    )
    yield (
        "null.parquet",
        parquet_table([{"messages": CHAT}, {"messages": None}]),
        "row 2: messages: found null, expected",
    )
    yield (
        "bytes.parquet",
        parquet_table([{"text": b"a"}]),
        "row 1: text: found a value of the type bytes, expected text",
    )
    partly = [{"messages": CHAT}, {"messages": [{"role": "user"}]}]
    yield "partly.parquet", parquet_table(partly), "row 2: messages[0].content: found null, expected text"


def parquet_table(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def other_bytes() -> Iterator[Damaged]:
    """Other encodings, damaged compression, other kinds of files."""
    line = '{"text": "Café"}\n'
    listed = json.dumps([{"text": "Café"}], ensure_ascii=False)
    for name, text, position in (("jsonl", line, 13), ("json", listed, 14), ("csv", "text\nCafé\n", 8)):
        yield f"latin.{name}", text.encode("latin-1"), f"byte 0xe9 at position {position} is not UTF-8; save it as"
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            yield (
                f"{encoding}.{name}",
                text.encode(encoding),
                "is in UTF-16 or UTF-32, expected UTF-8; save it as UTF-8",
            )
    yield "later.jsonl", b'{"text": "a"}\n' + line.encode("cp1252"), "after row 1: byte 0xe9 at position 27 is not"
    yield "cut.csv", "text\nCafé".encode()[:-1], "byte 0xc3 at position 8 is not UTF-8"
    yield "empty.jsonl", b"", "has no rows; expected at least one"
    yield "blank.jsonl", b"\n\n  \n", "has no rows; expected at least one"
    yield "empty.csv", b"", "has no rows; expected at least one"
    yield "words.jsonl.gz", b"hello", "Not a gzipped file (b'he'); the file is damaged, compress it again"
    packed = gzip.compress(line.encode() * 1000)
    yield "cut.jsonl.gz", packed[:-20], "the file is damaged, compress it again"
    yield "bits.csv.gz", packed[:20] + bytes(9) + packed[29:], "the file is damaged, compress it again"
    yield "latin.json.gz", gzip.compress(listed.encode("latin-1")), "byte 0xe9 at position 14 is not UTF-8"
    yield "table.xlsx", b"PK", "cannot read this kind of file; use one of jsonl, csv, parquet, json"
    yield "data.arrow", b"ARROW1", "cannot read this kind of file; use one of jsonl, csv, parquet, json"
    yield "data.parquet.gz", b"", "cannot read this kind of file; use one of jsonl, csv, parquet, json"
    yield "data", b"", "cannot read this kind of file; use one of jsonl, csv, parquet, json"


KINDS = (long_rows, bad_lines, bad_lists, bad_csv, bad_parquet, other_bytes)
