"""Reads a user's rows once, splits them, and keeps their tokens on disk, from where training maps them into memory.

A row's content decides its part, so a repeated row never lies in two parts, and the split is the same in every run.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from smoa.atomic import check_place, new_folder, write_whole
from smoa.errors import DataError
from smoa_lab.basics.cache import cache_folder
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.files import RowSource
from smoa_lab.data.formats import BadRow, Format, recognize, shape
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


def length_summary(lengths: array[int]) -> dict[str, Any]:
    """Total and quantiles, and how many rows are at most 16, 32, 64, … tokens long and longer than the bound before."""
    if not lengths:
        return {"total": 0, "histogram": []}
    values = np.asarray(lengths)
    doublings = np.ceil(np.log2(np.maximum(values, FIRST) / FIRST)).astype(int)
    counts = np.bincount(doublings).tolist()
    return {
        "total": int(values.sum()),
        "shortest": int(values.min()),
        **{name: int(np.quantile(values, share, method="lower")) for name, share in QUANTILES.items()},
        "longest": int(values.max()),
        "histogram": [[FIRST << number, counts[number]] for number in range(doublings.min(), len(counts))],
    }


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
        from datasets import Dataset

        dataset = Dataset.from_file(str(self.folder / f"{part}.arrow"))
        if at_most is None or len(dataset) <= at_most:
            return dataset
        return dataset.shuffle(seed=seed, keep_in_memory=True).select(range(at_most), keep_in_memory=True)

    def rows(self, part: Part, at_most: int | None = None, seed: int = 0) -> list[Row]:
        """Rows of the part as they were read."""
        return list(map(row_from_json, self.part(part, at_most, seed)["row"]))


@dataclass
class Reading:
    """What is to be read, how it is split and encoded, and what was counted meanwhile.

    ``cut`` rows are longer than ``max_length``; ``dropped`` ones have nothing within it that is trained. ``repeated``
    rows are kept; ``also_in_test`` ones are left out of training.
    """

    train: RowSource
    test: RowSource | None
    format: Format | None
    shares: Shares
    encoder: Encoder

    def __post_init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.lengths = array("I")
        self.counts = dict.fromkeys(("trained_tokens", "cut", "dropped", "repeated", "also_in_test", "bad"), 0)
        self.faults: list[str] = []
        self.held_out: set[int] = set()
        self.seen: set[int] = set()

    def folder(self) -> Path:
        """Where the tokens are kept: named after everything that decides them."""
        encoder, tokenizer = self.encoder, self.encoder.tokenizer
        if not tokenizer.is_fast:
            raise DataError(
                f"model.name: its {type(tokenizer).__name__} cannot tell where in the text its tokens are, which rows "
                "need; use a model with a tokenizer.json, or train on questions"
            )
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
            DataError: a source cannot be read, its format is not recognized, it has no good rows, or the tokenizer
                cannot tell where in the text its tokens are.
        """
        folder = self.folder()
        if not folder.is_dir():
            check_place(folder / "account.json")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    with new_folder(folder) as temporary:
                        account = self._read_all(temporary)
                        write_whole(temporary / "account.json", json.dumps(account, ensure_ascii=False))
        return PreparedRows(folder, json.loads((folder / "account.json").read_text(encoding="utf-8")))

    def _read_all(self, folder: Path) -> dict[str, Any]:
        """Read all sources once and write their rows into ``folder``, part by part; the account of them."""
        import datasets
        from datasets.arrow_writer import ArrowWriter

        integers = datasets.List(datasets.Value("int32"))
        columns = datasets.Features({"input_ids": integers, "labels": integers, "row": datasets.Value("string")})
        counts, length = self.counts, self.encoder.max_length
        with ExitStack() as stack:
            self.writers = {
                part: stack.enter_context(ArrowWriter(path=str(folder / f"{part}.arrow"), features=columns))
                for part in PARTS
            }
            if self.test is not None:
                self._read(self.test, is_test=True)
            self._read(self.train, is_test=False)
            for part in self.writers.values():
                part.finalize()
        return {
            "max_length": length,
            "format": self.format or "",
            "parts": dict(self.parts),
            "tokens": length_summary(self.lengths),
            **counts,
            "faults": self.faults,
        }

    def _read(self, source: RowSource, is_test: bool) -> None:
        """Read a source; the first row that has a format decides it for all."""
        for where, values in tqdm(source.rows(), desc=f"reading {source.name}", unit=" rows", disable=None):
            try:
                if isinstance(values, BadRow):
                    raise values
                self.format = self.format or recognize(values)
                row = shape(values, self.format)
                part = self._part(row, is_test)
                if part is not None:
                    self._write(row, part)
            except DataError as error:
                self.counts["bad"] += 1
                if self.counts["bad"] <= SHOWN:
                    self.faults.append(f"{where}: {error}")

    def _part(self, row: Row, is_test: bool) -> Part | None:
        """Where the row goes; None if the test data have it too."""
        key, shares = row.key, self.shares
        is_held_out = key in self.held_out
        self.counts["repeated"] += key in self.seen and not is_held_out
        self.seen.add(key)
        if is_test:
            self.held_out.add(key)
            return "test"
        if is_held_out:
            self.counts["also_in_test"] += 1
            return None
        return (shares if self.test is None else Shares(shares.validation, 0.0)).part(row.digest)

    def _write(self, row: Row, part: Part) -> None:
        tokens = self.encoder.encode(row)
        self.lengths.append(len(tokens.input_ids) + tokens.cut)
        self.counts["cut"] += tokens.cut > 0
        self.counts["trained_tokens"] += tokens.trained
        if not tokens.trained:
            self.counts["dropped"] += 1
            return
        self.parts[part] += 1
        self.writers[part].write({**tokens.columns, "row": row.to_json()})
