from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from smoa_lab.rows.faults import Fault
from smoa_lab.rows.json_rows import RowDecoder

ROWS = [{"n": -12.5e3, "t": 'é"\\/\b😀', "l": [True, None, {"a": {}}]}, {}, {"t": "\u2028"}, {"n": 10}]
STYLES = {
    "plain": {},
    "spread": {"indent": 2},
    "tight": {"separators": (",", ":")},
    "unescaped": {"ensure_ascii": False},
}


@pytest.mark.parametrize("style", STYLES)
def test_a_list_may_be_written_in_any_style(style: str) -> None:
    text = f" \n{json.dumps(ROWS, **STYLES[style])}\r\n\t"  # type: ignore[arg-type]
    assert list(RowDecoder().items(text)) == ROWS


def test_a_list_cut_off_anywhere_is_an_error_after_its_whole_rows() -> None:
    text = json.dumps(ROWS)
    for end in range(1, len(text)):
        rows = RowDecoder().items(text[:end])
        whole = [json.dumps(row) for row in until_error(rows)]
        assert text.startswith(f"[{', '.join(whole)}")


def until_error(rows: Iterator[object]) -> Iterator[object]:
    """The rows up to the error, which there must be."""
    with pytest.raises(ValueError, match=r"the end of the file|is not JSON"):
        yield from rows


def test_an_item_that_is_no_object_is_a_fault() -> None:
    found = list(RowDecoder().items("[123456, 7]"))
    assert [str(fault) for fault in found] == [
        f"item {n} is not a JSON object but the number {value}; expected an object with columns"
        for n, value in ((1, 123456), (2, 7))
    ]


def test_nothing_but_blanks_is_a_list_without_rows() -> None:
    assert list(RowDecoder().items(" \n")) == []
    assert list(RowDecoder().items("[  ]")) == []


def test_a_list_nested_too_deeply_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 is not JSON \\(nested too deeply\\)"):
        list(RowDecoder().items("[" * 100_000))


def test_a_key_that_an_object_has_twice_is_a_fault_however_deep_and_only_of_its_row() -> None:
    decoder = RowDecoder()
    twice = Fault("b", "line 1 has this key twice in one object; keep one")
    assert decoder.line('{"a": [{"b": 1, "c": 2, "b": 1}]}', "line 1") == twice
    assert decoder.line('{"a": {"b": 1}, "b": 2}', "line 2") == {"a": {"b": 1}, "b": 2}
    assert isinstance(decoder.line('{"a": {"b": 1, "b": 1}', "line 3"), Fault)
    assert decoder.line("{}", "line 4") == {}


def test_a_repeated_key_is_named_in_characters_that_can_be_printed() -> None:
    found = RowDecoder().line('{"\\ud83d": 1, "\\ud83d": 2}', "line 1")
    assert isinstance(found, Fault)
    assert found.field == "\\ud83d"
