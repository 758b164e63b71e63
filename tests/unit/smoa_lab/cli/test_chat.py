import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from smoa_lab.chat import Chat
from smoa_lab.cli import adapters
from smoa_lab.cli.main import app
from tests.support.chats import chat_base, saved_adapter, written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def mine(base: Path) -> Path:
    return saved_adapter(base.with_name("mine"), base)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_is_terminal", lambda: True)


def talk(place: Path | str, *lines: str, options: tuple[str, ...] = ()) -> Result:
    text = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(app, ["chat", str(place), "--max-new-tokens", "12", *options], input=text)


def answer(base: Path, *messages: str) -> str:
    """The base model's answer to the last of messages, which alternate."""
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    return written(AutoModelForCausalLM.from_pretrained(base), base, turns)


def test_a_pipe_gets_an_answer_for_each_line_of_text_and_nothing_else(base: Path) -> None:
    first = answer(base, "one")
    second = answer(base, "one", first.strip(), "two")
    done = CliRunner().invoke(app, ["chat", str(base), "--max-new-tokens", "12"], input="one\n\ntwo\n")
    assert done.exit_code == 0
    assert done.stdout == f"{first}\n\n{second}\n\n"


def test_a_temperature_samples_and_0_does_not(base: Path) -> None:
    greedy = f"{answer(base, 'one')}\n\n"
    assert talk(base, "one", options=("--temperature", "0")).stdout == greedy
    sampled = talk(base, "one", options=("--temperature", "100"))
    assert sampled.exit_code == 0
    assert sampled.stdout != greedy


def test_a_line_that_is_refused_has_an_empty_answer_in_a_pipe_and_the_exit_code_tells(base: Path) -> None:
    done = talk(base, "one", "/etc/hosts holds what?", "/", "x" * 10_000, "/base", "two")
    assert done.exit_code == 1
    first = answer(base, "one")
    assert done.stdout == f"{first}\n\n" + "\n\n" * 3 + f"{answer(base, 'one', first.strip(), 'two')}\n\n"
    assert done.stderr.count("error: ") == 4


def test_commands_of_a_pipe_say_what_they_do_on_stderr(base: Path, mine: Path) -> None:
    done = talk(mine, "/base", "one", "/rest", "/quit", "two")
    assert done.exit_code == 1
    assert done.stdout == f"{answer(base, 'one')}\n\n\n\n"
    notes = [line for line in done.stderr.splitlines() if "Loading weights" not in line]
    assert [note.partition(";")[0] for note in notes] == [
        "mine answers.",
        "base answers.",
        "error: there is no command /rest",
    ]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_who_answers_and_what_can_be_typed(base: Path, mine: Path) -> None:
    done = talk(mine, "/help", "/base", "one", " /etc?")
    assert done.exit_code == 0
    first = answer(base, "one")
    assert "mine answers." in done.stdout
    assert "/help lists the commands." in done.stdout
    assert "/both" in done.stdout
    assert f"base> {first}\n" in done.stdout
    assert f"base> {answer(base, 'one', first.strip(), '/etc?')}\n" in done.stdout


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard, as in a terminal; a process that a script put into the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as the first piece of the first answer appears."""
    pressed = threading.Event()

    show_piece = Chat.show

    def show(self: Any, piece: str) -> None:
        if not pressed.is_set():
            pressed.set()
            signal.raise_signal(signal.SIGINT)
        show_piece(self, piece)

    monkeypatch.setattr(Chat, "show", show)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_stops_the_answer_and_not_the_chat(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch)
    done = talk(base, "one", "/reset", "one")
    assert done.exit_code == 0
    assert done.stdout.count("Interrupted. /quit or Ctrl-D ends the chat.") == 1
    assert f"base> {answer(base, 'one')}\n" in done.stdout


def test_ctrl_c_ends_a_pipe(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch)
    done = talk(base, "one", "two")
    assert done.exit_code == 130
    assert "resume" not in done.output


def test_a_system_prompt_is_checked_before_the_first_line_is_read(base: Path) -> None:
    done = talk(base, "one", options=("--system", "forbidden"))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "chat template refuses" in done.stderr
