"""Reads a user's rows once, splits them, and keeps their tokens on disk, from where training maps them into memory.

A row's content decides its part, so a repeated row never lies in two parts, and the split is the same in every run.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from smoa.atomic import check_place, new_folder, write_whole
from smoa.errors import DataError
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.extras import import_package
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.files import RowSource
from smoa_lab.data.formats import BadRow, Format, recognise, shape, unrecognised
from smoa_lab.data.rows import Row, row_from_json

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
VERSION = 4
"""Raised whenever the tokens of a row or the account of all would change, so that no stale ones are used."""
FIRST = 16
"""Tokens: the bound of the shortest rows in a histogram."""
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
"""The quantiles of the rows' lengths that an account has."""
SHOWN = 10
"""Bad rows that are listed; the rest are counted."""


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


@dataclass
class RowsAccount:
    """What one reading found. ``cut`` rows are longer than ``max_length``; ``dropped`` ones have nothing within it that
    is trained. ``repeated`` rows are kept; ``also_in_test`` ones are left out of training."""

    max_length: int | None
    formats: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    repeated: int = 0
    also_in_test: int = 0
    bad: int = 0
    faults: list[str] = field(default_factory=list)

    def add_bad(self, text: str) -> None:
        """Count a bad row, and keep its text if it is among the first."""
        self.bad += 1
        if len(self.faults) < SHOWN:
            self.faults.append(text)

    def plain(self) -> dict[str, Any]:
        """The account as values that JSON has."""
        return {
            "max_length": self.max_length,
            "format": ", ".join(self.formats),
            "parts": dict(self.parts),
            "tokens": length_summary(self.lengths),
            "trained_tokens": self.trained,
            **{name: getattr(self, name) for name in ("cut", "dropped", "repeated", "also_in_test", "bad", "faults")},
        }


def length_summary(lengths: array[int]) -> dict[str, Any]:
    """Total and quantiles, and how many rows are at most 16, 32, 64, … tokens long and longer than the bound before."""
    if not lengths:
        return {"total": 0, "histogram": []}
    order = sorted(lengths)
    bounds = [FIRST]
    while bounds[-1] < order[-1]:
        bounds.append(2 * bounds[-1])
    places = Counter(bisect_left(bounds, length) for length in order)
    quantile = {name: order[int(share * (len(order) - 1))] for name, share in QUANTILES.items()}
    return {
        "total": sum(order),
        "shortest": order[0],
        **quantile,
        "longest": order[-1],
        "histogram": [[bound, places[number]] for number, bound in enumerate(bounds)][min(places) :],
    }


def histogram_lines(histogram: list[list[int]]) -> list[str]:
    """A bar for each range of lengths: ``  17–32  ████  12``."""
    most = max(count for _, count in histogram)
    lows = [bound // 2 + 1 if bound > FIRST else 1 for bound, _ in histogram]
    return [
        f"{f'{low}–{bound}':>13}  {'█' * round(40 * count / most):40}  {count:,}"
        for low, (bound, count) in zip(lows, histogram, strict=True)
    ]


def require_good_rows(account: dict[str, Any], skip: bool) -> None:
    """Raise DataError that counts the bad rows and lists the first, unless they are to be skipped."""
    if not account["bad"] or skip:
        return
    listed = "\n  ".join(account["faults"])
    more = account["bad"] - len(account["faults"])
    raise DataError(
        f"{account['bad']:,} bad row{'s' * (account['bad'] > 1)}; nothing is trained until they are mended, or "
        f"data.skip_bad_rows: true leaves them out\n  {listed}" + (f"\n  and {more:,} more" if more else "")
    )


@dataclass(frozen=True)
class PreparedRows:
    """Rows on disk: one data set for each part, with ``input_ids``, ``labels`` and ``row``, a row as JSON."""

    folder: Path
    account: dict[str, Any]

    def part(self, part: Part, at_most: int | None = None, seed: int = 0) -> Any:
        """A ``datasets.Dataset``, of ``at_most`` rows drawn at random."""
        dataset = import_package("datasets", "data.train").Dataset.from_file(str(self.folder / f"{part}.arrow"))
        if at_most is None or len(dataset) <= at_most:
            return dataset
        return dataset.shuffle(seed=seed, keep_in_memory=True).select(range(at_most), keep_in_memory=True)

    def rows(self, part: Part, at_most: int | None = None, seed: int = 0) -> list[Row]:
        """Rows of the part as they were read."""
        return list(map(row_from_json, self.part(part, at_most, seed)["row"]))


@dataclass(frozen=True)
class Reading:
    """What is to be read, and how it is split and encoded."""

    train: RowSource
    test: RowSource | None
    format: Format | None
    shares: Shares
    encoder: Encoder

    def folder(self) -> Path:
        """Where the tokens are kept: named after everything that decides them."""
        encoder, tokenizer = self.encoder, self._tokenizer()
        decided = {
            "version": VERSION,
            "sources": [source.state() for source in (self.train, self.test) if source is not None],
            "format": self.format,
            "shares": asdict(self.shares),
            "max_length": encoder.max_length,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "template": [
                *(tokenizer.chat_template, encoder.marked_template, encoder.assistant_only, encoder.completion_only)
            ],
            "special": tokenizer.special_tokens_map,
        }
        name = sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return cache_folder() / "rows" / name

    def prepare(self) -> PreparedRows:
        """Read, check and tokenize all rows, unless the cache folder has them; bad ones are counted and left out.

        Raises:
            DataError: a source cannot be read, its format is not recognised, it has no good rows, or the tokenizer
                cannot tell where in the text its tokens are.
        """
        folder = self.folder()
        locks = import_package("filelock", "data.train")
        if not folder.is_dir():
            check_place(folder / "account.json")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locks.FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    with new_folder(folder) as temporary:
                        account = _Pass(self, temporary).read()
                        write_whole(temporary / "account.json", json.dumps(account.plain(), ensure_ascii=False))
        return PreparedRows(folder, json.loads((folder / "account.json").read_text(encoding="utf-8")))

    def _tokenizer(self) -> Any:
        tokenizer = self.encoder.tokenizer
        if not tokenizer.is_fast:
            raise DataError(
                f"model.name: its {type(tokenizer).__name__} cannot tell where in the text its tokens are, which rows "
                "need; use a model with a tokenizer.json, or train on questions"
            )
        return tokenizer


class _Pass:
    """One pass over the rows, which writes them out part by part."""

    def __init__(self, wanted: Reading, folder: Path) -> None:
        self.wanted, self.folder = wanted, folder
        self.format = wanted.format
        self.account = RowsAccount(wanted.encoder.max_length)
        self.held_out: set[int] = set()
        self.seen: set[int] = set()

    def read(self) -> RowsAccount:
        writers = import_package("datasets.arrow_writer", "data.train")
        account, test = self.account, self.wanted.test
        with ExitStack() as stack:
            self.writers = {
                part: stack.enter_context(
                    writers.ArrowWriter(path=str(self.folder / f"{part}.arrow"), features=row_features())
                )
                for part in PARTS
            }
            if test is not None:
                self._read(test, "test")
            self._read(self.wanted.train, None)
            for writer in self.writers.values():
                writer.finalize()
        if not account.parts["train"] and not account.bad:
            raise DataError(
                f"{self.wanted.train.name}: leaves no rows to train on: {account.also_in_test} are in the test data "
                f"too, {account.dropped} have nothing trained within {account.max_length} tokens, "
                f"{account.parts['test']} are held out"
            )
        return account

    def _read(self, source: RowSource, fixed: Part | None) -> None:
        shares = self.wanted.shares if self.wanted.test is None else Shares(self.wanted.shares.validation, 0.0)
        for where, row in self._rows(source):
            key = int(row.digest[:16], 16)
            is_held_out = key in self.held_out
            self.account.repeated += key in self.seen and not is_held_out
            self.seen.add(key)
            if fixed == "test":
                self.held_out.add(key)
            elif is_held_out:
                self.account.also_in_test += 1
                continue
            self._write(where, row, fixed or shares.part(row.digest))

    def _write(self, where: str, row: Row, part: Part) -> None:
        try:
            tokens = self.wanted.encoder.encode(row)
        except DataError as error:
            self.account.add_bad(f"{where}: {error}")
            return
        self.account.lengths.append(len(tokens.input_ids) + tokens.cut)
        self.account.cut += tokens.cut > 0
        self.account.trained += tokens.trained
        if not tokens.trained:
            self.account.dropped += 1
            return
        self.account.parts[part] += 1
        self.writers[part].write({**tokens.columns, "row": row.to_json()})

    def _rows(self, source: RowSource) -> Iterator[tuple[str, Row]]:
        """The good rows; the first one that has a format decides it for all."""
        for where, values in tqdm(source.rows(), desc=f"reading {source.name}", unit=" rows", disable=None):
            try:
                if isinstance(values, BadRow):
                    raise values
                self.format = self.format or recognise(values)
                if self.format is None:
                    raise unrecognised(values)
                row = shape(values, self.format)
            except BadRow as error:
                self.account.add_bad(f"{where}: {error}")
            else:
                self.account.formats[str(self.format)] += 1
                yield where, row


def row_features() -> Any:
    """The columns on disk."""
    datasets = import_package("datasets", "data.train")
    integers = datasets.List(datasets.Value("int32"))
    return datasets.Features({"input_ids": integers, "labels": integers, "row": datasets.Value("string")})
