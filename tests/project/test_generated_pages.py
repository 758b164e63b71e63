"""Tables, maps and settings that documents show are those that computing them anew gives."""

import runpy
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig

ROOT = Path(__file__).parents[2]
needs_hira = pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="this PEFT has no HiRA")


@needs_hira
def test_the_table_of_layers_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "layer_kinds.py"))
    assert script["page"]() == script["PAGE"].read_text(encoding="utf-8"), "run python docs/figures/layer_kinds.py"
    assert script["missing"]() == []  # every kind of layer has a row


def test_writing_the_parts_of_pages_anew_changes_nothing() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    texts = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in script["PAGES"]}
    assert {name: script["written"](text) for name, text in texts.items()} == texts, "run make docs"
    shown = {name for name in script["BLOCKS"] if any(f"<!-- begin {name} -->" in text for text in texts.values())}
    assert shown == set(script["BLOCKS"])


TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("config", "documented"),
    [
        (SmoaConfig(r=16, num_blocks=2, target_modules=TARGETS, partition="contiguous"), 23),
        (SmoaConfig(r=16, num_blocks=2, target_modules=TARGETS, partition="contiguous", smoa_dropout=0.05), 32),
        (LoraConfig(r=16, target_modules=TARGETS), 33),
    ],
)
def test_a_decoder_layer_keeps_as_many_hidden_states_as_documented(config: PeftConfig, documented: int) -> None:
    shapes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **shapes)).to(torch.bfloat16)
    adapted = get_peft_model(model, config)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*adapted.parameters(), *adapted.buffers())}
    hidden = torch.randn(1, 128, 256, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        positions = model.model.rotary_emb(hidden, torch.arange(128)[None])
        model.model.layers[0].train()(hidden, position_embeddings=positions)
    found = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert found / hidden.nbytes == pytest.approx(documented, abs=1)
