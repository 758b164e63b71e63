"""The page of `smoa inspect --html` for adapters whose layers have no blocks, beside one whose layers do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaForCausalLM

from smoa import SmoaConfig
from smoa_lab.inspection.inspection_page import inspection_page, summary
from smoa_lab.inspection.layer_reports import LayerReport, inspect_layers
from tests.support import lab

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return lab.tiny_base(tmp_path / "base")


def reports(base: Path, config: PeftConfig) -> list[LayerReport]:
    """What `smoa inspect` finds in an adapter of random factors."""
    adapter = base.with_name(str(config.peft_type.value))
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    return inspect_layers(adapter)


def lora(base: Path) -> list[LayerReport]:
    return reports(base, LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))


def smoa(base: Path, **options: object) -> list[LayerReport]:
    return reports(base, SmoaConfig(r=4, num_blocks=2, target_modules=TARGETS, init_weights=False, **options))


def test_a_lora_is_reported_by_its_rank_and_without_blocks(base: Path) -> None:
    layers = lora(base)
    assert [layer.method for layer in layers] == ["lora"] * 4
    assert [layer.rank for layer in layers] == [layer.rank_bound for layer in layers] == [3] * 4
    assert all(layer.parameters == 3 * (layer.rows + layer.columns) for layer in layers)
    page = inspection_page("A LoRA", {"lora": layers})
    assert page.count("<figure data-chart>") == 4
    assert "Block by block" not in page
    assert "spectral scores" not in page


def test_two_adapters_stand_beside_each_other_and_the_first_is_shown_in_detail(base: Path) -> None:
    ours, theirs = smoa(base), lora(base)
    page = inspection_page("Two", {"ours": ours, "theirs": theirs})
    assert page.count("<figure data-chart>") == 5
    assert "Block by block" in page
    for name in ("ours", "theirs"):
        assert f"Every adapted layer of {name}" in page
    changed = max(ours, key=lambda layer: layer.relative_update)
    assert f"What changed most: {changed.module}" in page


def test_a_bound_that_is_not_known_is_a_dash(base: Path) -> None:
    first, *others = lora(base)
    layers = [dataclasses.replace(first, rank_bound=None), *others]
    assert inspection_page("A LoRA", {"lora": layers}).count("<td>–</td>") == 1


def test_the_summary_is_of_all_layers(base: Path) -> None:
    layers = lora(base)
    found = summary(layers)
    assert found["parameters"] == sum(layer.parameters for layer in layers)
    assert found["rank"] == 3
    assert found["coverage"] == pytest.approx(sum(layer.coverage for layer in layers) / 4)
