"""Encoders, decoders and encoder-decoders take a step and generate; tests/unit/smoa/test_towers.py has their lives."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from smoa import SmoaConfig
from tests.support import tiny_models


def adapted(base: PreTrainedModel, **config: Any) -> PeftModel:
    settings = {"r": 4, "num_blocks": 2, "target_modules": "all-linear"} | config
    return get_peft_model(base, SmoaConfig(**settings))


@torch.no_grad()
def outputs(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def test_one_step_moves_every_factor_and_nothing_else(family: str) -> None:
    model = adapted(tiny_models.build(family), init_weights=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()(**tiny_models.batch(family)).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".smoa_A." in name or ".smoa_B." in name}


@pytest.mark.parametrize(("family", "num_beams"), [("gemma3", 1), ("gpt2", 2), ("t5", 2)])
def test_adapted_merged_and_plain_models_generate(family: str, num_beams: int) -> None:
    batch = tiny_models.batch(family)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    base = tiny_models.build(family)
    plain, plain_logits = base.generate(**inputs, **settings), outputs(base, batch)
    model = adapted(base, init_weights=False, alpha=64.0).eval()
    own = model.generate(**inputs, **settings)
    assert not torch.allclose(outputs(model, batch), plain_logits)
    model.merge_adapter()
    assert torch.equal(model.generate(**inputs, **settings), own)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, **settings), plain)
