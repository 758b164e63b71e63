"""K by layer: as `num_blocks_pattern` gives it, also in adapters of versions that could choose it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from smoa import ConfigError, SmoaConfig
from smoa.export.merge import merge_and_save
from smoa.tuner.hotswap import hotswap_adapter
from tests.support import tiny_models
from tests.support.decompositions import NoDecomposition
from tests.support.layers import oracle_delta, smoa_layers
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close

TARGETS = ["q_proj", "v_proj", "down_proj"]
OPTIONS: list[dict[str, Any]] = [
    {"num_blocks_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}},
    {"num_blocks_pattern": {"v_proj": 2}, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5.0}},
]


def adapted(seed: int = 1, **options: Any) -> PeftModel:
    """A tiny Llama with an adapter that is no no-op."""
    torch.manual_seed(seed)
    settings = {"r": 8, "num_blocks": 4, "alpha": 12.0, "target_modules": TARGETS, "init_weights": False}
    return get_peft_model(tiny_models.build("llama"), SmoaConfig(**settings | options)).eval()


def test_a_pattern_sets_the_blocks_of_the_layers_it_names() -> None:
    model = adapted(num_blocks_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 6})
    for name, layer in smoa_layers(model).items():
        expected = 2 if name.endswith("v_proj") else 6 if name.endswith("1.mlp.down_proj") else 4
        assert len(layer.ranks["default"]) == expected
        assert layer.r["default"] == 8
        assert_close(layer.delta("default").double(), oracle_delta(layer), dtype=torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_a_saved_adapter_brings_its_blocks(options: dict[str, Any], low_memory: bool, tmp_path: Path) -> None:
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    base = adapted().unload()
    with NoDecomposition():
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_merge_on_disk_knows_the_blocks(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    model.save_pretrained(tmp_path / "adapter")
    adapted().unload().save_pretrained(tmp_path / "base")
    merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(model))


def test_a_swap_needs_the_same_blocks(tmp_path: Path) -> None:
    options = {"num_blocks_pattern": {"v_proj": 2}}
    slot, new = adapted(**options), adapted(seed=2, r=6, **options)
    new.save_pretrained(tmp_path)
    hotswap_adapter(slot, tmp_path)
    assert_close(logits(slot), logits(new))
    with pytest.raises(ConfigError, match="num_blocks_pattern"):
        hotswap_adapter(adapted(), tmp_path)
