"""Ablations from config/ to files/ and export/: noise for the anchor, unit anchors, and values that are no option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from smoa import PartitionError, SmoaConfig
from smoa.export.merge import merge_and_save
from tests.support import lab
from tests.support.layers import adapted_layer, base_layer, base_weight, smoa_layers
from tests.support.tolerance import assert_close


def llama(folder: Path, **options: object) -> PeftModel:
    """A tiny Llama with an adapter that is no no-op."""
    base = AutoModelForCausalLM.from_pretrained(lab.tiny_base(folder))
    settings: dict[str, object] = {"r": 4, "num_blocks": 2, "alpha": 3.0, "target_modules": ["q_proj", "down_proj"]}
    return get_peft_model(base, SmoaConfig(**{**settings, "init_weights": False, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"modulation": "noise"}, {"scale": "layer"}], ids=str)
def test_a_reloaded_adapter_has_the_same_update_and_merges_the_same_on_disk(
    options: dict[str, object], tmp_path: Path
) -> None:
    model = llama(tmp_path / "base", **options)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(tmp_path / "base").unload(), tmp_path / "adapter")
    merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged").state_dict()
    theirs = smoa_layers(again)
    for name, layer in smoa_layers(model).items():
        assert_close(theirs[name].delta("default"), layer.delta("default"))
        assert_close(merged[f"{name}.weight"], base_weight(layer) + layer.delta("default"))


def test_a_random_adapter_is_as_large_with_a_normalized_anchor_as_without() -> None:
    sizes = []
    for scale in ("paper", "layer"):
        torch.manual_seed(0)
        layer = adapted_layer(base_layer(12, 10), trained=False, r=4, num_blocks=2, init_weights=False, scale=scale)
        sizes.append(layer.delta("default").detach().norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_an_anchor_on_the_meta_device_is_normalized_once_weights_are_there() -> None:
    with torch.device("meta"):
        layer = adapted_layer(nn.Linear(6, 6), trained=False, r=2, num_blocks=2, scale="layer")
    with pytest.raises(PartitionError, match="meta device"):
        layer.block_scale("default")
    layer.base_layer.weight = nn.Parameter(torch.randn(6, 6))
    assert layer.block_scale("default").tolist() == pytest.approx(
        [1 / float(base_weight(layer).square().mean().sqrt())] * 2, rel=1e-5
    )
