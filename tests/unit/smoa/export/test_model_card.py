from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig

from smoa import SmoaConfig
from smoa.export.model_card import loading_code, loss_in_words, model_card
from smoa.export.streaming import RoundingLoss
from smoa.files.card import named_base

LOSS = RoundingLoss(torch.bfloat16, {"first": 0.004, "second": 0.02}, update=1.0, error=0.0123**2)


def card(base: str = "org/base", notes: tuple[str, ...] = ()) -> ModelCard:
    config = SmoaConfig(r=6, num_blocks=3, target_modules=["q_proj"])
    return ModelCard(model_card("mine", named_base(base), "model = ...", config, LOSS, notes))


def test_the_card_names_base_method_layers_and_how_to_load() -> None:
    found = card()
    assert found.data.base_model == "org/base"
    assert found.data.library_name == "transformers"
    assert found.data.tags == ["smoa", "merged"]
    for said in ("# mine", "`org/base` with the SMOA adapter", "2 of its weights", "```python\nmodel = ...\n```"):
        assert said in found.text
    settings = json.loads(found.text.split("```json")[1].split("```")[0])
    assert (settings["r"], settings["num_blocks"], settings["target_modules"]) == (6, 3, ["q_proj"])


@pytest.mark.parametrize(
    ("files", "beside"),
    [
        (["tokenizer.json"], 'tokenizer = AutoTokenizer.from_pretrained("PATH")'),
        (["preprocessor_config.json"], 'processor = AutoProcessor.from_pretrained("PATH")'),
        (["processor_config.json", "tokenizer.json"], 'processor = AutoProcessor.from_pretrained("PATH")'),
    ],
)
def test_what_loads_the_model_loads_what_lies_beside_it(tmp_path: Path, files: list[str], beside: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    first, *_, model, last = loading_code("AutoModelForCausalLM", tmp_path).splitlines()
    assert first.startswith("from transformers import AutoModelForCausalLM, Auto")
    assert (model, last) == ('model = AutoModelForCausalLM.from_pretrained("PATH")', beside)


def test_a_model_alone_is_loaded_alone(tmp_path: Path) -> None:
    assert loading_code("AutoModel", tmp_path) == (
        'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("PATH")'
    )


def test_the_card_names_other_methods_too() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    assert "with the LORA adapter" in model_card("mine", named_base("org/base"), "", config, LOSS, ())


def test_a_base_in_a_local_folder_is_no_base_for_a_hub(tmp_path: Path) -> None:
    found = card(str(tmp_path / "base"))
    assert found.data.base_model is None
    assert "`base` with the SMOA adapter" in found.text
    assert str(tmp_path) not in found.text


def test_notes_come_along() -> None:
    text = card(notes=("One note.", "Another.")).text
    assert "\nOne note.\n" in text
    assert "\nAnother.\n" in text


def test_what_rounding_took_is_told_in_all_and_of_the_worst_layer() -> None:
    found = loss_in_words(LOSS)
    assert "1.2 %" in found
    assert "second: 2 %" in found
    assert f"saved in bfloat16: {found}" in card().text


def test_where_rounding_took_nothing_no_layer_is_blamed() -> None:
    found = loss_in_words(RoundingLoss(torch.float32, {"first": 0.0}, update=1.0))
    assert "nothing" in found
    assert "first" not in found
