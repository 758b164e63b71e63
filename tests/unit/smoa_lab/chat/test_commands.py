from __future__ import annotations

from pathlib import Path

import pytest

from smoa.errors import DataError
from smoa_lab.chat.commands import COMMANDS, run_command
from smoa_lab.chat.conversation import Conversation
from tests.support.chats import KeptScreen, chat_base, saved_adapter, speaker_of


@pytest.fixture
def screen() -> KeptScreen:
    return KeptScreen()


@pytest.fixture
def talk(tmp_path: Path, screen: KeptScreen) -> Conversation:
    adapter = saved_adapter(tmp_path / "mine", chat_base(tmp_path / "base"))
    return Conversation(speaker_of(adapter), screen)


def test_help_lists_every_command_with_what_it_does(talk: Conversation, screen: KeptScreen) -> None:
    run_command(talk, "/help")
    lines = screen.notes[0].splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [f"/{name}" for name in COMMANDS]
    assert all(command.help in line for line, command in zip(lines, COMMANDS.values(), strict=False))


def test_the_commands_say_who_answers(tmp_path: Path, talk: Conversation, screen: KeptScreen) -> None:
    other = saved_adapter(tmp_path / "other", tmp_path / "base", seed=2)
    for line in ("/base", "/base", f"/load {other}", "/use mine", "/use"):
        run_command(talk, line)
    answering = [f"From now on {name} answers." for name in ("base", "mine", "other")]
    assert screen.notes == [*answering, "Loaded: mine, other. mine answers.", "Loaded: mine, other. mine answers."]


def test_the_conversation_is_changed_compared_and_saved(tmp_path: Path, talk: Conversation, screen: KeptScreen) -> None:
    run_command(talk, "/system be kind")
    assert talk.system[0]["content"] == "be kind"
    talk.ask("hello")
    run_command(talk, "/both")
    run_command(talk, f"/save {tmp_path / 'talk.jsonl'}")
    assert (tmp_path / "talk.jsonl").is_file()
    run_command(talk, "/reset")
    run_command(talk, "/system")
    assert (talk.turns, talk.system) == ([], [])
    saved = f"{tmp_path / 'talk.jsonl'}: saved, 2 messages"
    changed = ["The conversation starts anew.", "There is no system prompt now."]
    assert screen.notes == ["The system prompt is set.", "base:", "mine:", saved, *changed]


def test_quitting_is_the_end_of_the_input(talk: Conversation) -> None:
    with pytest.raises(EOFError):
        run_command(talk, "/quit")


def test_a_command_that_does_not_exist_names_the_nearest(talk: Conversation) -> None:
    with pytest.raises(DataError, match=r"there is no command /rest; did you mean 'reset'\?"):
        run_command(talk, "/rest")


@pytest.mark.parametrize("name", ["load", "save"])
def test_a_missing_argument_is_named_with_what_the_command_does(talk: Conversation, name: str) -> None:
    with pytest.raises(DataError, match=rf"/{name} {COMMANDS[name].argument}: {COMMANDS[name].help[:20]}"):
        run_command(talk, f"/{name} ")
