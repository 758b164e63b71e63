"""Reads rows once, splits them into parts, and caches the tokens of those that are used on disk; training maps them
into memory.

The content of a row decides its part. So the split is the same in every run, and equal rows are in the same part. So
are rows that belong together: those with the same value in the column ``data.group`` or, without it, the same prompt.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers.utils.logging import warning_once

from smoa.errors import DataError
from smoa_lab.basics.files import cache_folder, new_folder, read_stored, write_whole
from smoa_lab.basics.values import portable
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.formats import BadRow, Format, recognize, shape
from smoa_lab.data.row import KEPT, PARTS, Part, Row, row_from_json
from smoa_lab.data.sources import RowSource

logger = logging.getLogger(__name__)

VERSION = 16
"""Of what is cached: raised by whoever changes how rows become tokens, or what is counted of them."""
QUANTILES = {"median": 0.5, "p99": 0.99}
"""The quantiles of the rows' lengths that an account has."""
SHOWN = 10
"""Bad rows that are listed; the rest are counted."""
LOST = {
    "also_held_out": "held-out rows are the same, or belong together with them",
    "dropped": "nothing that is trained is left of them within data.max_length",
    "not_tested": "they name the part test, and data.test is tested instead",
}
"""Why rows are in no part."""
HELD_OUT = {"test": 5, "validation": 10}
"""One of so many different rows is in this part."""
LARGEST_GROUP = 0.1
"""A prompt makes no group if a larger share of all rows has it, as where it is the same in every row."""
Group = str | Literal[False] | None
"""The column that says which rows belong together; None: those with the same prompt; False: none."""


@dataclass(frozen=True)
class Sizes:
    """How many rows of each part are used at most; None is all of them."""

    train: int | None = None
    validation: int = 200
    test: int = 400


def length_summary(lengths: array[int]) -> dict[str, Any]:
    """The shortest and longest, and quantiles; nothing of no rows."""
    if not lengths:
        return {}
    quantiles = {name: int(np.quantile(lengths, share, method="lower")) for name, share in QUANTILES.items()}
    return {"shortest": min(lengths), **quantiles, "longest": max(lengths)}


def require_good_rows(account: dict[str, Any], skip: bool) -> None:
    """Raise DataError that counts the bad rows and lists the first, unless they are to be skipped."""
    if not account["bad"] or skip:
        return
    listed = "\n  ".join(account["faults"])
    rest = f"\n  and {more:,} more" if (more := account["bad"] - len(account["faults"])) else ""
    raise DataError(
        f"{account['bad']:,} bad row{'s' * (account['bad'] > 1)}; nothing is trained until they are fixed, or "
        "data.skip_bad_rows: true leaves them out (shared.data.skip_bad_rows of a study; instead of smoa init, "
        f"smoa train --model … --data … data.skip_bad_rows=true)\n  {listed}{rest}"
    )


def units_of(keys: NDArray[np.uint64], groups: NDArray[np.uint64], largest: float = 1.0) -> NDArray[np.uint64]:
    """The unit of each row, which is never split between two parts: its group, if that has several different rows and
    at most the share ``largest`` of all, else the row itself."""
    known, counts = np.unique(np.unique(np.stack([groups, keys]), axis=1)[0], return_counts=True)
    several = known[(counts > 1) & (counts <= largest * counts.sum())]
    return np.where(np.isin(groups, several), groups, keys)


def passing_over(sizes: Iterable[int], most: int) -> NDArray[np.bool_]:
    """Which units are taken, given their sizes in order: each that still fits into ``most`` rows."""
    taken, fits = 0, list[bool]()
    for size in sizes:
        fits.append(taken + size <= most)
        taken += size * fits[-1]
    return np.array(fits, bool)


def split(
    keys: NDArray[np.uint64], named: Sequence[str], sizes: Sizes, units: NDArray[np.uint64] | None = None
) -> tuple[dict[Part, NDArray[np.int64]], int]:
    """The numbers of the rows of each part, and how many rows are left out because test or validation has an equal row,
    or one of their unit. ``named`` has the part that each row names, or ``""``; ``units`` are :func:`units_of`.

    If no row names the part test, it gets a fifth of the different rows, and validation likewise a tenth: whole units
    in the order of their numbers, which are hashes, and at most ``sizes`` rows, or the smallest unit if none fits. A
    part that has more rows than ``sizes`` keeps those with the lowest numbers; of rows that are named for training, the
    first.
    """
    units, parts = keys if units is None else units, np.array(named, "U10")
    is_held_out = (parts == "test") | (parts == "validation")
    is_free = (parts == "") & ~np.isin(units, units[is_held_out]) & ~np.isin(keys, keys[is_held_out])
    free, counts = np.unique(np.unique(np.stack([units, keys])[:, is_free], axis=1)[0], return_counts=True)
    contents = counts.sum()
    for name, divisor in HELD_OUT.items():
        if name not in named:
            wanted = min(contents // divisor, getattr(sizes, name))
            fits = passing_over(counts.tolist(), wanted)
            if wanted and not fits.any() and len(free) > 1:
                fits[counts.argmin()] = True
            parts[(parts == "") & np.isin(units, free[fits])] = name
            free, counts = free[~fits], counts[~fits]
    parts[parts == ""] = "train"
    chosen: dict[Part, NDArray[np.int64]] = {}
    left_out, taken = 0, np.zeros(len(keys), bool)
    for part in reversed(PARTS):
        is_taken = np.isin(keys, keys[taken]) | np.isin(units, units[taken])
        left_out += int(((parts == part) & is_taken).sum())
        numbers = np.flatnonzero((parts == part) & ~is_taken)
        taken[numbers] = True
        most = getattr(sizes, part)
        if most is not None and len(numbers) > most:
            first = part == "train" and part in named
            numbers = (numbers if first else numbers[np.argsort(units[numbers], kind="stable")])[:most]
        chosen[part] = np.sort(numbers)
    return chosen, left_out


@dataclass(frozen=True)
class PreparedRows:
    """Rows on disk: a data set for each part, with ``input_ids``, ``labels`` and ``row``, the :class:`Row` as JSON.
    Held-out rows also have the fields that were read (``own``), and ``where``."""

    folder: Path
    account: dict[str, Any]

    def part(self, part: Part) -> Any:
        """A ``datasets.Dataset``."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / f"{part}.arrow"))

    def rows(self, part: Part) -> list[Row]:
        stored = self.part(part)
        columns = [name for name in ("row", *KEPT, "group") if name in stored.column_names]
        return [row_from_json(kept.pop("row"), **kept) for kept in stored.select_columns(columns)]


@dataclass
class Reading:
    """What is to be read, and how it is split and encoded.

    The account counts the rows that are used: ``cut`` ones are longer than ``max_length``, ``dropped`` ones have
    nothing to train on within it, ``repeated`` ones equal an earlier row and are kept. ``also_held_out`` ones aren't
    trained on, because test or validation has them. With ``recall`` all rows are in each part, and count once. With
    ``alone`` the test part is ``test`` and nothing else: rows of ``train`` that name that part are left out.
    """

    train: Sequence[RowSource]
    test: Sequence[RowSource]
    format: Format | None
    sizes: Sizes
    encoder: Encoder
    group: Group = False
    recall: bool = False
    alone: bool = False

    def prepare(self) -> PreparedRows:
        """Read, check and tokenize the rows, unless the cache folder has them; bad ones are counted and left out."""
        decided = {
            "version": VERSION,
            "sources": [[source.state() for source in sources] for sources in (self.train, self.test)],
            "format": self.format,
            "sizes": asdict(self.sizes),
            "encoder": self.encoder.state(),
            "how": [self.group, self.recall, self.alone],
        }
        name = sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = cache_folder() / "rows" / name
        if not folder.is_dir():
            with new_folder(folder, keep_existing=True) as temporary:  # of another process that reads the same
                write_whole(temporary / "account.json", json.dumps(self._read_all(temporary), ensure_ascii=False))
        account = read_stored(folder / "account.json")
        for part, number in account["unused"].items():
            every = account["named"][part]
            unused = f"{number} of {every} {part} rows are not used"
            warning_once(logger, f"{unused}; data.{part}_examples: {every} takes all")
        for key, why in LOST.items():
            if number := account.get(key):
                warning_once(logger, f"{number} rows are left out: {why}")
        return PreparedRows(folder, account)

    def _read_all(self, folder: Path) -> dict[str, Any]:
        """Read all sources, split the rows and write the tokens of each part into ``folder``; the account of them."""
        read, faults, not_tested = list[tuple[str, str]](), list[str](), 0
        keys, groups, named = array("Q"), array("Q"), list[str]()
        for part, source in [*(("test", each) for each in self.test), *(("", each) for each in self.train)]:
            for where, values in tqdm(source.rows(), desc=f"reading {source.name}", unit=" rows", disable=None):
                try:
                    row, group = self._shaped(values)
                except DataError as error:
                    faults.append(f"{where}: {error}")
                    continue
                if self.alone and not part and row.part == "test":
                    not_tested += 1
                    continue
                read.append((where, json.dumps(values, default=str)))
                keys.append(row.key)
                groups.append(group)
                named.append(part or row.part or "")
        every, largest = np.array(keys, np.uint64), LARGEST_GROUP if self.group is None else 1.0
        units = units_of(every, np.array(groups, np.uint64), largest)
        chosen, left_out = split(every, named, self.sizes, units)
        if self.recall:
            chosen, left_out = dict.fromkeys(PARTS, np.arange(len(every))[: self.sizes.train]), 0
        used = np.unique(np.concatenate([*chosen.values()]))
        numbers = {part: named.count(part) for part in PARTS if part != "train"}
        cut = {part: number for part, number in numbers.items() if number > getattr(self.sizes, part)}
        return {
            "max_length": self.encoder.max_length,
            "format": self.format or "",
            **self._write(folder, read, chosen, units, faults),
            "repeated": len(used) - len(np.unique(every[used])),
            "also_held_out": left_out,
            "unused": {part: cut[part] - len(chosen[part]) for part in cut if 0 < len(chosen[part]) < cut[part]},
            "named": numbers,
            "bad": len(faults),
            "faults": faults[:SHOWN],
            **({"not_tested": not_tested} if not_tested else {}),
        }

    def _shaped(self, values: dict[str, Any] | BadRow) -> tuple[Row, int]:
        """The row of what was read, and the number of its group; the first one that has a format decides it for all."""
        if isinstance(values, BadRow):
            raise values
        self.format = self.format or recognize(values)
        row = shape(values, self.format)
        if not isinstance(self.group, str):
            return row, row.asked if self.group is None else row.key
        if values.get(self.group) is None or not str(values[self.group]).strip():
            raise DataError(f"has no {self.group}, by which data.group says what belongs together")
        named = json.dumps(values[self.group], sort_keys=True, default=str)
        return row, int(sha256(named.encode()).hexdigest()[:16], 16)

    def _write(
        self,
        folder: Path,
        read: Sequence[tuple[str, str]],
        chosen: Mapping[Part, NDArray[np.int64]],
        units: NDArray[np.uint64],
        faults: list[str],
    ) -> dict[str, Any]:
        """Write the tokens of each part's rows, and their groups; what is counted of them. Adds to the ``faults``."""
        import datasets
        from datasets.arrow_writer import ArrowWriter

        text, integers = datasets.Value("string"), datasets.List(datasets.Value("int32"))
        grouped = () if self.group is False else ("group",)
        tokens = {"input_ids": integers, "labels": integers}
        columns = datasets.Features(tokens | dict.fromkeys(("row", *KEPT, *grouped), text))
        contents, lengths, counts, parts = sha256(), array("I"), Counter[str](), Counter[str]()
        for part in PARTS:
            with ArrowWriter(path=str(folder / f"{part}.arrow"), features=columns) as writer:
                for number in tqdm(chosen[part], desc=f"tokens, {part}", unit=" rows", leave=False, disable=None):
                    where, own = read[number]
                    assert self.format is not None
                    row, is_counted = shape(json.loads(own), self.format), not self.recall or part == "test"
                    try:
                        texts = self.encoder.texts(row, scored=part != "train")
                    except DataError as error:
                        faults += [f"{where}: {error}"] * is_counted
                        continue
                    contents.update(f"{part} {row.to_json()}\n".encode())
                    sizes, trained = [len(each.input_ids) + each.cut for each in texts], texts[0].trained
                    if is_counted:  # with recall each row is in three parts
                        lengths.append(max(sizes))
                        counts.update(total=sizes[0], trained_tokens=trained, dropped=not trained)
                        counts.update(cut=any(each.cut for each in texts))
                    if trained:
                        kept = dict.fromkeys(KEPT, "") if part == "train" else portable({"own": own, "where": where})
                        group = dict.fromkeys(grouped, f"{units[number]:016x}")
                        writer.write({**texts[0].columns, "row": row.to_json(), **kept, **group})
                        parts[part] += 1
                writer.finalize()
        return {
            "sha256": contents.hexdigest(),
            "parts": dict(parts),
            "tokens": {"total": counts["total"], **length_summary(lengths)},
            **{key: counts[key] for key in ("trained_tokens", "cut", "dropped")},
        }
