"""Named sets: what a made-up Hub says becomes the tokens that commit 1eaf65e9 made of it, and the demo's rows are its
own."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pytest

from smoa_lab.data.chat_templates import set_chat_template
from smoa_lab.data.encoding import IGNORED, Encoder, Tokens
from smoa_lab.data.formats import BadRow, recognize, shape
from smoa_lab.data.prepared import Reading, Sizes
from smoa_lab.data.row import PARTS
from smoa_lab.data.sources import DEMO, SETS, HubSource, find_sources
from tests.support import lab
from tests.support.lab import tokenizer_with

ON_HUB: dict[str, list[dict[str, Any]]] = json.loads((lab.GOLDEN / "hub.json").read_text())
SPLITS = dict.fromkeys(SETS, "validation") | dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa", "gsm8k"), "test")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the Hub was asked for, which has rows of every set in every split."""
    calls: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str, **_: Any) -> Iterator[dict[str, Any]]:
        calls.append((path, config, split))
        return iter(next(ON_HUB[name] for name, of in SETS.items() if (of.path, of.config) == (path, config)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def alpaca_encoder(max_length: int | None) -> Encoder:
    tokenizer = tokenizer_with(None)
    set_chat_template(tokenizer, "alpaca")
    return Encoder(tokenizer, max_length)


@pytest.mark.parametrize("name", SETS)
def test_the_rows_of_a_set_become_the_same_tokens(name: str, asked: list[Any]) -> None:
    """Nothing differs in Alpaca's template: a request in words, such as WinoGrande's, or BoolQ's passage are part of
    the prompt now, and GSM8K's answers are turns of conversations."""
    train, test = find_sources(name)
    assert test is not None
    rows = [shape(row, recognize(row)) for _, row in train.rows() if isinstance(row, dict)]
    assert [lab.plain_tokens(alpaca_encoder(256).encode(row)) for row in rows] == lab.golden_tokens()[f"set {name}"]
    assert all(bool(row.choices) == (name != "gsm8k") for row in rows)
    assert len(list(test.rows())) == len(rows)
    place = SETS[name].path, SETS[name].config
    assert asked == [(*place, "train"), (*place, SPLITS[name])]


def test_a_row_of_the_hub_without_its_column_is_bad() -> None:
    ((_, row),) = _parsed("piqa", {"text": "x"})
    assert isinstance(row, BadRow)
    assert str(row) == "KeyError('goal'); the row has ['text']"


def _parsed(name: str, row: dict[str, Any]) -> list[Any]:
    source, _ = find_sources(name)
    assert isinstance(source, HubSource)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: iter([row]))
        return list(source.rows())


def test_the_demos_rows_are_those_of_the_commit_in_order_and_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of every tenth row, of at most 96 tokens; long questions lost their head then, and now the end."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    expected = json.loads((lab.GOLDEN / "demo.json").read_text())
    encoder = alpaca_encoder(None)
    train, test = find_sources(DEMO)
    assert test is None
    prepared = Reading([train], [], None, Sizes(), encoder).prepare()
    few = Reading([train], [], None, Sizes(5, 0, 2), encoder).prepare()

    def cut(tokens: Tokens) -> list[list[int]]:
        prompt, answer = tokens.prompt, tokens.answer[:95]
        prompt = prompt[:1] + prompt[1:][max(0, len(prompt + answer) - 96) :]
        return [prompt + answer, [IGNORED] * len(prompt) + answer]

    for part, first in zip(PARTS, (5, 0, 2), strict=True):
        rows = prepared.rows(part)
        tokens = [[cut(encoder.encode(row)), [cut(choice) for choice in encoder.choices(row)]] for row in rows[::10]]
        digest = sha256(json.dumps(tokens).encode()).hexdigest()
        asked: Any = rows[0].prompt[0]
        assert {"rows": len(rows), "first": asked.content, "sha256": digest} == expected[part]
        chosen = rows[:first] if part == "train" else sorted(rows, key=lambda row: row.key)[:first]
        assert few.rows(part) == sorted(chosen, key=rows.index)
