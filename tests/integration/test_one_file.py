"""examples/smoa_in_one_file.py is the method that the library computes: the same ΔW, the same losses."""

import copy
import runpy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig

FILE = Path(__file__).parents[2] / "examples" / "smoa_in_one_file.py"


def test_the_one_file_has_the_librarys_update_and_losses() -> None:
    example = runpy.run_path(str(FILE))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 88, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    settings: dict[str, Any] = {"r": example["RANK"], "num_blocks": example["BLOCKS"], "alpha": example["ALPHA"]}
    library = get_peft_model(copy.deepcopy(base), SmoaConfig(**settings, target_modules=list(example["TARGETS"])))
    parameters = example["adapt"](base)
    pairs = []
    for name, layer in base.named_modules():
        if isinstance(layer, example["SmoaLinear"]):
            twin: Any = library.get_base_model().get_submodule(name)
            pairs.append((layer, twin))
            with torch.no_grad():
                for k, (A, B) in enumerate(zip(layer.A, layer.B, strict=True)):  # twin's rows and columns of block k
                    own = slice(k * A.shape[0], (k + 1) * A.shape[0])
                    B.normal_(std=0.1)
                    twin.smoa_A["default"].weight[own, : A.shape[1]] = A
                    twin.smoa_B["default"].weight[: B.shape[0], own] = B
    assert len(pairs) == 4
    for layer, twin in pairs:
        torch.testing.assert_close(layer.delta_weight(), twin.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    batch = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)}
    trained = [parameter for parameter in library.parameters() if parameter.requires_grad]
    losses = example["train"](base, parameters, batch, steps=10)
    torch.testing.assert_close(losses, example["train"](library, trained, batch, steps=10), rtol=1e-4, atol=0)
    before = base(**batch).loss
    example["merge"](base)
    torch.testing.assert_close(base(**batch).loss, before)
    assert not any(isinstance(module, example["SmoaLinear"]) for module in base.modules())
