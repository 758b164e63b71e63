"""Reads rows once, splits them, and keeps their tokens on disk, from where training maps them into memory.

A row's content decides its part, so a repeated row never lies in two parts, and the split is the same in every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from smoa.atomic import check_place, new_folder, write_whole
from smoa.errors import DataError
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.extras import import_package
from smoa_lab.rows.faults import BadRow, Fault
from smoa_lab.rows.formats import Example, Format, recognise, shape, unrecognised
from smoa_lab.rows.plain_examples import content_digest, plain_example, read_examples
from smoa_lab.rows.sources import Source
from smoa_lab.tokens.account import RowsAccount
from smoa_lab.tokens.encoding import RowEncoder

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")

# Raised whenever the tokens of a row or the account of all would change, so that no stale ones are used.
VERSION = 3


@dataclass(frozen=True)
class Shares:
    """Which share of the rows is held out for validation and, without a test source, for the test."""

    validation: float = 0.0
    test: float = 0.05

    def part(self, digest: str) -> Part:
        """The part of a row, by the beginning of its digest, which is as good as drawn at random."""
        place = int(digest[:12], 16) / 16**12
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


@dataclass(frozen=True)
class RowsWanted:
    """What is to be read, and how."""

    train: Source
    test: Source | None
    format: Format | None
    shares: Shares
    max_length: int | None

    def folder(self, encoder: RowEncoder) -> Path:
        """Where the tokens are kept: named after everything that decides them."""
        tokenizer: Any = encoder.tokenizer
        decided = {
            "version": VERSION,
            "sources": [source.state() for source in (self.train, self.test) if source is not None],
            "format": self.format,
            "shares": asdict(self.shares),
            "max_length": self.max_length,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "template": [tokenizer.chat_template, encoder.template, encoder.assistant_only, encoder.completion_only],
            "special": tokenizer.special_tokens_map,
        }
        name = sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return cache_folder() / "rows" / name


@dataclass(frozen=True)
class PreparedRows:
    """Rows on disk: one data set for each part, with ``input_ids``, ``labels`` and ``example``, a row as JSON."""

    folder: Path
    account: dict[str, Any]

    def part(self, part: Part, at_most: int | None = None, seed: int = 0) -> Any:
        """A ``datasets.Dataset``, of ``at_most`` rows drawn at random."""
        dataset = import_package("datasets", "data.train").Dataset.from_file(str(self.folder / f"{part}.arrow"))
        if at_most is None or len(dataset) <= at_most:
            return dataset
        return dataset.shuffle(seed=seed, keep_in_memory=True).select(range(at_most), keep_in_memory=True)

    def examples(self, part: Part, at_most: int) -> list[Example]:
        """Rows of the part as they were read."""
        return read_examples(self.part(part, at_most)["example"])


def prepare_rows(wanted: RowsWanted, encoder: RowEncoder) -> PreparedRows:
    """Read, check and tokenize all rows, unless the cache folder has them; bad ones are counted and left out.

    Raises:
        DataError: a source cannot be read, its format is not recognised, or it has no good rows.
    """
    folder = wanted.folder(encoder)
    locks = import_package("filelock", "data.train")
    if folder.is_dir():
        return _prepared(folder)
    check_place(folder / "account.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with new_folder(folder) as temporary:
                account = _Reading(wanted, encoder, temporary).read()
                write_whole(temporary / "account.json", json.dumps(account.plain(), ensure_ascii=False))
    return _prepared(folder)


def _prepared(folder: Path) -> PreparedRows:
    return PreparedRows(folder, json.loads((folder / "account.json").read_text(encoding="utf-8")))


class _Reading:
    """One pass over the rows, which writes them out part by part."""

    def __init__(self, wanted: RowsWanted, encoder: RowEncoder, folder: Path) -> None:
        self.wanted, self.encoder, self.folder = wanted, encoder, folder
        self.format = wanted.format
        self.account = RowsAccount(wanted.max_length)
        self.held_out: set[int] = set()
        self.seen: set[int] = set()

    def read(self) -> RowsAccount:
        writers = import_package("datasets.arrow_writer", "data.train")
        features = row_features()
        with ExitStack() as stack:
            self.writers = {
                part: stack.enter_context(
                    writers.ArrowWriter(path=str(self.folder / f"{part}.arrow"), features=features)
                )
                for part in PARTS
            }
            if self.wanted.test is not None:
                self._read(self.wanted.test, "test")
            self._read(self.wanted.train, None)
            for writer in self.writers.values():
                writer.finalize()
        if not self.account.parts["train"] and not self.account.bad:
            found = self.account
            raise DataError(
                f"{self.wanted.train.name}: leaves no rows to train on: {found.also_in_test} are in the test data too, "
                f"{found.dropped} have nothing trained within {found.max_length} tokens, "
                f"{found.parts['test']} are held out"
            )
        return self.account

    def _read(self, source: Source, fixed: Part | None) -> None:
        for where, example in self._examples(source):
            digest = content_digest(example)
            self._count_again(int(digest[:16], 16), fixed)
            part = fixed or (self.wanted.shares.part(digest) if self.wanted.test is None else self._apart(digest))
            if part is not None:
                self._write(where, example, part)

    def _count_again(self, key: int, fixed: Part | None) -> None:
        self.account.repeated += key in self.seen and key not in self.held_out
        self.seen.add(key)
        if fixed == "test":
            self.held_out.add(key)

    def _apart(self, digest: str) -> Part | None:
        """The part of a training row beside a test file; none if the test file has it too."""
        if int(digest[:16], 16) in self.held_out:
            self.account.also_in_test += 1
            return None
        return Shares(self.wanted.shares.validation, 0.0).part(digest)

    def _write(self, where: str, example: Example, part: Part) -> None:
        try:
            tokens = self.encoder.encode(example)
        except DataError as error:
            self.account.add_bad(f"{where}: {error}")
            return
        within = tokens.cut(self.wanted.max_length)
        if self.account.add(len(tokens.input_ids), within.trained):
            self.account.parts[part] += 1
            row = {"input_ids": within.input_ids, "labels": within.labels}
            self.writers[part].write({**row, "example": json.dumps(plain_example(example))})

    def _examples(self, source: Source) -> Iterator[tuple[str, Example]]:
        for where, row in tqdm(source.rows(), desc=f"reading {source.name}", unit=" rows", disable=None):
            try:
                example = self._example(row)
            except BadRow as error:
                self.account.add_bad(f"{where}: {error}")
            else:
                self.account.formats[str(self.format)] += 1
                yield where, example

    def _example(self, row: dict[str, Any] | Fault) -> Example:
        """The first row that has a format decides it for all; raises BadRow."""
        if isinstance(row, Fault):
            raise BadRow(row)
        self.format = self.format or recognise(row)
        if self.format is None:
            raise BadRow(unrecognised(row))
        return shape(row, self.format)


def row_features() -> Any:
    """The columns on disk."""
    datasets = import_package("datasets", "data.train")
    integers = datasets.List(datasets.Value("int32"))
    return datasets.Features({"input_ids": integers, "labels": integers, "example": datasets.Value("string")})
