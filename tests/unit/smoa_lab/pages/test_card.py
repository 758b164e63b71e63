"""The README.md of a saved adapter."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from smoa import SmoaConfig
from smoa_lab.pages.card import NamedBase, adapter_card, named_base

SETTINGS = {"r": 8, "num_blocks_pattern": {"q_proj": 4}, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_the_card_names_base_config_and_how_to_load() -> None:
    config = SmoaConfig(**SETTINGS, base_model_name_or_path="org/base")
    card = ModelCard(adapter_card("mine", config, named_base("org/base"), "## More\n\n"))
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["smoa", "base_model:adapter:org/base"]
    assert card.data.pipeline_tag == "text-generation"
    for said in (
        "# mine",
        "import smoa",
        "AutoPeftModelForCausalLM",
        "layers for which its config gives no other number",
    ):
        assert said in card.text
    settings = json.loads(card.text.split("```json")[1].split("```")[0])
    assert settings["r"] == 8
    assert settings["target_modules"] == ["q_proj"]


def test_the_folder_of_a_local_base_stays_out_of_the_card(tmp_path: Path) -> None:
    base = str(tmp_path / "models" / "base")
    text = adapter_card("mine", SmoaConfig(**SETTINGS, base_model_name_or_path=base), named_base(base), "")
    assert str(tmp_path) not in text
    assert "base_model:" not in text
    assert "of `base`: r = 8" in text


def test_a_base_that_comes_from_elsewhere_is_loaded_from_there() -> None:
    config = SmoaConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="/cache/base")
    card = ModelCard(adapter_card("mine", config, NamedBase("org/base (from GGUF)", "org/base"), "## More\n\n"))
    assert card.data.base_model == "org/base"
    assert "of `org/base (from GGUF)`: r = 8" in card.text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "PATH")' in card.text
    assert card.text.index("## More") < card.text.index("## Adapter")
    assert "/cache" not in card.content


def test_an_adapter_of_another_method_is_loaded_without_smoa() -> None:
    config = LoraConfig(r=3, base_model_name_or_path="org/base")
    card = ModelCard(adapter_card("mine", config, named_base("org/base"), ""))
    assert "A LORA adapter of `org/base`" in card.text
    assert card.data.tags == ["lora", "base_model:adapter:org/base"]
    assert "import smoa" not in card.text


def test_of_a_local_base_only_the_last_name_is_told_and_a_hub_id_is_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("~/models/base/", "C:\\models\\base", "/models/base"):
        assert named_base(source) == NamedBase("base", None)
    assert named_base("org/base") == NamedBase("org/base", "org/base")
    assert named_base(None) == named_base("") == NamedBase("a model without a name", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert named_base("org/base") == NamedBase("base", None)
