from __future__ import annotations

import json
from array import array
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.tokens.account import RowsAccount, histogram_lines, length_summary, require_good_rows


def test_rows_are_counted_as_cut_and_dropped() -> None:
    account = RowsAccount(max_length=10)
    assert [account.add(10, 4), account.add(11, 2), account.add(30, 0), account.add(5, 0)] == [True, True, False, False]
    plain = account.plain()
    assert (plain["cut"], plain["dropped"], plain["trained_tokens"]) == (2, 2, 6)
    assert plain["tokens"]["total"] == 56
    assert json.loads(json.dumps(plain)) == plain


def test_without_a_greatest_length_nothing_is_cut() -> None:
    account = RowsAccount(max_length=None)
    assert account.add(10**6, 1)
    assert account.plain()["cut"] == 0


def test_the_histogram_has_every_row_once() -> None:
    lengths = array("I", [1, 16, 17, 32, 33, 1000])
    summary = length_summary(lengths)
    assert summary["histogram"] == [[16, 2], [32, 2], [64, 1], [128, 0], [256, 0], [512, 0], [1024, 1]]
    assert (summary["shortest"], summary["median"], summary["longest"]) == (1, 17, 1000)
    lines = histogram_lines(summary["histogram"])
    assert lines[0].split() == ["1–16", "█" * 40, "2"]
    assert lines[1].split() == ["17–32", "█" * 40, "2"]
    assert lines[-1].split() == ["513–1024", "█" * 20, "1"]


def test_the_histogram_begins_with_the_shortest_rows() -> None:
    assert length_summary(array("I", [100, 120]))["histogram"] == [[128, 2]]


def test_of_no_rows_there_is_no_histogram() -> None:
    assert length_summary(array("I")) == {"total": 0, "histogram": []}


def account_of(bad: int) -> dict[str, Any]:
    account = RowsAccount(None)
    for number in range(bad):
        account.add_bad(f"rows.jsonl, row {number}: text: is blank")
    return account.plain()


def test_bad_rows_are_counted_and_the_first_are_listed() -> None:
    with pytest.raises(DataError) as caught:
        require_good_rows(account_of(1234), skip=False)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("1,234 bad rows; nothing is trained until they are mended, or data.skip_bad_rows: true")
    assert lines[1] == "  rows.jsonl, row 0: text: is blank"
    assert lines[-1] == "  and 1,224 more"
    assert len(lines) == 12


def test_one_bad_row_is_one() -> None:
    with pytest.raises(DataError, match=r"^1 bad row; ") as caught:
        require_good_rows(account_of(1), skip=False)
    assert "more" not in str(caught.value)


def test_bad_rows_may_be_skipped_and_good_ones_need_nothing() -> None:
    require_good_rows(account_of(3), skip=True)
    require_good_rows(account_of(0), skip=False)
