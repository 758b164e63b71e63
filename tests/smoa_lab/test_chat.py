"""`smoa chat`: who answers, conversations and their commands."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from smoa.errors import ConfigError, DataError
from smoa_lab.chat import Chat
from smoa_lab.open_run import open_place
from tests.support.lab import NEW_TOKENS, chat_base, saved_adapter, tiny_base, written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def mine(base: Path) -> Path:
    return saved_adapter(base.with_name("mine"), base)


def chat(place: Path, **options: Any) -> Chat:
    return Chat(open_place(place), NEW_TOKENS, **options)


def by_generate(base: Path, *messages: str, adapter: Path | None = None) -> str:
    """The answer to the last of messages, which alternate, without a chat."""
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    model.generation_config.suppress_tokens = None
    return written(model, base, turns).strip()


def test_an_adapter_and_its_base_each_write_their_own_text(
    base: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, adapted = by_generate(base, "hello"), by_generate(base, "hello", adapter=mine)
    assert plain != adapted
    alone, talk = chat(base), chat(mine)
    assert (alone.name, talk.name) == ("base", "mine")
    for one, answer in ((alone, plain), (talk, adapted)):
        one.respond("hello")
        assert one.turns[-1] == {"role": "assistant", "content": answer}
    capsys.readouterr()
    before = list(talk.turns)
    talk.respond("/base")  # whichever is on
    talk.respond("/both")
    shown = capsys.readouterr().out
    assert shown.startswith("base answers.\nbase:\n")
    first, second = shown.removeprefix("base answers.\nbase:\n").split("mine:\n")
    assert [text.strip() for text in (first, second)] == [plain, adapted]
    assert talk.turns == before
    assert talk.name == "base"


def test_the_model_sees_the_system_prompt_and_all_turns(base: Path) -> None:
    talk = chat(base)
    talk.respond("one")
    talk.respond("two")
    first, second = (turn["content"] for turn in talk.turns if turn["role"] == "assistant")
    assert second == by_generate(base, "one", first, "two")
    talk.respond("/reset")
    talk.respond("two")
    assert talk.turns[-1]["content"] == by_generate(base, "two")
    asked = chat(base, system="be kind")
    asked.respond("two")
    assert len(asked.turns) == 2, "the system prompt is no turn"
    assert asked.turns[-1]["content"] != talk.turns[-1]["content"]


def test_a_temperature_samples(base: Path) -> None:
    greedy, sampled = chat(base), chat(base, temperature=100.0)
    for talk in (greedy, sampled):
        talk.respond("one")
    assert greedy.turns[1] != sampled.turns[1]


def test_what_cannot_be_done_is_told_and_quit_ends(base: Path, mine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is a model without an adapter"):
        chat(base).respond("/both")
    talk = chat(mine)
    with pytest.raises(ConfigError, match="no message to answer yet"):
        talk.respond("/both")
    with pytest.raises(EOFError):
        talk.respond("/quit")
    biased = chat(saved_adapter(tmp_path / "biased", base, seed=1, bias="all"))
    for command in ("/both", "/base"):
        with pytest.raises(ConfigError, match="trains biases of the base"):
            biased.respond(command)


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_base(tmp_path / "plain")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # the weights are not read
    with pytest.raises(DataError, match=r"plain: its tokenizer has no chat template; use --template alpaca"):
        chat(plain)


def test_the_generation_config_of_the_base_comes_back(base: Path, mine: Path, tmp_path: Path) -> None:
    talk = chat(Path(shutil.copytree(mine, tmp_path / "mine")))
    talk.respond("hello")
    assert talk.base_model.generation_config.suppress_tokens
