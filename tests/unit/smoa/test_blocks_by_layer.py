"""K by layer: as `num_blocks_pattern` gives it, also in adapters of versions that could choose it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from smoa import AdapterFileError, ConfigError, MergeError, PartitionError, SmoaConfig
from smoa.export.merge import merge_and_save
from smoa.tuner.hotswap import hotswap_adapter
from tests.support import tiny_models
from tests.support.adapter_files import with_settings
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


def test_too_many_blocks_for_a_layer_are_refused_by_its_name() -> None:
    with pytest.raises(PartitionError, match=r"v_proj: num_blocks=17 must be between 1 and 16"):
        adapted(num_blocks_pattern={"v_proj": 17})


def test_a_swap_needs_the_same_blocks(tmp_path: Path) -> None:
    options = {"num_blocks_pattern": {"v_proj": 2}}
    slot, new = adapted(**options), adapted(seed=2, r=6, **options)
    new.save_pretrained(tmp_path)
    hotswap_adapter(slot, tmp_path)
    assert_close(logits(slot), logits(new))
    with pytest.raises(ConfigError, match="num_blocks_pattern"):
        hotswap_adapter(adapted(), tmp_path)


def test_adapters_of_different_blocks_by_layer_are_not_combined() -> None:
    model = adapted(**OPTIONS[0])
    model.add_adapter("other", SmoaConfig(r=8, num_blocks=4, target_modules=TARGETS))
    with pytest.raises(MergeError, match="num_blocks_pattern"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_a_config_that_asks_for_more_rank_than_saved_is_refused(tmp_path: Path) -> None:
    adapted(**OPTIONS[1]).save_pretrained(tmp_path)
    with_settings(tmp_path, rank_pattern={"v_proj": 10**9 * 4})
    with pytest.raises(AdapterFileError, match="asks for rank"):
        PeftModel.from_pretrained(adapted().unload(), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_blocks_pattern": {"v_proj": 0}}, r"num_blocks_pattern\['v_proj'\]=0"),
        ({"num_blocks_pattern": {"v_proj": 2}, "block_ranks": [2, 2, 2, 2]}, "block_ranks and num_blocks_pattern"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SmoaConfig(**{"r": 8, "num_blocks": 4, "target_modules": TARGETS, **options})
