"""Rows on disk: which part a row is in, what is counted, and what a second reading costs."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils.logging import warning_once

from smoa.errors import ConfigError, DataError
from smoa_lab.data.encoding import Encoder, Tokens
from smoa_lab.data.prepared import PreparedRows, Reading, Sizes, require_good_rows, split, units_of
from smoa_lab.data.row import PARTS
from smoa_lab.data.sources import FileSource
from tests.support.lab import MARKED, STRICT, chat, chats, tokenizer_with, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a test, in which nothing was warned of."""
    warning_once.cache_clear()
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


USUAL = Sizes()
ALL = Sizes(validation=0, test=0)
"""Every row is trained on."""


def parts_of(keys: list[int], named: list[str], sizes: Sizes = USUAL) -> tuple[dict[str, list[int]], int]:
    """The numbers of each part's rows, as lists, and how many are left out."""
    chosen, left_out = split(np.array(keys, np.uint64), named, sizes)
    return {part: numbers.tolist() for part, numbers in chosen.items()}, left_out


def test_a_fifth_is_tested_and_a_tenth_validates_at_most_so_many_those_with_the_lowest_digests() -> None:
    keys = np.random.RandomState(0).permutation(100).tolist()
    parts, left_out = parts_of(keys, [""] * 100)
    by_digest = np.argsort(keys)
    assert set(parts["test"]) == set(by_digest[:20])
    assert set(parts["validation"]) == set(by_digest[20:30])
    assert all(numbers == sorted(numbers) for numbers in parts.values())
    assert (len(parts["train"]), left_out) == (70, 0)
    sizes = {part: len(numbers) for part, numbers in parts_of(list(range(10_000)), [""] * 10_000)[0].items()}
    assert sizes == {"test": 400, "validation": 200, "train": 9_400}
    few, _ = parts_of(keys, [""] * 100, Sizes(30, 4, 7))
    assert {part: len(numbers) for part, numbers in few.items()} == {"train": 30, "validation": 4, "test": 7}
    assert parts_of([5, 3], ["", ""])[0] == {"test": [], "validation": [], "train": [0, 1]}


def test_equal_contents_never_lie_in_two_parts() -> None:
    keys = np.random.RandomState(1).randint(0, 40, 200).tolist()
    parts, left_out = parts_of(keys, [""] * 200)
    assert Counter(number for numbers in parts.values() for number in numbers) == Counter(range(200))
    contents = [{keys[number] for number in numbers} for numbers in parts.values()]
    assert sum(map(len, contents)) == len(set.union(*contents)) == 40
    assert left_out == 0


def test_a_row_that_names_its_part_is_there_and_of_equal_ones_the_test_part_has_them() -> None:
    named = ["train", "test", "validation", "", "", "train"]
    parts, left_out = parts_of([1, 2, 3, 2, 4, 3], named)
    assert parts == {"test": [1], "validation": [2], "train": [0, 4]}
    assert left_out == 2
    rows = ["test"] * 4 + [""] * 40
    parts, _ = parts_of([9, 8, 7, 6, *range(100, 140)], rows, Sizes(test=2))
    assert parts["test"] == [2, 3]  # those with the lowest digests, and no other row is drawn
    assert (len(parts["validation"]), len(parts["train"])) == (4, 36)


def test_a_row_stays_held_out_when_rows_are_added_or_other_sizes_are_asked_for() -> None:
    keys = np.random.RandomState(2).permutation(1000).tolist()

    def held_out(number: int, sizes: Sizes) -> set[int]:
        return {keys[place] for place in parts_of(keys[:number], [""] * number, sizes)[0]["test"]}

    fewer = held_out(1000, Sizes(test=50))
    assert fewer < held_out(1000, Sizes(10, 3)) == held_out(1000, Sizes())
    first = held_out(500, Sizes())
    assert len(first & held_out(510, Sizes())) >= len(first) - 10


@dataclass(frozen=True)
class Listed:
    """Rows in a list, and how often they were read."""

    values: list[dict[str, Any]]
    version: int = 0
    reads: list[int] = field(default_factory=list)
    name: str = "listed"

    def check(self) -> None: ...

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.reads.append(1)
        yield from ((f"row {number}", row) for number, row in enumerate(self.values, start=1))

    def state(self) -> Any:
        return [self.version, len(self.values)]


def texts(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"Text number {i}."} for i in range(start, start + number)]


def prepare(train: Any, test: Any = None, template: str | None = MARKED, **changes: Any) -> PreparedRows:
    trained = {key: changes[key] for key in ("assistant_only", "completion_only") if key in changes}
    encoder = Encoder(tokenizer_with(template), changes.get("max_length", 1024), **trained)
    sizes = changes.get("sizes", USUAL)
    tested = [] if test is None else [test]
    alone = changes.get("alone", False)
    return Reading([train], tested, changes.get("format"), sizes, encoder, alone=alone).prepare()


def test_rows_come_in_their_order_into_the_part_that_they_name_and_a_test_source_names_it() -> None:
    own = [{"text": "a", "part": "validation"}, {"text": "b", "part": "test"}, {"text": "c"}, {"text": "d"}]
    rows = prepare(Listed(own))
    found = {part: [row.completion for row in rows.rows(part)] for part in PARTS}
    assert found == {"train": ["c", "d"], "validation": ["a"], "test": ["b"]}
    assert rows.account["parts"] == {"train": 2, "validation": 1, "test": 1}
    rows = prepare(Listed(own), Listed([{"text": "b"}, {"text": "e"}]), alone=True)
    found = {part: [row.completion for row in rows.rows(part)] for part in PARTS}
    assert found == {"train": ["c", "d"], "validation": ["a"], "test": ["b", "e"]}
    assert (rows.account["not_tested"], rows.account["repeated"]) == (1, 0)
    rows = prepare(Listed(texts(2)), Listed([{"text": "a", "part": "train"}]))
    assert [row.completion for row in rows.rows("test")] == ["a"]


def test_held_out_rows_keep_their_own_fields_and_their_place_and_no_digest_has_them(tmp_path: Path) -> None:
    own = [{"text": f"Text {i}.", "id": i, "day": date(2020, 1, 1 + i), "part": PARTS[i % 3]} for i in range(6)]
    rows = prepare(Listed(own))
    assert [json.loads(row.own) for row in rows.rows("test")] == [
        {"text": f"Text {i}.", "id": i, "day": f"2020-01-0{1 + i}", "part": "test"} for i in (2, 5)
    ]
    assert [row.where for row in rows.rows("validation")] == ["row 2", "row 5"]
    assert {row.own + row.where for row in rows.rows("train")} == {""}
    bare = prepare(Listed([{key: row[key] for key in ("text", "part")} for row in own], version=1))
    assert bare.account["sha256"] == rows.account["sha256"]
    assert bare.rows("test") == rows.rows("test")
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "part": "test"}, {"text": "b"}])
    (found,) = prepare(FileSource(file, "rows")).rows("test")
    assert found.where == "rows.jsonl, row 1"


def test_rows_that_are_held_out_and_not_used_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    own = [{"text": f"Text {i}.", "part": "test"} for i in range(6)]
    for most, told in ((4, True), (6, False)):
        caplog.clear()
        prepare(Listed([*own, {"text": "a"}]), sizes=Sizes(test=most))
        assert ("2 of 6 test rows are not used; data.test_examples: 6 takes all" in caplog.text) is told


def test_a_row_is_repeated_whatever_its_white_space_and_case() -> None:
    rows = prepare(Listed(texts(20) + [{"text": f"  TEXT number\t{i}."} for i in range(20)]))
    assert rows.account["repeated"] == 20
    assert rows.account["parts"] == {"test": 8, "validation": 4, "train": 28}


def test_the_content_of_an_account_is_exact() -> None:
    accounts = [prepare(Listed([{"text": text}], version=n)).account for n, text in enumerate(("A b.", "A B.", "A b."))]
    assert [one["sha256"] == accounts[0]["sha256"] for one in accounts] == [True, False, True]


def test_rows_that_repeat_other_parts_are_not_called_unused(caplog: pytest.LogCaptureFixture) -> None:
    named = [{"text": f"Text {i}.", "part": part} for part in ("test", "validation") for i in range(6)]
    prepare(Listed([*named, {"text": "Another.", "part": "validation"}, {"text": "a"}]))
    assert "are not used" not in caplog.text


def test_rows_that_were_dropped_can_be_asked_for_and_those_that_are_not_used_repeat_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = [{"messages": chat(f"{i}" * 500, "Yes."), "part": "test"} for i in range(8)]
    short = {"messages": chat("Open?", "Yes."), "part": "test"}
    rows = prepare(Listed([*long, short, *chats(2)]), sizes=Sizes(test=8), max_length=100)
    assert rows.account["parts"]["test"] == 1
    assert "1 of 9 test rows are not used; data.test_examples: 9 takes all" in caplog.text
    twice = [{"text": f"Text {i}.", "part": "test"} for i in range(9)] * 2
    assert prepare(Listed([*twice, {"text": "a"}]), sizes=Sizes(test=4)).account["repeated"] == 2


def test_training_rows_that_the_test_data_have_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rows = prepare(Listed(texts(10)), Listed(texts(5, start=8), name="test"))
    assert rows.account["parts"] == {"test": 5, "train": 8}
    assert (rows.account["also_held_out"], rows.account["repeated"]) == (2, 0)
    assert "2 rows are left out: held-out rows are the same, or belong together with them" in caplog.text


def test_labels_and_ids_are_those_of_the_encoder_and_are_cut() -> None:
    encoder = Encoder(tokenizer_with(MARKED), None)
    rows = prepare(Listed(chats(5)), sizes=ALL, max_length=40)
    whole = [encoder.encode(row) for row in rows.rows("train")]
    expected = [Tokens(tokens.input_ids[:40], tokens.labels[:40]) for tokens in whole]
    data = rows.part("train")
    assert data["input_ids"][:] == [tokens.input_ids for tokens in expected]
    assert data["labels"][:] == [tokens.labels for tokens in expected]
    assert rows.account["cut"] == 5


def test_choices_count_where_they_are_scored() -> None:
    rows = [{"prompt": "Why?", "choices": ["no", "no " * 99], "label": 0, "part": part} for part in ("train", "test")]
    lengths = [prepare(Listed([row], n)).account["tokens"]["longest"] for n, row in enumerate(rows)]
    assert lengths[0] < 100 < lengths[1]


def test_rows_of_which_nothing_trained_is_left_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    long = {"messages": chat("a" * 500, "Yes.")}
    exactly = {"messages": chat("b" * (100 - 52), "Yes.")}
    rows = prepare(Listed([*chats(3), long, exactly]), sizes=ALL, max_length=100)
    assert rows.account["dropped"] == 1
    assert "1 rows are left out: nothing that is trained is left of them within data.max_length" in caplog.text
    assert rows.account["parts"] == {"train": 4}
    assert all(any(label >= 0 for label in labels[1:]) for labels in rows.part("train")["labels"])
    tokenizer = tokenizer_with(None)
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    source: Any = Listed([{"text": "a"}, {"text": "ab"}])  # the only token of a text is never predicted
    account = Reading([source], [], None, ALL, Encoder(tokenizer, None)).prepare().account
    assert (account["parts"], account["dropped"]) == ({"train": 1}, 1)


def test_where_no_row_is_left_to_train_on_the_reasons_are_counted() -> None:
    account = prepare(Listed(chats(3)), max_length=20).account
    assert (account["parts"], account["dropped"]) == ({}, 3)
    account = prepare(Listed(texts(3)), Listed(texts(3), name="test")).account
    assert (account["parts"], account["also_held_out"]) == ({"test": 3}, 3)


def test_rows_of_another_format_than_the_first_and_those_that_the_template_refuses_are_bad() -> None:
    account = prepare(Listed([*texts(2), *chats(1), {"text": ""}])).account
    assert (account["format"], account["bad"]) == ("text", 2)
    assert account["faults"][0].startswith("row 3: text: is missing, expected in each row of the format text")
    refused = {"messages": chat("Open?", "Yes.", system="Be brief.")}
    account = prepare(Listed([*chats(2), refused, refused]), template=STRICT, sizes=ALL).account
    assert (account["parts"], account["bad"]) == ({"train": 2}, 2)
    assert account["faults"][0].startswith("row 3: the chat template refuses this row: System role not supported")


def test_rows_are_read_once_and_again_when_anything_changed() -> None:
    source = Listed(texts(4))
    for _ in range(2):
        prepare(source)
    assert len(source.reads) == 1
    changes: list[dict[str, Any]] = [
        {"max_length": 9},
        {"sizes": Sizes(3)},
        {"format": "text"},
        {"template": STRICT},
        {"assistant_only": False},
        {"completion_only": False},
    ]
    for change in changes:
        prepare(source, **change)
    assert len(source.reads) == 1 + len(changes)
    changed = Listed(texts(4), version=1)
    prepare(changed)
    assert len(changed.reads) == 1


def test_an_encoder_is_the_same_after_a_call_that_padded_or_cut() -> None:
    encoder = Encoder(tokenizer_with(MARKED))
    before = encoder.state()
    encoder.tokenizer("Open?", padding="max_length", truncation=True, max_length=3)
    assert encoder.state() == before


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for word in ("good", "evil"):
        write_rows(file, [{"text": word}])
        os.utime(file, ns=(1, 1))
        (row,) = prepare(FileSource(file, "rows"), sizes=ALL).rows("train")
        assert row.completion == word
    with file.open("a") as lines:
        lines.write('{"text": \n')
    account = prepare(FileSource(file, "rows"), sizes=ALL).account
    assert (account["parts"], account["bad"]) == ({"train": 1}, 1)
    assert account["faults"][0].startswith(f"{file}, row 2: ")


def test_a_reading_that_fails_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(Listed(texts(3)))
    monkeypatch.undo()
    monkeypatch.setenv("SMOA_CACHE", str(cache.parent))
    with pytest.raises(ConfigError, match="has no chat template"):
        prepare(Listed(chats(2)), template=None)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_bad_rows_are_counted_and_the_first_are_listed_unless_they_may_be_skipped() -> None:
    rows = prepare(Listed([*texts(2), *({"text": ""} for _ in range(1234))]), sizes=ALL)
    with pytest.raises(DataError) as caught:
        require_good_rows(rows.account, skip=False)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("1,234 bad rows; ")
    assert "data.skip_bad_rows: true" in lines[0]
    assert lines[1] == "  row 3: text: is blank, expected text"
    assert lines[-1] == "  and 1,224 more"
    assert len(lines) == 12
    require_good_rows(rows.account, skip=True)
    require_good_rows(prepare(Listed(texts(2))).account, skip=False)


def asked(groups: int, size: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of so many prompts, with several answers to each."""
    return [
        {"prompt": f"Question {group}?", "completion": f"Answer {number}.", **more}
        for group in range(groups)
        for number in range(size)
    ]


def grouped(rows: list[dict[str, Any]], group: Any = None, sizes: Sizes = USUAL) -> PreparedRows:
    return Reading([Listed(rows)], [], None, sizes, Encoder(tokenizer_with(MARKED), None), group).prepare()


def prompts(prepared: PreparedRows, part: Any) -> set[str]:
    return {str(row.prompt) for row in prepared.rows(part)}


def test_rows_of_one_prompt_are_in_one_part_and_say_so_and_sizes_count_rows() -> None:
    """Up to a9f43f17 for 100 of 100 test rows the prompt was trained on."""
    found = grouped(asked(100, 5))
    parts = [prompts(found, part) for part in PARTS]
    assert not any(one & other for one in parts for other in parts if one is not other)
    assert found.account["parts"] == {"train": 350, "validation": 50, "test": 100}
    assert len({row.group for row in found.rows("test")}) == 20
    few = grouped(asked(100, 5), sizes=Sizes(None, 58, 53))
    assert few.account["parts"] == {"train": 400, "validation": 50, "test": 50}, "the last group is cut whole"
    by_row = grouped(asked(100, 5), False)
    assert prompts(by_row, "train") & prompts(by_row, "test")
    assert {row.group for row in by_row.rows("test")} == {""}


def test_a_column_may_say_what_belongs_together() -> None:
    rows = [{**row, "family": number // 10} for number, row in enumerate(asked(200, 1))]
    found = grouped(rows, "family")
    families = [{json.loads(row.own)["family"] for row in found.rows(part)} for part in ("validation", "test")]
    assert [len(each) for each in families] == [2, 4]
    assert not families[0] & families[1]
    for missing in ({}, {"family": None}, {"family": " "}):  # as an empty cell of a table
        assert grouped([{**row, **missing} for row in asked(3, 1)], "family").account["bad"] == 3


@pytest.mark.parametrize(("groups", "held_out"), [(2, (100, 0)), (3, (100, 100)), (8, (100, 100)), (40, (400, 200))])
def test_every_part_has_a_group_where_there_are_three(groups: int, held_out: tuple[int, int]) -> None:
    """Up to 5267c7c7 the first one beyond the wanted number ended a part: of 8 equal ones none chose the rates."""
    keys = np.arange(100 * groups, dtype=np.uint64)
    chosen, _ = split(keys, [""] * len(keys), Sizes(), units_of(keys, keys // 100))
    assert (len(chosen["test"]), len(chosen["validation"])) == held_out
    assert len(chosen["train"]) == len(keys) - sum(held_out)
    mixed = np.concatenate([keys, np.arange(10_000, 13_000, dtype=np.uint64)])
    chosen, _ = split(
        mixed, [""] * len(mixed), Sizes(), units_of(mixed, np.where(mixed < 10_000, mixed // 100, mixed), 1.0)
    )
    assert (len(chosen["test"]), len(chosen["validation"])) == (400, 200)


@pytest.mark.parametrize(("rows", "groups"), [(asked(1, 200), 40), (asked(30, 5), 6)])
def test_of_a_prompt_that_many_rows_have_each_counts_by_itself(rows: list[dict[str, Any]], groups: int) -> None:
    assert len({row.group for row in grouped(rows).rows("test")}) == groups


def test_rows_of_different_prompts_are_split_as_ever() -> None:
    by_prompt, by_row = grouped(asked(100, 1)), grouped(asked(100, 1), False)
    assert by_prompt.account == by_row.account
    assert [by_prompt.rows(part) for part in PARTS] == [by_row.rows(part) for part in PARTS]


def test_rows_of_a_prompt_that_the_test_data_have_are_not_trained_on() -> None:
    held_out = [{**row, "part": "test"} for row in asked(20, 1)]
    found = grouped([*held_out, *[{**row, "completion": "Another."} for row in asked(100, 1)]])
    assert not prompts(found, "train") & prompts(found, "test")
    assert found.account["also_held_out"] == 20


@pytest.mark.parametrize(("most", "kept"), [(None, 30), (12, 12)])
def test_to_measure_recall_all_rows_are_in_each_part_and_in_their_groups(most: int | None, kept: int) -> None:
    rows = [{**row, "of": number // 2} for number, row in enumerate(asked(30, 1))]
    encoder = Encoder(tokenizer_with(MARKED), None)
    found = Reading([Listed(rows)], [], None, Sizes(most, 3, 5), encoder, "of", recall=True).prepare()
    once = Reading([Listed(rows[:kept])], [], None, ALL, encoder, False).prepare().account
    assert [found.account[key] for key in ("tokens", "trained_tokens")] == [once["tokens"], once["trained_tokens"]]
    assert found.account["parts"] == {"train": kept, "validation": kept, "test": kept}
    assert prompts(found, "train") == prompts(found, "validation") == prompts(found, "test")
    assert len({row.group for row in found.rows("test")}) == kept // 2
    assert (found.account["also_held_out"], found.account["unused"]) == (0, {})
