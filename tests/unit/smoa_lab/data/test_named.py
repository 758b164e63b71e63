"""Named sets: what a made-up Hub says becomes the tokens that commit 1eaf65e9 made of it, and the demo's rows are its
own."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import datasets
import pytest

from smoa.errors import DataError
from smoa_lab.data.encoding import Encoder, Tokens
from smoa_lab.data.named import SETS, read_set
from smoa_lab.data.tasks import find_task, select
from tests.support import golden
from tests.support.own_rows import PLAIN, tokenizer_with

ON_HUB: dict[str, list[dict[str, Any]]] = json.loads((golden.GOLDEN / "hub.json").read_text())


def hub_of(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[tuple[Any, ...]]:
    """The Hub has these rows in every split, or raises; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load(*names: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def plain(tokens: Tokens) -> list[list[int]]:
    return [tokens.input_ids, tokens.labels]


def test_the_golden_files_have_every_set() -> None:
    assert ON_HUB.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_the_rows_of_a_set_become_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, ON_HUB[name])
    encoder = Encoder(tokenizer_with(PLAIN), 256)
    rows = read_set(name, "train")
    assert [plain(encoder.encode(row)) for row in rows] == golden.tokens()[f"set {name}"]
    assert all(bool(row.choices) == (name != "gsm8k") and bool(row.context) == (name == "boolq") for row in rows)


def test_a_split_of_the_hub_is_asked_for_by_the_name_that_it_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_of(monkeypatch, [])
    for name in ("winogrande", "gsm8k"):
        for part in ("train", "test"):
            read_set(name, part)
    assert asked == [
        *(("allenai/winogrande", "winogrande_xl", split) for split in ("train", "validation")),
        *(("openai/gsm8k", "main", split) for split in ("train", "test")),
    ]


def test_a_row_without_its_column_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, [{"text": "x"}])
    with pytest.raises(DataError, match=r"piqa, the Hub's row 0: KeyError\('goal'\); the row has \['text'\]"):
        read_set("piqa", "train")


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), RuntimeError("Dataset scripts are no longer")])
def test_a_hub_that_does_not_give_a_set_is_named_with_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_of(monkeypatch, error)
    with pytest.raises(DataError, match=rf"gsm8k: openai/gsm8k .*Hub \({type(error).__name__}.*data\.files"):
        read_set("gsm8k", "train")


def test_the_demos_rows_are_those_of_the_commit_in_order_and_part_by_part() -> None:
    expected = json.loads((golden.GOLDEN / "demo.json").read_text())
    chosen = select({"csqa-demo": find_task("csqa-demo")}, {})
    encoder = Encoder(tokenizer_with(None), 96)
    for part, rows in {"train": chosen.train, "validation": chosen.validation, "test": chosen.test}.items():
        tokens = [[plain(encoder.encode(row)), [plain(choice) for choice in encoder.choices(row)]] for row in rows]
        digest = sha256(json.dumps(tokens).encode()).hexdigest()
        assert {"rows": len(rows), "first": rows[0].prompt, "sha256": digest} == expected[part]


def test_fewer_of_the_demos_rows_are_the_first_ones_and_they_stand_alone() -> None:
    task = find_task("csqa-demo")
    chosen = select({"csqa-demo": task}, {"train": 5, "validation": 0, "test": 2}, seed=1)
    assert (chosen.train, chosen.validation, chosen.test) == (task.read("train")[:5], [], task.read("test")[:2])
    with pytest.raises(DataError, match=r"data\.tasks: csqa-demo has its own parts and order, and stands alone"):
        select({"csqa-demo": task, "piqa": find_task("piqa")}, {})
