"""The README.md of a saved adapter, and how it names the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from smoa import ConfigError, SmoaConfig, save_adapter
from smoa.files.card import NamedBase, adapter_card, named_base


@pytest.fixture
def model(tiny_llama: PreTrainedModel) -> Any:
    return get_peft_model(
        tiny_llama, SmoaConfig(r=8, num_blocks_pattern={"q_proj": 4}, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


def test_the_card_names_base_config_metrics_and_how_to_load(model: Any, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "mine", base_model_name="org/base", metrics={"accuracy": 0.625})
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["smoa", "base_model:adapter:org/base"]
    assert card.data.pipeline_tag == "text-generation"
    for said in (
        "# mine",
        "import smoa",
        "AutoPeftModelForCausalLM",
        "| accuracy | 0.625 |",
        "layers for which its config gives no other number",
    ):
        assert said in card.text
    settings = json.loads(card.text.split("```json")[1].split("```")[0])
    assert settings["r"] == 8
    assert settings["target_modules"] == ["q_proj"]


def test_the_home_folder_stays_out_of_the_card(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "models" / "base")
    save_adapter(model, tmp_path / "mine", metrics={}, save_embedding_layers=False)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "base_model:" not in text
    assert "of `base`: r = 8" in text
    assert "Results" not in text


def test_a_base_that_comes_from_elsewhere_is_loaded_from_there() -> None:
    config = SmoaConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="/cache/base")
    card = ModelCard(adapter_card("mine", config, {}, NamedBase("org/base (from GGUF)", "org/base"), "## More\n\n"))
    assert card.data.base_model == "org/base"
    assert "of `org/base (from GGUF)`: r = 8" in card.text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "PATH")' in card.text
    assert card.text.index("## More") < card.text.index("## Adapter")
    assert "/cache" not in card.content


def test_an_adapter_of_another_method_is_loaded_without_smoa() -> None:
    card = ModelCard(adapter_card("mine", LoraConfig(r=3, base_model_name_or_path="org/base"), {}))
    assert "A LORA adapter of `org/base`" in card.text
    assert card.data.tags == ["lora", "base_model:adapter:org/base"]
    assert "import smoa" not in card.text


def test_every_adapter_saved_gets_a_card_beside_its_config(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, SmoaConfig(r=4, target_modules=["q_proj"]), "first")
    model.add_adapter("second", SmoaConfig(r=6, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "mine", base_model_name="org/base", metrics={"accuracy": 0.625})
    for name, r in (("first", 4), ("second", 6)):
        text = (tmp_path / "mine" / name / "README.md").read_text()
        assert "0.625" in text
        assert f'"r": {r}' in text


def test_a_card_for_another_method_is_refused_before_anything_is_written(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="metrics: default is not a SMoA adapter"):
        save_adapter(model, tmp_path / "mine", metrics={})
    save_adapter(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("~/models/base/", "base"),
        ("C:\\models\\base", "base"),
        ("/models/tiny.gguf", "tiny.gguf"),
    ],
)
def test_of_a_local_base_only_the_last_name_is_told(source: str, text: str) -> None:
    assert named_base(source) == NamedBase(text, None)


def test_a_folder_that_exists_is_local_even_if_it_looks_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert named_base("org/base") == NamedBase("base", None)


def test_a_hub_id_is_a_name_and_a_link_and_a_model_may_have_no_name() -> None:
    assert named_base("org/base") == NamedBase("org/base", "org/base")
    assert named_base(None) == named_base("") == NamedBase("a model without a name", None)
