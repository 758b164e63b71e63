"""What `smoa chat` does apart from the terminal: what it opens, who answers, conversations and their commands."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import RunModel
from smoa_lab.chat import COMMANDS
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.data.chat_templates import alpaca
from smoa_lab.open_run import find_model
from smoa_lab.training.run_folder import RunFolder
from tests.support.chats import KeptChat, chat_base, saved_adapter, written
from tests.support.lab import tiny_base

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of it, which no test changes."""
    return tmp_path_factory.mktemp("room")


@pytest.fixture(scope="module")
def base(room: Path) -> Path:
    return chat_base(room / "base")


@pytest.fixture(scope="module")
def mine(room: Path, base: Path) -> Path:
    return saved_adapter(room / "mine", base, seed=1)


def finished_run(room: Path, base: Path, method: str = "smoa", name: str = "run") -> RunFolder:
    """A run's folder without its weights."""
    folder = RunFolder(room / name)
    folder.adapter.mkdir(parents=True)
    settings = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj"]} if method == "smoa" else {}
    config = check_config(
        {
            "model": {"name": str(base), "dtype": "bfloat16"},
            "method": method,
            "adapter": settings,
            "data": {"train": "rows.jsonl"},
            "training": {"output_dir": str(folder.path)},
        }
    )
    folder.config.write_text(config.to_yaml())
    folder.metrics.write_text("{}")
    return folder


def test_what_is_opened_is_a_run_an_adapter_or_a_model_with_its_dtype_and_base_unless_others_are_given(
    tmp_path: Path, base: Path, mine: Path
) -> None:
    run = finished_run(tmp_path, base)
    shutil.copytree(mine, run.adapter, dirs_exist_ok=True)
    assert find_model(str(run.path), {}) == RunModel(ModelSection(name=str(base), dtype="bfloat16"), None, run.adapter)
    moved = ModelSection(name="moved", dtype="float16")
    assert find_model(str(run.path), {"name": "moved", "dtype": "float16"}) == RunModel(moved, None, run.adapter)
    full = finished_run(tmp_path, base, method="full", name="full")
    whole = ModelSection(name=str(full.adapter), dtype="bfloat16")
    assert find_model(str(full.path), {}) == RunModel(whole)
    assert find_model(str(mine), {}) == RunModel(ModelSection(name=str(base)), None, mine)
    assert find_model(str(mine), {"name": "moved"}).section.name == "moved"
    (tmp_path / "model.gguf").touch()
    for place in ("smollm2-135m", "google/gemma-3-270m", str(base), str(tmp_path / "model.gguf")):
        assert find_model(place, {}) == RunModel(ModelSection(name=place))


def test_an_adapter_that_records_no_base_needs_one(tmp_path: Path, base: Path, mine: Path) -> None:
    adapter = Path(shutil.copytree(mine, tmp_path / "lone"))
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: records no base model; name it with --base"):
        KeptChat(tmp_path / "lora")
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace(f'"{base}"', "null"))
    assert KeptChat(adapter, name=str(base)).name == "lone"


def test_a_folder_without_a_model_is_named_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"adapter: contains no adapter .*nor a model .*nor is it a finished run"):
        find_model(str(tmp_path / "adapter"), {})


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_base(tmp_path / "plain")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # the weights are not read
    with pytest.raises(DataError, match=r"plain: its tokenizer has no chat template; use --template alpaca"):
        KeptChat(plain)


def test_each_adapter_is_talked_to_through_the_template_saved_with_it_unless_another_is_named(
    tmp_path: Path, base: Path, mine: Path
) -> None:
    asked = [{"role": "user", "content": "Why?"}]
    first, second = (finished_run(tmp_path, base, name=name) for name in ("first", "second"))
    for run in (first, second):
        shutil.copytree(mine, run.adapter, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = alpaca(tokenizer)
    tokenizer.save_pretrained(second.adapter)
    own = [KeptChat(run.path).tokens(asked)["input_ids"].tolist() for run in (first, second)]
    assert own[0] != own[1]
    assert KeptChat(first.path, "alpaca").tokens(asked)["input_ids"].tolist() == own[1]
    with pytest.raises(ConfigError, match="there is no template 'alpacca'; did you mean 'alpaca'"):
        KeptChat(first.path, "alpacca")


def said(model: KeptChat, name: str | None = None) -> str:
    model.write(HELLO, name or model.name)
    return model.answers.pop()


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def by_generate(base: Path, adapter: Path | None = None) -> str:
    """Without a cache of weights."""
    model = plain(base) if adapter is None else PeftModel.from_pretrained(plain(base), str(adapter))
    return written(model, base, HELLO)


def test_an_adapter_and_its_base_each_write_their_own_text(tmp_path: Path, base: Path, mine: Path) -> None:
    plain_model = KeptChat(base)
    texts = {"base": said(plain_model), "mine": by_generate(base, mine)}
    assert len(plain_model.pieces) > 1
    assert texts["base"] != texts["mine"]
    assert texts["base"] == by_generate(base)
    model = KeptChat(mine)
    assert (model.name, said(model)) == ("mine", texts["mine"])
    model.base()
    assert (model.name, said(model)) == ("base", texts["base"])
    assert said(model, "mine") == texts["mine"]
    model.base()
    assert said(model) == texts["mine"]
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(plain(base), config).save_pretrained(tmp_path / "lora")
    assert said(KeptChat(tmp_path / "lora")) == by_generate(base, tmp_path / "lora") != texts["base"]


def test_an_adapter_in_a_folder_called_base_has_another_name(tmp_path: Path, mine: Path) -> None:
    talk = KeptChat(Path(shutil.copytree(mine, tmp_path / "base")))
    assert talk.name == "base-2"
    talk.base()
    assert talk.name == "base"


def test_the_model_sees_the_system_prompt_and_all_turns(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = KeptChat(base)
    talk.system("be kind")
    prompts: list[list[str]] = []
    write = talk.write
    monkeypatch.setattr(
        talk, "write", lambda turns, name: (prompts.append([one["content"] for one in turns]), write(turns, name))
    )
    talk.ask("one")
    talk.ask("two")
    first = talk.answers[0].strip()
    assert prompts == [["be kind", "one"], ["be kind", "one", first, "two"]]
    talk.reset()
    with pytest.raises(DataError, match="chat template refuses this: no such prompt"):
        talk.system("forbidden")
    talk.ask("three")
    talk.system("")
    talk.reset()
    talk.ask("four")
    assert prompts[2:] == [["be kind", "three"], ["four"]]


def test_both_answer_the_last_message_and_the_conversation_stays(base: Path, mine: Path) -> None:
    alone, talk = KeptChat(base), KeptChat(mine)
    alone.ask("hello")
    with pytest.raises(DataError, match="this is a model without an adapter"):
        alone.respond("/both")
    with pytest.raises(DataError, match="no message to answer yet"):
        talk.respond("/both")
    talk.ask("hello")
    before = list(talk.turns)
    talk.base()  # whichever is on
    talk.both()
    own, *both = talk.answers
    assert talk.notes[-2:] == ["base:", "mine:"]
    assert both == [alone.answers[0], own]
    assert own != alone.answers[0]
    assert talk.turns == before


def test_beside_an_adapter_that_trained_biases_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    talk = KeptChat(saved_adapter(tmp_path / "biased", base, seed=1, bias="all"))
    talk.ask("hello")
    for command in ("/both", "/base"):
        with pytest.raises(DataError, match=r"trains biases of the base.*; talk to the base by itself: smoa chat"):
            talk.respond(command)


class Interrupting(KeptChat):
    """Ctrl-C after a piece."""

    after = 1

    def show(self, piece: str) -> None:
        if len(self.pieces) == self.after:
            raise KeyboardInterrupt
        super().show(piece)


def test_an_interrupted_answer_is_kept_as_far_as_it_got_and_the_chat_goes_on(base: Path) -> None:
    whole, talk = KeptChat(base), Interrupting(base)
    whole.ask("hello")
    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello")
    kept = talk.turns[1]["content"]
    assert kept
    assert whole.answers[0].strip().startswith(kept)
    assert kept != whole.answers[0].strip()
    talk.reset()
    talk.after = 0
    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello")
    assert talk.turns == []  # an answer of nothing isn't one
    talk.after = -1
    talk.ask("hello")
    assert talk.answers[-1:] == whole.answers


def test_the_oldest_turns_are_dropped_where_the_model_can_read_no_more(base: Path) -> None:
    """The tiny model has 512 positions, and a character is a token."""
    talk = KeptChat(base)
    talk.system("be kind")
    for number in range(6):
        talk.ask(f"{number}" * 120)
    assert len(talk.answers) == 6
    assert [note[:40] for note in talk.notes[1:]] == ["The conversation is longer than the mode"]
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 6
    assert 0 < talk.first < 10
    assert talk.first % 2 == 0
    seen = talk.first
    with pytest.raises(DataError, match=r"12 tokens for the answer exceed the model's positions by \d+; shorten"):
        talk.ask("x" * 600)
    assert (talk.first, len(talk.turns)) == (seen, 12)


def test_help_lists_the_commands_and_they_say_what_they_did(mine: Path) -> None:
    talk = KeptChat(mine)
    talk.ask("hello")
    lines = {
        "/base": "base answers.",
        "/system be kind": "The system prompt is set.",
        "/both": "mine:",
        "/reset": "The conversation starts anew.",
        "/system": "There is no system prompt now.",
    }
    talk.respond("/help")
    told = talk.notes[-1].splitlines()
    assert [line.split()[0] for line in told[:-1]] == [f"/{name}" for name in COMMANDS]
    assert all(text in line for line, (_, text) in zip(told, COMMANDS.values(), strict=False))
    for line, said in lines.items():
        talk.respond(line)
        assert talk.notes[-1] == said
    assert (talk.turns, talk.prompt) == ([], [])

    with pytest.raises(EOFError):
        talk.respond("/quit")
    with pytest.raises(DataError, match=r"no command /rest; did you mean 'reset'\?"):
        talk.respond("/rest")
