from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.starting.survey import ModelFacts, check_place, look_at_data, look_at_model, rounded_length
from tests.support import lab
from tests.support.chats import chat_base
from tests.support.proposals import rows_file, talks

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # TRL sets it
]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFacts:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return look_at_model(str(lab.tiny_base(tmp_path / "base")))


def test_a_models_sizes_are_those_of_its_config(base: ModelFacts) -> None:
    assert (base.context, base.layers, base.hidden, base.intermediate) == (512, 2, 32, 48)
    assert sum(base.shapes.values()) == 2 * 7  # the output is left out
    assert base.vocabulary == 259


def test_no_such_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.name: cannot load"):
        look_at_model(str(tmp_path))


@pytest.mark.parametrize(
    ("longest", "context", "length"), [(1, None, 64), (64, 512, 64), (65, 512, 128), (500, 512, 512), (600, 512, 512)]
)
def test_a_length_is_a_multiple_of_64_within_the_context(longest: int, context: int | None, length: int) -> None:
    assert rounded_length(longest, context) == length


def test_conversations_get_a_template_if_the_model_has_none(base: ModelFacts, tmp_path: Path) -> None:
    place = str(rows_file(tmp_path / "rows.jsonl", talks(40)))
    found = look_at_data(place, base)
    assert found.values == {"train": place, "format": "messages", "chat_template": "alpaca", "test_part": 0.05}
    assert (found.format, found.kind) == ("messages", "rows")
    assert 30 <= found.train <= 40
    assert found.max_length % 64 == 0
    own = look_at_data(place, look_at_model(str(chat_base(tmp_path / "chat"))))
    assert "chat_template" not in own.values


def test_plain_text_needs_no_template(base: ModelFacts, tmp_path: Path) -> None:
    place = str(rows_file(tmp_path / "rows.jsonl", [{"text": f"Line {i} " * (1 + 60 * (i == 3))} for i in range(300)]))
    found = look_at_data(place, base)
    assert "chat_template" not in found.values
    assert found.max_length == 64  # one of 300 is longer


def test_preferences_of_turns_need_one(base: ModelFacts, tmp_path: Path) -> None:
    rows = [{"prompt": f"Ask {i}", "chosen": "Yes.", "rejected": "No."} for i in range(20)]
    assert "chat_template" not in look_at_data(str(rows_file(tmp_path / "text.jsonl", rows)), base).values
    turns = [
        {"chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
        | {"rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}]}
        for row in rows
    ]
    found = look_at_data(str(rows_file(tmp_path / "turns.jsonl", turns)), base)
    assert (found.format, found.values["chat_template"]) == ("preference", "alpaca")


def test_bad_rows_are_told_as_training_tells_them(base: ModelFacts, tmp_path: Path) -> None:
    place = rows_file(tmp_path / "rows.jsonl", [*talks(3), {"messages": "none"}])
    with pytest.raises(DataError, match="1 bad row; nothing is trained"):
        look_at_data(str(place), base)


def test_a_place_without_rows_is_known_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        check_place(str(tmp_path / "nothing.jsonl"))
    assert check_place("arc_easy") == "arc_easy"
    assert check_place("someone/rows") == "someone/rows"


def test_a_tasks_name_gives_questions(base: ModelFacts, tmp_path: Path) -> None:
    lab.fill_cache(tmp_path / "cache", lab.questions(20, "train"), lab.questions(5, "test"))
    found = look_at_data("arc_easy", base)
    assert found.values == {"tasks": ["arc_easy"]}
    assert (found.format, found.kind, found.max_length) == (None, "questions", 256)
    assert 15 <= found.train <= 20
