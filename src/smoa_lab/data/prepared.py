"""Reads rows once, splits them, and keeps the tokens of those that are used on disk, from where training maps them into
memory.

A row's content decides its part, so a repeated row never lies in two parts, and the split is the same in every run.
Nor do rows that belong together: those of one value of ``data.group``, or else of one prompt.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers.utils.logging import warning_once

from smoa.atomic import write_whole
from smoa.errors import DataError
from smoa_lab.basics.folders import cache_folder, new_folder, read_stored
from smoa_lab.basics.plain import portable
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.formats import BadRow, Format, recognize, shape
from smoa_lab.data.row import KEPT, PARTS, Part, Row, row_from_json
from smoa_lab.data.sources import RowSource

logger = logging.getLogger(__name__)

VERSION = 14
"""Raised whenever the tokens of a row or the account of all would change, so that no stale ones are used."""
LONG = 1000
"""More rows than these are announced: the tokens of long conversations may take half a minute."""
FIRST = 16
"""Tokens: the bound of the shortest rows in a histogram."""
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
"""The quantiles of the rows' lengths that an account has."""
SHOWN = 10
"""Bad rows that are listed; the rest are counted."""
LOST = {
    "also_held_out": "held-out rows are the same, or belong together with them",
    "dropped": "nothing that is trained is left of them within data.max_length",
    "not_tested": "they name the part test, and data.test is tested instead",
}
"""Why rows are in no part."""
ALONE = "-alone"
"""Ends the folder of rows of which ``data.test`` alone are tested."""
HELD_OUT = {"test": 5, "validation": 10}
"""Of so many different rows one is held out."""
FEWEST_GROUPS, LARGEST_GROUP = 10, 0.1
"""A part with fewer prompts than these counts its rows, and so does a prompt with a larger share of all rows: a
prompt that is the same everywhere makes no group."""
Group = str | Literal[False] | None
"""The column that says which rows belong together; None: those of one prompt do; False: each stands for itself."""


@dataclass(frozen=True)
class Sizes:
    """How many rows of each part are used at most; None is all of them."""

    train: int | None = None
    validation: int = 200
    test: int = 400


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


def mean_length(account: Mapping[str, Any]) -> float:
    """How many tokens a row has on average, as far as they are not cut."""
    mean = account["tokens"]["total"] / max(1, sum(rows for _, rows in account["tokens"]["histogram"]))
    return float(min(mean, account.get("max_length") or mean))


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
    """By what each row is split: the number of its group if that has several contents, and at most such a share of
    all, else its own key."""
    known, counts = np.unique(np.unique(np.stack([groups, keys]), axis=1)[0], return_counts=True)
    several = known[(counts > 1) & (counts <= largest * counts.sum())]
    return np.where(np.isin(groups, several), groups, keys)


def passing_over(sizes: Iterable[int], most: int) -> NDArray[np.bool_]:
    """Which of them are taken, in their order: those that are at most so many together; a larger one is passed over."""
    taken, fits = 0, list[bool]()
    for size in sizes:
        fits.append(taken + size <= most)
        taken += size * fits[-1]
    return np.array(fits, bool)


def split(
    keys: NDArray[np.uint64], named: Sequence[str], sizes: Sizes, units: NDArray[np.uint64] | None = None
) -> tuple[dict[Part, NDArray[np.int64]], int]:
    """The numbers of the rows of each part, and how many rows are left out because an earlier part has their content,
    or rows of their unit. ``named`` has the part that each row names, or ``""``; ``units`` are :func:`units_of`.

    Of test and validation, the one that no row names gets a fifth, or a tenth, of the other contents, those of the
    units with the lowest numbers, at most as many as ``sizes`` says, or the smallest unit if none is that small. No
    unit lies in two parts: test comes first, then validation. Where there are more rows than wanted, those of the
    lowest numbers are taken, but of rows that are named for training the first ones. A unit of several contents that
    does not fit as a whole is passed over; if none fits, the first is cut.
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
            order = numbers if first else numbers[np.argsort(units[numbers], kind="stable")]
            lots, is_single = np.unique(units[order], return_inverse=True)[1], units[order] == keys[order]
            lots[is_single] = len(lots) + np.arange(is_single.sum())  # each row by itself
            _, places, counts = np.unique(lots, return_index=True, return_counts=True)
            starts = np.argsort(places)
            fits = passing_over(counts[starts].tolist(), most)
            kept = lots[places[starts]][fits if fits.any() else slice(1)]
            numbers = order[np.isin(lots, kept)][:most]
        chosen[part] = np.sort(numbers)
    return chosen, left_out


@dataclass(frozen=True)
class PreparedRows:
    """Rows on disk: one data set for each part, with ``input_ids``, ``labels`` and ``row``, a row as JSON; where it is
    held out, also the fields that it was read with."""

    folder: Path
    account: dict[str, Any]

    @property
    def name(self) -> str:
        """Another wherever the tokens of a row may be others."""
        return self.folder.name if self.account.get("not_tested") else self.folder.name.removesuffix(ALONE)

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

    An account counts rows, each as long as the longest of its texts: ``cut`` ones are longer than ``max_length``;
    ``dropped`` ones have a text without anything within it that is trained; ``repeated`` ones are kept;
    ``also_held_out`` ones are left out of training. Rows that are not used, because fewer are wanted, are in none of
    these numbers. With ``recall`` each row counts once. If ``test`` is ``alone`` what is tested, rows of ``train`` that
    name that part are in none.
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
            **({} if self.group is False else {"group": self.group}),
            **({"recall": True} if self.recall else {}),
        }
        name = sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = cache_folder() / "rows" / (name + ALONE * self.alone)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    with new_folder(folder) as temporary:
                        account = self._read_all(temporary)
                        write_whole(temporary / "account.json", json.dumps(account, ensure_ascii=False))
        account = read_stored(folder / "account.json")
        for part, number in account["unused"].items():
            every = account["named"][part]
            warning_once(
                logger, f"{number} of {every} {part} rows are not used; data.{part}_examples: {every} takes all"
            )
        if told := account.get("ungrouped"):
            warning_once(logger, told)
        for key, why in LOST.items():
            if number := account.get(key):
                warning_once(logger, f"{number} rows are left out: {why}")
        return PreparedRows(folder, account)

    def _read_all(self, folder: Path) -> dict[str, Any]:
        """Read all sources, split the rows and write the tokens of each part into ``folder``; the account of them."""
        import datasets
        from datasets.arrow_writer import ArrowWriter

        text = datasets.Value("string")
        self.keys, self.groups, self.named, self.faults, self.bad = array("Q"), array("Q"), list[str](), list[str](), 0
        self.not_tested = 0
        read = folder / "read.arrow"
        with ArrowWriter(path=str(read), features=datasets.Features(dict.fromkeys(KEPT, text))) as writer:
            for part, sources in (("test", self.test), ("", self.train)):
                for source in sources:
                    self._read(source, part, writer)
            writer.finalize()
        keys = np.array(self.keys, np.uint64)
        units, chosen, left_out, ungrouped = self._split(keys)
        rows = datasets.Dataset.from_file(str(read))
        self.lengths, self.total, self.contents = array("I"), 0, sha256()
        self.counts = dict.fromkeys(("trained_tokens", "cut", "dropped"), 0)
        integers = datasets.List(datasets.Value("int32"))
        tokens = {"input_ids": integers, "labels": integers}
        grouped = () if self.group is False else ("group",)
        columns = datasets.Features(tokens | dict.fromkeys(("row", *KEPT, *grouped), text))
        parts = dict[str, int]()
        named = {part: self.named.count(part) for part in PARTS if part != "train"}
        cut = {part: number for part, number in named.items() if number > getattr(self.sizes, part)}
        unused = {part: cut[part] - len(chosen[part]) for part in cut if 0 < len(chosen[part]) < cut[part]}
        used = np.unique(np.concatenate([*chosen.values()]))
        if len(used) > LONG:
            logger.info("Making tokens of %d rows", len(used))
        for part in PARTS:
            with ArrowWriter(path=str(folder / f"{part}.arrow"), features=columns) as writer:
                bar = tqdm(chosen[part], desc=f"tokens, {part}", unit=" rows", leave=False, disable=None)
                written = sum(
                    self._encode(rows[int(number)], part, writer, dict.fromkeys(grouped, f"{units[number]:016x}"))
                    for number in bar
                )
                parts |= {part: written} if written else {}
                writer.finalize()
        del rows
        read.unlink()
        return {
            "max_length": self.encoder.max_length,
            "format": self.format or "",
            "sha256": self.contents.hexdigest(),
            "parts": parts,
            "tokens": {**length_summary(self.lengths), "total": self.total},
            **self.counts,
            "repeated": len(used) - len(np.unique(keys[used])),
            "also_held_out": left_out,
            "unused": unused,
            "named": named,
            "bad": self.bad,
            "faults": self.faults,
            **({"ungrouped": ungrouped} if ungrouped else {}),
            **({"not_tested": self.not_tested} if self.not_tested else {}),
        }

    def _split(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], dict[Part, NDArray[np.int64]], int, str]:
        """By what each row is split, and into which part, how many are left out, and why prompts make no groups."""
        groups = np.array(self.groups, np.uint64)
        whole = units_of(keys, groups)
        units = whole if self.group is not None else units_of(keys, groups, LARGEST_GROUP)
        told = "" if (units == whole).all() else f"a prompt has more than {LARGEST_GROUP:.0%} of all rows"
        chosen, left_out = split(keys, self.named, self.sizes, units)
        if self.recall:
            chosen, left_out = dict.fromkeys(PARTS, np.arange(len(keys))[: self.sizes.train]), 0
        held_out: tuple[Part, ...] = ("test", "validation")
        for part in held_out if self.group is None and not self.recall else ():
            own = units[chosen[part]]
            if len(np.unique(own)) < FEWEST_GROUPS and (own != keys[chosen[part]]).any():
                told, units = f"the {part} part has fewer than {FEWEST_GROUPS} prompts", keys
                chosen, left_out = split(keys, self.named, self.sizes, units)
                break
        told = told and f"{told}: its rows count by themselves; where rows belong together, name a column: data.group"
        return units, chosen, left_out, told

    def _read(self, source: RowSource, part: str, writer: Any) -> None:
        """Read a source; the first row that has a format decides it for all."""
        for where, values in tqdm(source.rows(), desc=f"reading {source.name}", unit=" rows", disable=None):
            try:
                if isinstance(values, BadRow):
                    raise values
                self.format = self.format or recognize(values)
                row = shape(values, self.format)
                if str(values.get("split")).lower() in PARTS and row.part is None:
                    warning_once(
                        logger, "the column split is not read: call it part, and rows are in the parts that it names"
                    )
                group = row.asked if self.group is None else row.key
                if isinstance(self.group, str):
                    if values.get(self.group) is None or not str(values[self.group]).strip():
                        raise DataError(f"has no {self.group}, by which data.group says what belongs together")
                    named = json.dumps(values[self.group], sort_keys=True, default=str)
                    group = int(sha256(named.encode()).hexdigest()[:16], 16)
            except DataError as error:
                self._note(where, error)
                continue
            if self.alone and not part and row.part == "test":
                self.not_tested += 1
                continue
            self.keys.append(row.key)
            self.groups.append(group)
            self.named.append(part or row.part or "")
            writer.write({"own": json.dumps(values, default=str), "where": where})

    def _encode(self, read: dict[str, str], part: Part, writer: Any, group: dict[str, str]) -> bool:
        """Write a row's tokens and its group; whether there is something to train in them."""
        assert self.format is not None
        row = shape(json.loads(read["own"]), self.format)
        is_counted = not self.recall or part == "test"  # else each row is in three parts
        try:
            texts = self.encoder.texts(row, scored=part != "train")
        except DataError as error:
            if is_counted:
                self._note(read["where"], error)
            return False
        written = {"row": row.to_json(), **(dict.fromkeys(KEPT, "") if part == "train" else portable(read))}
        self.contents.update(f"{part} {written['row']}\n".encode())
        lengths = [len(each.input_ids) + each.cut for each in texts]
        trained = texts[0].trained
        if is_counted:
            self.lengths.append(max(lengths))
            self.total += lengths[0]
            self.counts["cut"] += any(each.cut for each in texts)
            self.counts["trained_tokens"] += trained
            self.counts["dropped"] += not trained
        if trained:
            writer.write({**texts[0].columns, **written, **group})
        return bool(trained)

    def _note(self, where: str, error: DataError) -> None:
        """Count a bad row, and list it if it is one of the first."""
        self.bad += 1
        if self.bad <= SHOWN:
            self.faults.append(f"{where}: {error}")
