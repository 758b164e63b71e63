from __future__ import annotations

import json
from pathlib import Path

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.chat.conversation import Conversation
from smoa_lab.chat.speaker import Writing
from tests.support.chats import KeptScreen, chat_base, saved_adapter, speaker_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return chat_base(tmp_path / "base")


def conversation_with(place: Path, screen: KeptScreen, system: str | None = None, new_tokens: int = 12) -> Conversation:
    return Conversation(speaker_of(place, Writing(new_tokens)), screen, system)


def roles(conversation: Conversation) -> list[str]:
    return [turn["role"] for turn in conversation.turns]


def test_the_model_sees_the_system_prompt_and_all_turns(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = KeptScreen()
    talk = conversation_with(base, screen, "be kind")
    prompts: list[str] = []
    write = talk.speaker.write
    monkeypatch.setattr(
        talk.speaker,
        "write",
        lambda turns, *rest: (prompts.append([one["content"] for one in turns]), write(turns, *rest)),
    )
    talk.ask("one")
    talk.ask("two")
    first = screen.answers[0].strip()
    assert prompts == [["be kind", "one"], ["be kind", "one", first, "two"]]
    talk.reset()
    talk.ask("three")
    talk.set_system("")
    talk.reset()
    talk.ask("four")
    assert prompts[2:] == [["be kind", "three"], ["four"]]


def test_a_system_prompt_that_the_template_refuses_changes_nothing(base: Path) -> None:
    talk = conversation_with(base, KeptScreen(), "be kind")
    with pytest.raises(DataError, match="no such prompt"):
        talk.set_system("forbidden")
    assert talk.system == [{"role": "system", "content": "be kind"}]


def test_both_answer_the_last_message_and_the_conversation_stays(tmp_path: Path, base: Path) -> None:
    screen, alone = KeptScreen(), KeptScreen()
    conversation_with(base, alone).ask("hello")
    talk = conversation_with(saved_adapter(tmp_path / "mine", base), screen)
    with pytest.raises(DataError, match="no message to answer yet"):
        talk.ask_both()
    talk.ask("hello")
    before = list(talk.turns)
    talk.speaker.toggle()  # whichever is on
    talk.ask_both()
    own, *both = screen.answers
    assert screen.notes == ["base:", "mine:"]
    assert both == [alone.answers[0], own]
    assert own != alone.answers[0]
    assert talk.turns == before


def test_both_need_an_adapter(base: Path) -> None:
    talk = conversation_with(base, KeptScreen())
    talk.ask("hello")
    with pytest.raises(DataError, match="no adapter is loaded"):
        talk.ask_both()


class Interrupting(KeptScreen):
    """Ctrl-C after so many pieces."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def write(self, piece: str) -> None:
        if len(self.pieces) == self.after:
            raise KeyboardInterrupt
        super().write(piece)


def test_an_interrupted_answer_is_kept_as_far_as_it_got_and_the_chat_goes_on(base: Path) -> None:
    whole, cut = KeptScreen(), Interrupting(after=1)
    conversation_with(base, whole).ask("hello")
    talk = conversation_with(base, cut)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello")
    kept = talk.turns[1]["content"]
    assert kept
    assert whole.answers[0].strip().startswith(kept)
    assert kept != whole.answers[0].strip()
    cut.after = -1
    talk.reset()
    talk.ask("hello")
    assert cut.answers[1:] == whole.answers


def test_the_oldest_turns_are_dropped_where_the_model_can_read_no_more(base: Path) -> None:
    """The tiny model has 512 positions, and a character is a token."""
    screen = KeptScreen()
    talk = conversation_with(base, screen, "be kind")
    for number in range(6):
        talk.ask(f"{number}" * 120)
    assert len(screen.answers) == 6
    assert [note[:40] for note in screen.notes] == ["The conversation is longer than the mode"]
    assert roles(talk) == ["user", "assistant"] * 6
    assert 0 < talk.first < 10
    assert talk.first % 2 == 0
    seen = talk.first
    with pytest.raises(DataError, match=r"12 tokens for the answer exceed the model's positions by \d+; shorten"):
        talk.ask("x" * 600)
    assert (talk.first, len(talk.turns)) == (seen, 12)


def test_a_conversation_is_saved_in_the_format_of_training_data(tmp_path: Path, base: Path) -> None:
    screen, file = KeptScreen(), tmp_path / "talk.jsonl"
    talk = conversation_with(base, screen, "sei nett")
    with pytest.raises(DataError, match="nothing to save"):
        talk.save(str(file))
    talk.ask("schön?")
    assert talk.save(str(file)) == f"{file}: saved, 2 messages"
    (row,) = map(json.loads, file.read_text("utf-8").splitlines())
    answer = {"role": "assistant", "content": screen.answers[0].strip()}
    assert row == {
        "messages": [{"role": "system", "content": "sei nett"}, {"role": "user", "content": "schön?"}, answer]
    }
    talk.ask("more")
    assert talk.save(str(file)) == f"{file}: replaced, 4 messages"


def test_a_file_of_others_is_not_overwritten(tmp_path: Path, base: Path) -> None:
    talk = conversation_with(base, KeptScreen())
    talk.ask("hello")
    file = tmp_path / "talk.jsonl"
    file.write_text("theirs")
    with pytest.raises(ConfigError, match="exists and was not saved by this chat"):
        talk.save(str(file))
    with pytest.raises(DataError, match="cannot be written"):
        talk.save(str(file / "below"))
    assert file.read_text() == "theirs"
