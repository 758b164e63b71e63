from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from smoa import SmoaConfig
from smoa.export.lora import convert_to_lora
from tests.support.tiny_mixtures import EXPERTS, build_mixture, tokens
from tests.support.tolerance import assert_close


def adapted(family: str, **settings: object) -> PeftModel:
    config = SmoaConfig(
        r=4, num_blocks=2, init_weights=False, target_modules=["q_proj"], target_parameters=EXPERTS, **settings
    )
    return get_peft_model(build_mixture(family), config).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks for modules only
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("uniform", [False, True], ids=["", "uniform"])
def test_a_lora_that_keeps_everything_says_the_same_without_smoa(family: str, uniform: bool, tmp_path: Path) -> None:
    model = adapted(family)
    conversion = convert_to_lora(model, error=0.0, uniform_rank=uniform)
    conversion.save(tmp_path)
    loaded = PeftModel.from_pretrained(build_mixture(family), str(tmp_path)).eval()
    assert_close(logits(loaded), logits(model))
    assert conversion.error < 1e-5
    assert conversion.parameters == sum(p.numel() for name, p in loaded.named_parameters() if ".lora_" in name)


def test_every_expert_is_cut_and_reported_by_itself() -> None:
    conversion = convert_to_lora(adapted("qwen3_moe"), rank=2)
    names = [layer.module for layer in conversion.layers]
    assert "model.layers.0.mlp.experts.gate_up_proj[3].1" in names
    assert "model.layers.0.mlp.experts.down_proj[4]" in names
    assert len(names) == 1 + 5 * 3
    assert {layer.rank for layer in conversion.layers} == {2}
    assert conversion.config.rank_pattern == {
        "model.layers.0.mlp.experts.down_proj": 2,
        "model.layers.0.self_attn.q_proj": 2,
    }
    assert 0 < conversion.error < 1
