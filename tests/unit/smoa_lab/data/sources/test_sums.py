"""GSM8K and generated sums: the same records every time, and what is said where they cannot be had."""

from __future__ import annotations

import sys
from typing import Any

import datasets
import pytest

from smoa.errors import DataError
from smoa_lab.data.sources import sums


def test_gsm8k_is_taken_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        return [{"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = sums.read_gsm8k("test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (record.prompt, record.answer, record.choices) == ("How many?", "3 + 4 = 7\n#### 7", ())


def test_without_the_hub_gsm8k_says_how_to_name_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*names: str, split: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"openai/gsm8k: could not be downloaded from the Hub \(ConnectionError.*data\.files: gsm8k"
    ):
        sums.read_gsm8k("train")


def test_sums_are_right_and_come_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(sums, "CHAIN_SUM", {"train": (0, 300), "test": (1_000_000, 100)})
    train, test = sums.read_chain_sum("train"), sums.read_chain_sum("test")
    for record in [*train, *test]:
        # "State the final answer to the following arithmetic problem: 4 + 3 ="
        terms = record.prompt.rpartition(":")[2].removesuffix("=").split()
        signs = [1, *(1 if sign == "+" else -1 for sign in terms[1::2])]
        assert sum(sign * int(term) for sign, term in zip(signs, terms[::2], strict=True)) == int(record.answer)
    assert len({record.prompt for record in train}) == len(train)
    assert sums.read_chain_sum("train") == train


def test_sums_name_their_package_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        DataError, match=r"chain_sum: needs reasoning-gym; in a clone of smoa, run: pip install '\.\[sums\]'"
    ):
        sums.read_chain_sum("train")
