"""Shared by the benchmarks of vLLM: the base, the environment of an engine, the systems that are compared, and adapters
of them that all differ."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = Path(os.environ.get("SMOA_CACHE", "~/.cache/smoa")).expanduser() / "models" / "smollm2-135m"
ROOM = Path("/tmp/smoa-traffic")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
SYSTEMS: dict[str, Any] = {
    "base": None,
    "smoa 32": SmoaConfig(r=32, num_blocks=32, partition="contiguous", target_modules=TARGETS, init_weights=False),
    "lora 1": LoraConfig(r=1, target_modules=TARGETS, init_lora_weights=False),
    "lora 8": LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False),
}
STRENGTH = {"smoa 32": 2.5, "lora 1": 1.0, "lora 8": 1.0}
"""The size of random factors, as a multiple of that which each method draws."""


def save_adapters(system: str, count: int) -> None:
    """A folder for each adapter that has none; they differ in their factors only."""
    folder = ROOM / system
    missing = [own for own in (folder / f"a{number}" for number in range(count)) if not own.is_dir()]
    if SYSTEMS[system] is None or not missing:
        return
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), SYSTEMS[system])
    model.save_pretrained(folder / "first")
    tensors = load_file(folder / "first" / "adapter_model.safetensors")
    sizes = {key: tensor.std() * STRENGTH[system] for key, tensor in tensors.items() if "_A" in key or "_B" in key}
    for own in missing:
        torch.manual_seed(int(own.name[1:]))
        drawn = {key: torch.randn_like(tensors[key]) * size for key, size in sizes.items()}
        part = folder / "part"
        part.mkdir(exist_ok=True)
        shutil.copy(folder / "first" / "adapter_config.json", part)
        save_file(tensors | drawn, part / "adapter_model.safetensors", {"format": "pt"})
        part.rename(own)
