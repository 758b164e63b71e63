"""Saves adapters with one version of PEFT, and checks that another version loads them bit for bit.

python -m tests.lives.exchange FOLDER NAME     # saves in FOLDER/NAME, then loads what every version has saved in FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import smoa
from smoa.layer import SmoaLayer
from tests.support import tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"scale": "block"},
    "biases": {"bias": "smoa_only", "partition": "random"},
    "modules": {"modules_to_save": ["lm_head"], "modulation": "none"},
    "pattern": {"num_blocks_pattern": {"v_proj": 2}, "scale": "layer"},
}


def state(model: PeftModel) -> dict[str, Tensor]:
    """What is saved, every layer's ΔW, and the logits."""
    deltas = {f"delta {n}": m.delta("default") for n, m in model.named_modules() if isinstance(m, SmoaLayer)}
    logits = model(**tiny.batch("llama")).logits
    found = {**get_peft_model_state_dict(model), **deltas, "logits": logits}
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def save(folder: Path) -> None:
    """A base and an adapter of each kind."""
    tiny.build("llama").save_pretrained(folder / "base")
    for name, settings in CONFIGS.items():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = smoa.SmoaConfig(
            r=6, num_blocks=3, alpha=4.0, target_modules="all-linear", init_weights=False, **settings
        )
        model = get_peft_model(base, config).eval()
        model.save_pretrained(folder / name)
        save_file(state(model), folder / name / "state.safetensors")


def check(folder: Path) -> None:
    """Load each and compare every bit."""
    for name in CONFIGS:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        found = state(PeftModel.from_pretrained(base, str(folder / name)).eval())
        expected = load_file(folder / name / "state.safetensors")
        assert found.keys() == expected.keys(), (name, found.keys() ^ expected.keys())
        different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
        assert not different, (name, different)
    print(f"PEFT {peft.__version__}: {len(CONFIGS)} adapters of {folder.name} are bit-equal")  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    save(arguments.folder / arguments.name)
    for saved in sorted(arguments.folder.iterdir()):
        check(saved)
