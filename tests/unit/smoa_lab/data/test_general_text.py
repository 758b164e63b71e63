from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.data import general_text
from smoa_lab.data.general_text import passages


def test_the_packaged_story_has_no_notes_of_its_editors() -> None:
    found = passages("packaged")
    assert found[0].startswith("IN THE YEAR 2889.\nLittle though they seem to think of it")
    assert not any(word in text for text in found for word in ("Gutenberg", "Redactor", "***"))
    assert sum(len(text.split()) for text in found) > 5000


def test_a_file_is_cut_into_passages_of_enough_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_text, "WORDS", 4)
    file = tmp_path / "own.txt"
    file.write_text("One two\nthree.\n\nFour five.\n\nSix seven eight nine ten.\n\nA rest.")
    assert passages(str(file)) == ["One two three.\nFour five.", "Six seven eight nine ten."]


def test_a_file_without_empty_lines_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\n".join(f"Line {i} has five words." for i in range(200)))
    assert [len(passage.split()) for passage in passages(str(file))] == [240] * 4
    assert passages(str(file))[1].startswith("Line 48 ")


def test_text_that_cannot_be_read_or_is_too_short_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"forgetting\.text: .*none\.txt: cannot be read: .*; give packaged, "):
        passages(str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"short\.txt: has no passage of 120 words"):
        passages(str(tmp_path / "short.txt"))
