"""Models that see and hear: their convolutions and embeddings are adapted, trained, saved, merged and exported."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.layers.kinds import Convolution, Embedding
from smoa.layers.linear import Linear
from tests.support.decompositions import NoDecomposition
from tests.support.layers import layers_of, oracle_delta
from tests.support.tiny_towers import TOWERS, build_tower, tower_batch
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Model with `tie_word_embeddings=True` and:UserWarning",
    "ignore:Input and output embeddings are no longer tied",
    "ignore:num_blocks=3 is larger than a side",
    "ignore:Setting `save_embedding_layers` to `True`",
)
every_tower = pytest.mark.parametrize("tower", TOWERS)
KINDS = {
    "vit": {Convolution, Linear},
    "clip": {Convolution, Embedding, Linear},
    "whisper": {Convolution, Embedding, Linear},
    "convnext": {Convolution, Linear},
    "gemma3": {Convolution, Embedding, Linear},
    "qwen2_5_vl": {Convolution, Embedding, Linear},
}


def adapted(tower: str, base: nn.Module | None = None, **config: Any) -> PeftModel:
    settings = {"r": 6, "num_blocks": 3, "init_weights": False, "target_modules": TOWERS[tower].targets}
    return get_peft_model(base or build_tower(tower), SmoaConfig(**settings | config)).eval()


@torch.no_grad()
def output(model: nn.Module, tower: str) -> Tensor:
    return model(**tower_batch(tower)).loss


@every_tower
def test_a_model_is_a_no_op_then_learns_then_is_saved_loaded_and_merged(tower: str, tmp_path: Path) -> None:
    base = build_tower(tower)
    before = output(base, tower)
    model = adapted(tower, base, init_weights=True)
    assert {type(layer) for layer in layers_of(model)} == KINDS[tower]
    assert_close(output(model, tower), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(4):
        model(**tower_batch(tower)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = output(model, tower)
    assert trained < before

    model.save_pretrained(tmp_path)
    with NoDecomposition():
        loaded = PeftModel.from_pretrained(build_tower(tower), tmp_path).eval()
        assert torch.equal(output(loaded, tower), trained)
    for layer in layers_of(loaded):
        assert_close(layer.delta("default"), oracle_delta(layer))
    before_merge = copy.deepcopy(loaded.state_dict())
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    assert all(torch.equal(tensor, before_merge[name]) for name, tensor in loaded.state_dict().items())
    merged = loaded.merge_and_unload(safe_merge=True)
    assert not layers_of(merged)
    assert_close(output(merged, tower), trained)
