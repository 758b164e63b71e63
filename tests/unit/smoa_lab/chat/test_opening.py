from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from smoa.errors import ConfigError, DataError
from smoa_lab.chat.opening import Found, find, load
from smoa_lab.chat.speaker import Writing
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.data.chat_templates import set_chat_template
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.questions import Template
from smoa_lab.data.rows import question
from smoa_lab.training.run_folder import RunFolder
from tests.support.chats import chat_base, saved_adapter
from tests.support.lab import byte_tokenizer, tiny_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return chat_base(tmp_path / "base")


def finished_run(
    room: Path, base: Path, method: str = "smoa", template: Template = "alpaca", name: str = "run"
) -> RunFolder:
    """A run's folder without its weights."""
    folder = RunFolder(room / name)
    folder.adapter.mkdir(parents=True)
    settings = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj"]} if method == "smoa" else {}
    config = check_config(
        {
            "model": {"name": str(base), "dtype": "bfloat16"},
            "method": method,
            "adapter": settings,
            "data": {"tasks": ["arc_easy"]},
            "task": {"template": template},
            "training": {"output_dir": str(folder.path)},
        }
    )
    folder.config.write_text(config.to_yaml())
    folder.metrics.write_text("{}")
    return folder


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_run_is_opened_with_its_dtype_and_its_template(tmp_path: Path, base: Path, template: Template) -> None:
    run = finished_run(tmp_path, base, template=template)
    saved_adapter(run.adapter, base)
    assert find(str(run.path), {}) == Found(ModelSection(name=str(base), dtype="bfloat16"), run.adapter, template)


def test_what_the_command_says_goes_before_what_the_run_says(tmp_path: Path, base: Path) -> None:
    run = finished_run(tmp_path, base)
    saved_adapter(run.adapter, base)
    found = find(str(run.path), {"name": "moved", "dtype": "float16"}, "chat")
    assert found == Found(ModelSection(name="moved", dtype="float16"), run.adapter, "chat", forced=True)


def test_a_run_that_trained_the_whole_model_has_no_adapter(tmp_path: Path, base: Path) -> None:
    run = finished_run(tmp_path, base, method="full")
    assert find(str(run.path), {}) == Found(ModelSection(name=str(run.adapter), dtype="bfloat16"), None, "alpaca")


def test_an_adapter_is_opened_on_the_base_it_records_or_the_one_given(tmp_path: Path, base: Path) -> None:
    adapter = saved_adapter(tmp_path / "adapter", base)
    assert find(str(adapter), {}) == Found(ModelSection(name=str(base)), adapter, "chat")
    assert find(str(adapter), {"name": "moved"}).model.name == "moved"


def test_an_adapter_that_records_no_base_needs_one(tmp_path: Path, base: Path) -> None:
    adapter = saved_adapter(tmp_path / "lone", base)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: records no base model; name it with --base"):
        find(str(tmp_path / "lora"), {})
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace(f'"{base}"', "null"))
    assert load(find(str(adapter), {"name": str(base)}), Writing()).name == "lone"


@pytest.mark.parametrize("place", ["smollm2-135m", "google/gemma-3-270m", "base", "model.gguf"])
def test_anything_that_can_be_a_model_is_opened_without_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    chat_base(tmp_path / "base")
    (tmp_path / "model.gguf").touch()
    assert find(place, {}) == Found(ModelSection(name=place), None, "chat")


def test_a_place_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder; give .* smollm2-135m"):
        find(str(tmp_path / "nowhere"), {})


def test_a_folder_without_a_config_is_refused_with_what_was_looked_for(tmp_path: Path, base: Path) -> None:
    """As an adapter is that lost its own."""
    adapter = saved_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter: contains no finished run .*adapter_config\.json.* or model"):
        find(str(adapter), {})


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(str(tiny_base(tmp_path / "plain")), {})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # the weights are not read
    with pytest.raises(DataError, match=r"plain: its tokenizer has no chat template; use --template alpaca"):
        load(found, Writing())


def test_each_adapter_is_talked_to_through_its_own_template(tmp_path: Path, base: Path) -> None:
    asked = [{"role": "user", "content": "Why?"}]
    runs = [finished_run(tmp_path, base, template=name, name=name) for name in ("chat", "alpaca")]
    own = []
    for run in runs:
        saved_adapter(run.adapter, base)
        own.append(load(find(str(run.path), {}), Writing()).tokens(asked)["input_ids"].tolist())
    assert own[0] != own[1]
    speaker = load(find(str(runs[0].path), {}), Writing())
    speaker.load(str(runs[1].path))
    assert speaker.tokens(asked)["input_ids"].tolist() == own[1]
    speaker.use("chat")
    assert speaker.tokens(asked)["input_ids"].tolist() == own[0]
    forced = load(find(str(runs[1].path), {}, "chat"), Writing())
    forced.load(str(runs[1].path))
    assert forced.tokens(asked)["input_ids"].tolist() == own[0]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_first_turn_through_alpacas_template_is_the_prompt_of_training(adds_bos: bool) -> None:
    tokenizer: PreTrainedTokenizerBase = byte_tokenizer(adds_bos)
    trained = Encoder(tokenizer, max_length=1000).encode(question("t", "1", "Why?\nHow?", "so"), "", end=False)
    set_chat_template(tokenizer, "alpaca")
    asked = [{"role": "user", "content": "Why?\nHow?"}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == trained.prompt


def test_later_turns_and_a_system_prompt_have_their_place_in_alpacas_template() -> None:
    tokenizer = byte_tokenizer(adds_bos=False)
    set_chat_template(tokenizer, "alpaca")
    turns = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "How?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\nSo.<eos>\n\n### Instruction:\nHow?\n\n### Response:\n"
    )
